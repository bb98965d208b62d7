//! `kata-agent`: PID 1 of the guest.
//!
//! ```text
//! /init (guest-init) --exec--> /sbin/init = this
//!   1. init::prepare    mounts, cgroups, loopback (PID 1 only)
//!   2. config, log      from the kernel command line
//!   3. sandbox          reaper, OOM events, uevents
//!   4. server           ttRPC on vsock, last: what can connect is served
//! ```
//!
//! `kata-agent oci` is the agent's own child that makes containers (`oci`).

mod cgroup;
mod config;
mod container;
mod copy_file;
mod device;
mod error;
mod forward;
mod guest;
mod init;
mod log;
mod mount;
mod namespace;
mod network;
mod oci;
mod oom;
mod process;
mod readiness;
mod reaper;
mod sandbox;
mod server;
mod spec;
mod stats;
mod stdio;
mod storage;

use std::fs;
use std::process::ExitCode;

use config::Config;
use error::{IoContext, Result, chain};
use sandbox::Sandbox;

/// Requests that wait for the kernel run on blocking threads; two are enough for the rest.
const WORKERS: usize = 2;

/// A request that hangs in a dead file system holds a thread.
const MAX_BLOCKING_THREADS: usize = 256;

/// Blocking work is shallow.
const STACK_BYTES: usize = 512 * 1024;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(oci::CHILD_ARGUMENT) {
        return oci::child::main();
    }
    let is_init = std::process::id() == 1;
    let failures = if is_init { init::prepare() } else { Vec::new() };
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let (mut config, malformed) = Config::parse(&cmdline);
    if let Ok(address) = std::env::var("KATA_AGENT_SERVER_ADDR") {
        config.server_address = address;
    }
    log::install(config.log_level, config.log_vport != 0);
    for failure in failures {
        log::warning("init", failure);
    }
    for word in malformed {
        log::warning("config", format!("malformed parameter: {word}"));
    }
    let result = run(config);
    if let Err(error) = &result {
        log::error("agent", chain(error));
    }
    if is_init {
        log::error("agent", chain(&init::power_off()));
        // PID 1 must not end: the kernel would panic.
        loop {
            std::thread::park();
        }
    }
    if result.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(config: Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
        .during("start runtime")?;
    let result = runtime.block_on(async {
        if config.log_vport != 0 {
            tokio::spawn(log::serve(config.log_vport));
        }
        if config.forward_vport != 0 {
            tokio::spawn(forward::serve(config.forward_vport));
        }
        let sandbox = Sandbox::new(config)?;
        server::serve(sandbox).await
    });
    runtime.shutdown_background();
    result
}
