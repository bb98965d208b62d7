//! A container's cgroup (v2 only): where it is, limits, freezing, killing, removal.
//!
//! libcontainer makes the group when it makes the container; everything after that is here. All
//! calls touch only cgroupfs; `freeze` may wait and is called on a blocking thread.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use libcontainer::oci_spec::runtime::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{AgentError, IoContext, Result, chain};

pub(crate) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Freezing waits for each task to reach a stop.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);

/// Killed tasks leave the group within this time, or the group stays.
const REMOVE_DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    /// Below the mount point, starting with `/`.
    relative: PathBuf,
}

impl Cgroup {
    /// Reads an OCI cgroups path: cgroupfs form, systemd form (`slice:prefix:name`) or empty.
    ///
    /// # Errors
    /// The path would lead out of the hierarchy, or is its root.
    pub(crate) fn new(cgroups_path: &str, container_id: &str) -> Result<Self> {
        let path = if cgroups_path.is_empty() {
            container_id.to_owned()
        } else {
            cgroups_path.replace(':', "/")
        };
        let mut relative = PathBuf::from("/");
        for component in Path::new(&path).components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => relative.push(name),
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(AgentError::invalid("cgroups path", path));
                }
            }
        }
        if relative == Path::new("/") {
            return Err(AgentError::invalid("cgroups path", path));
        }
        Ok(Self { relative })
    }

    pub(crate) fn relative(&self) -> &Path {
        &self.relative
    }

    pub(crate) fn directory(&self) -> PathBuf {
        let below = self.relative.strip_prefix("/").unwrap_or(&self.relative);
        Path::new(CGROUP_ROOT).join(below)
    }

    /// Where further processes go: a group with inner groups may hold none itself, and a container
    /// that manages its own puts its processes into `init`.
    pub(crate) fn tenant_subgroup(&self) -> Option<String> {
        const INIT: &str = "init";
        self.directory()
            .join(INIT)
            .is_dir()
            .then(|| INIT.to_owned())
    }

    /// Applies limits.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub(crate) fn update(&self, resources: &LinuxResources) -> Result<()> {
        let manager = Manager::new(CGROUP_ROOT.into(), self.relative.clone())
            .map_err(|error| AgentError::Runtime(chain(&error)))?;
        manager
            .apply(&ControllerOpt {
                resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            })
            .map_err(|error| AgentError::Runtime(format!("update cgroup: {}", chain(&error))))
    }

    /// Stops or resumes every process and waits until it is so.
    ///
    /// # Errors
    /// The group is gone, or does not settle in time.
    pub(crate) fn freeze(&self, is_frozen: bool) -> Result<()> {
        let directory = self.directory();
        let wanted = if is_frozen { "1" } else { "0" };
        let control = directory.join("cgroup.freeze");
        fs::write(&control, wanted).on("write", control)?;
        let events = directory.join("cgroup.events");
        let file = fs::File::open(&events).on("open", &events)?;
        let deadline = Instant::now() + FREEZE_DEADLINE;
        loop {
            let text = fs::read_to_string(&events).on("read", &events)?;
            if keyed(&text, "frozen").unwrap_or_default() == u64::from(is_frozen) {
                return Ok(());
            }
            if !wait_for_event(&file, deadline).on("poll", &events)? {
                return Err(AgentError::Timeout {
                    what: "freezing the container",
                });
            }
        }
    }

    /// Kills every process.
    ///
    /// # Errors
    /// The group cannot be written; one that is gone is no failure.
    pub(crate) fn kill(&self) -> Result<()> {
        let control = self.directory().join("cgroup.kill");
        match fs::write(&control, "1") {
            Err(error) if !is_gone(&error) => Err(error).on("write", control),
            _ => Ok(()),
        }
    }

    /// Removes the group and those below it, once their processes are gone.
    ///
    /// # Errors
    /// Processes stay.
    pub(crate) fn remove(&self) -> Result<()> {
        let directory = self.directory();
        let deadline = Instant::now() + REMOVE_DEADLINE;
        loop {
            let Err(error) = remove_tree(&directory) else {
                return Ok(());
            };
            if is_gone(&error) {
                return Ok(());
            }
            let events = directory.join("cgroup.events");
            let is_settled = fs::File::open(&events)
                .and_then(|file| wait_for_event(&file, deadline))
                .unwrap_or(false);
            if !is_settled {
                return Err(error).on("remove", directory);
            }
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn remove_tree(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

/// cgroupfs signals a change of an events file as priority data. A short timeout covers a change
/// between reading and waiting. False: the deadline is over.
fn wait_for_event(file: impl AsFd, deadline: Instant) -> io::Result<bool> {
    const RECHECK: Duration = Duration::from_millis(50);
    let remaining = deadline.saturating_duration_since(Instant::now());
    if remaining.is_zero() {
        return Ok(false);
    }
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(remaining.min(RECHECK).subsec_nanos()),
    };
    let mut fds = [PollFd::new(&file, PollFlags::PRI)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The value of `key` in a file of `key value` lines.
pub(crate) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_path_forms_and_none_are_read() {
        for (path, directory) in [
            ("/default/c1", "/sys/fs/cgroup/default/c1"),
            ("system.slice:cri:c1", "/sys/fs/cgroup/system.slice/cri/c1"),
            ("", "/sys/fs/cgroup/c1"),
        ] {
            let cgroup = Cgroup::new(path, "c1").unwrap();
            assert_eq!(cgroup.directory(), Path::new(directory));
        }
    }

    #[test]
    fn paths_out_of_the_hierarchy_are_refused() {
        for path in ["../x", "/a/../../x", "/", "."] {
            assert!(Cgroup::new(path, "c1").is_err(), "{path}");
        }
    }

    #[test]
    fn keyed_value_is_found_by_its_whole_name() {
        let text = "oom 1\noom_kill 2\nbad\n";
        assert_eq!(keyed(text, "oom_kill"), Some(2));
        assert_eq!(keyed(text, "oom_"), None);
    }
}
