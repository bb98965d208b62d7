//! One container: made, started, executed in, signalled, paused, removed.
//!
//! ```text
//!            create                start              exit of init
//!   (none) ---------> CREATED ----------> RUNNING ------------------> STOPPED
//!                        |               pause | ^ resume                ^
//!                        |                     v |                       |
//!                        |                    PAUSED --------------------+
//!                        +-----------------------------------------------+
//! ```
//!
//! STOPPED is not stored: it is that the first process has exited. `remove` works in every state.
//! Each operation that changes the container runs in a task of its own, so that a runtime that
//! goes away in the middle leaves nothing half done.

mod bundle;
mod create;
mod exec;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use libcontainer::container::{Container as RuntimeContainer, ContainerStatus};
use libcontainer::oci_spec::runtime::LinuxCapabilities;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

pub(crate) use create::create;

use crate::cgroup::Cgroup;
use crate::error::{AgentError, IoContext, Result, chain};
use crate::log;
use crate::oci::{read_failure, start_error};
use crate::process::Process;
use crate::readiness;
use crate::sandbox::Sandbox;
use bundle::Bundle;

/// libcontainer's state, one directory per container.
pub(crate) const STATE_ROOT: &str = "/run/kata-agent/oci";

/// Terminals are handed over through sockets here.
pub(crate) const CONSOLE_DIRECTORY: &str = "/run/kata-agent/console";

/// A started program that neither runs nor fails by then is given up on; hooks run in this time.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Killed processes are gone by then, or the removal goes on without them.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// An exec nobody reads from after its exit was reported is forgotten then.
const UNREAD_GRACE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Created,
    Running,
    Paused,
}

pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) cgroup: Cgroup,
    init: Arc<Process>,
    status: Mutex<Status>,
    execs: Mutex<HashMap<String, ExecEntry>>,
    /// Taken by the start; holds why the program could not be executed.
    failure: Mutex<Option<OwnedFd>>,
    bundle: Bundle,
    storages: Vec<PathBuf>,
    capabilities: Option<LinuxCapabilities>,
    has_seccomp: bool,
}

enum ExecEntry {
    /// The id is taken; the process is being made.
    Starting,
    Live(Arc<Process>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    /// Finds a process; init goes by no id and by the container's.
    ///
    /// # Errors
    /// There is none (any more).
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if self.is_init(exec_id) {
            return Ok(Arc::clone(&self.init));
        }
        match lock(&self.execs).get(exec_id) {
            Some(ExecEntry::Live(process)) => Ok(Arc::clone(process)),
            _ => Err(AgentError::UnknownProcess {
                container: self.id.clone(),
                exec: exec_id.to_owned(),
            }),
        }
    }

    fn is_init(&self, exec_id: &str) -> bool {
        exec_id.is_empty() || exec_id == self.id
    }

    fn state_directory(&self) -> PathBuf {
        PathBuf::from(STATE_ROOT).join(&self.id)
    }

    fn require(&self, allowed: &[Status], operation: &'static str) -> Result<()> {
        let status = *lock(&self.status);
        let state = match status {
            _ if self.init.has_exited() => "stopped",
            _ if allowed.contains(&status) => return Ok(()),
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
        };
        Err(AgentError::State {
            id: self.id.clone(),
            state,
            operation,
        })
    }

    /// Lets the first process execute its program, and waits until it does.
    ///
    /// # Errors
    /// It was started before, or the program cannot be executed.
    pub(crate) async fn start(&self) -> Result<()> {
        self.require(&[Status::Created], "start")?;
        let failure = lock(&self.failure).take().ok_or(AgentError::State {
            id: self.id.clone(),
            state: "starting",
            operation: "start",
        })?;
        self.release().await?;
        *lock(&self.status) = Status::Running;
        self.save_running().await?;
        match timeout(START_DEADLINE, wait_for_exec(failure)).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(text))) => Err(start_error(&text)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(AgentError::Timeout {
                what: "executing the program",
            }),
        }
    }

    /// libcontainer's init waits for a connection.
    async fn release(&self) -> Result<()> {
        // Through the directory's descriptor: a socket's path has 107 bytes at most.
        let directory =
            std::fs::File::open(self.state_directory()).on("open", self.state_directory())?;
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&directory);
        let path = format!("/proc/self/fd/{descriptor}/notify.sock");
        let mut stream = UnixStream::connect(path)
            .await
            .during("release container")?;
        stream
            .write_all(b"start container")
            .await
            .during("release container")
    }

    /// libcontainer executes only in what its own state calls running.
    async fn save_running(&self) -> Result<()> {
        let directory = self.state_directory();
        let saved = tokio::task::spawn_blocking(move || {
            RuntimeContainer::load(directory)
                .and_then(|mut container| container.set_status(ContainerStatus::Running).save())
        });
        match saved.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(AgentError::Runtime(chain(&error))),
            Err(_) => Err(AgentError::TaskLost),
        }
    }

    /// Sends a signal to one process; SIGKILL without an exec id goes to all.
    ///
    /// # Errors
    /// There is no such process or signal.
    pub(crate) fn signal(&self, exec_id: &str, signal: u32) -> Result<()> {
        if exec_id.is_empty() && signal == libc::SIGKILL.cast_unsigned() {
            return self.cgroup.kill();
        }
        let process = self.process(exec_id)?;
        process.signal(signal, self.is_init(exec_id))
    }

    /// Stops or resumes all processes.
    ///
    /// # Errors
    /// The container is in another state, or does not settle.
    pub(crate) async fn pause(&self, is_pause: bool) -> Result<()> {
        let (allowed, next, operation): (&[Status], _, _) = if is_pause {
            (&[Status::Created, Status::Running], Status::Paused, "pause")
        } else {
            (&[Status::Paused], Status::Running, "resume")
        };
        self.require(allowed, operation)?;
        let cgroup = self.cgroup.clone();
        tokio::task::spawn_blocking(move || cgroup.freeze(is_pause))
            .await
            .map_err(|_| AgentError::TaskLost)??;
        *lock(&self.status) = next;
        Ok(())
    }

    /// Forgets an exec whose exit was reported and whose output was read to the end.
    pub(crate) fn release_exec(&self, exec_id: &str, process: &Arc<Process>) {
        if process.idle_since().is_some() && process.stdio.is_drained() {
            self.forget_exec(exec_id, process);
        }
    }

    fn forget_exec(&self, exec_id: &str, process: &Arc<Process>) {
        let mut execs = lock(&self.execs);
        // The id may belong to a newer process by now.
        if matches!(execs.get(exec_id), Some(ExecEntry::Live(live)) if Arc::ptr_eq(live, process)) {
            execs.remove(exec_id);
        }
    }

    /// After the report of an exec's exit: keeps its unread output for a while.
    pub(crate) fn keep_output(self: &Arc<Self>, exec_id: &str, process: &Arc<Process>) {
        if self.is_init(exec_id) {
            return;
        }
        self.release_exec(exec_id, process);
        let container = Arc::downgrade(self);
        let process = Arc::downgrade(process);
        let exec_id = exec_id.to_owned();
        tokio::spawn(async move {
            loop {
                let Some(idle) = process.upgrade().and_then(|process| process.idle_since()) else {
                    return;
                };
                let Some(remaining) = UNREAD_GRACE.checked_sub(idle.elapsed()) else {
                    if let (Some(container), Some(process)) =
                        (container.upgrade(), process.upgrade())
                    {
                        container.forget_exec(&exec_id, &process);
                    }
                    return;
                };
                tokio::time::sleep(remaining).await;
            }
        });
    }

    /// Ends what runs and frees what the container held. Never stops halfway: what cannot be freed
    /// is logged and left.
    ///
    /// # Errors
    /// Something may still use the storages.
    pub(crate) async fn remove(&self, sandbox: &Sandbox) -> Result<()> {
        if let Err(error) = self.cgroup.kill() {
            log::warning("container", chain(&error));
        }
        // A frozen group dies only after a thaw on some kernels; a removed file is fine too.
        let _ = std::fs::write(self.cgroup.directory().join("cgroup.freeze"), "0");
        let mut processes = vec![Arc::clone(&self.init)];
        for (_, entry) in lock(&self.execs).drain() {
            if let ExecEntry::Live(process) = entry {
                processes.push(process);
            }
        }
        let exits = async {
            for process in &processes {
                process.wait().await;
            }
        };
        let ended = timeout(KILL_DEADLINE, exits)
            .await
            .map_err(|_elapsed| AgentError::Timeout {
                what: "the end of a process",
            });
        if let Err(error) = &ended {
            log::warning("container", format!("{}: {}", self.id, chain(error)));
        }
        sandbox.oom.forget(&self.id);
        let (cgroup, bundle, state) = (
            self.cgroup.clone(),
            self.bundle.clone(),
            self.state_directory(),
        );
        let freed = tokio::task::spawn_blocking(move || {
            free(&cgroup, &bundle, &state);
        });
        // A panic is the only failure, and panics end the agent.
        let _ = freed.await;
        ended.and(sandbox.storages.release(&self.storages).await)
    }
}

fn free(cgroup: &Cgroup, bundle: &Bundle, state: &std::path::Path) {
    for result in [
        cgroup.remove(),
        bundle.remove(),
        std::fs::remove_dir_all(state).on("remove", state),
    ] {
        if let Err(error) = result {
            log::warning("container", chain(&error));
        }
    }
}

/// End of file when the program runs, a text when it does not.
async fn wait_for_exec(failure: OwnedFd) -> Result<Option<String>> {
    let failure = readiness::watch(failure).during("watch failure pipe")?;
    loop {
        let mut ready = failure.readable().await.during("wait for program")?;
        let mut byte = [0_u8; 4096];
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut byte)?)) {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(length)) => {
                let text = byte.get(..length).unwrap_or_default();
                return Ok(Some(String::from_utf8_lossy(text).into_owned()));
            }
            Ok(Err(error)) => return Err(error).during("read failure pipe"),
            Err(_would_block) => {}
        }
    }
}

/// What a process that was made says about its program, if anything.
fn failed_text(failure: &OwnedFd) -> Option<String> {
    read_failure(failure.as_fd())
}
