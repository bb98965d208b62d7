//! The agent's parameters, read from the kernel command line (`agent.*`).
//!
//! Unknown parameters are ignored. A malformed value of a known one is reported and its default
//! used: a guest that boots with a wrong log level is worth more than one that does not boot.

use std::time::Duration;

use crate::log::Level;

/// Where the ttRPC server listens unless the command line says otherwise.
const DEFAULT_SERVER_ADDRESS: &str = "vsock://-1:1024";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) log_level: Level,
    /// vsock port of the log stream; 0 is none.
    pub(crate) log_vport: u32,
    /// vsock port of the loopback's ports (`forward`); 0 is none.
    pub(crate) forward_vport: u32,
    pub(crate) server_address: String,
    /// Bytes; 0 leaves the kernel's default.
    pub(crate) container_pipe_size: u32,
    pub(crate) hotplug_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log_level: Level::Info,
            log_vport: 0,
            forward_vport: 0,
            server_address: DEFAULT_SERVER_ADDRESS.to_owned(),
            container_pipe_size: 0,
            hotplug_timeout: Duration::from_secs(3),
        }
    }
}

impl Config {
    /// Parses a command line; the second value lists what was malformed.
    pub(crate) fn parse(cmdline: &str) -> (Self, Vec<String>) {
        let mut config = Self::default();
        let mut malformed = Vec::new();
        for word in cmdline.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if config.set(key, value).is_none() {
                malformed.push(word.to_owned());
            }
        }
        (config, malformed)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "agent.log" => self.log_level = Level::parse(value)?,
            "agent.log_vport" => self.log_vport = value.parse().ok()?,
            "agent.forward_vport" => self.forward_vport = value.parse().ok()?,
            "agent.server_addr" => self.server_address = server_address(value)?,
            "agent.container_pipe_size" => self.container_pipe_size = value.parse().ok()?,
            "agent.hotplug_timeout" => {
                let seconds = value.parse::<u64>().ok().filter(|seconds| *seconds > 0)?;
                self.hotplug_timeout = Duration::from_secs(seconds);
            }
            _ => {}
        }
        Some(())
    }
}

fn server_address(value: &str) -> Option<String> {
    let known = value
        .strip_prefix("unix://")
        .is_some_and(|path| !path.is_empty())
        || value.strip_prefix("vsock://").is_some_and(|address| {
            address.split_once(':').is_some_and(|(cid, port)| {
                cid.parse::<i64>().is_ok() && port.parse::<u32>().is_ok()
            })
        });
    known.then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_parameters_are_read_and_others_ignored() {
        let (config, malformed) = Config::parse(
            "console=ttyS0 agent.log=debug agent.log_vport=1025 quiet agent.hotplug_timeout=9\n",
        );
        assert_eq!(config.log_level, Level::Debug);
        assert_eq!(config.log_vport, 1025);
        assert_eq!(config.hotplug_timeout, Duration::from_secs(9));
        assert_eq!(config.server_address, DEFAULT_SERVER_ADDRESS);
        assert!(malformed.is_empty());
    }

    #[test]
    fn malformed_values_keep_the_default_and_are_named() {
        let (config, malformed) = Config::parse("agent.log=loud agent.server_addr=tcp://x a=b");
        assert_eq!(config, Config::default());
        assert_eq!(malformed, ["agent.log=loud", "agent.server_addr=tcp://x"]);
    }

    #[test]
    fn unix_address_is_accepted() {
        let (config, _) = Config::parse("agent.server_addr=unix:///run/a.sock");
        assert_eq!(config.server_address, "unix:///run/a.sock");
    }

    proptest::proptest! {
        #[test]
        fn any_command_line_is_parsed(line in ".*") {
            let _ = Config::parse(&line);
        }
    }
}
