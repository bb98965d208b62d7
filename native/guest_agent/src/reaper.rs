//! The one place where children are waited for.
//!
//! As PID 1 (or child subreaper) the agent inherits every orphan. A single task, woken by SIGCHLD,
//! reaps everything and hands statuses to whoever registered the pid; the rest were orphans.
//! Nothing else may call wait, or a status is stolen. Spawning holds the reaper's lock, so a child
//! that ends at once is registered before it can be reaped.

use std::collections::HashMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::process::{Pid, WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::log;

/// How a process ended: its exit code, or 128 and the signal, and when it was seen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exit {
    pub(crate) status: i32,
    pub(crate) at: Instant,
}

/// `None` while the process runs.
pub(crate) type ExitReceiver = watch::Receiver<Option<Exit>>;

#[derive(Default)]
pub(crate) struct Reaper {
    waiters: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Becomes the subreaper and starts reaping on the current runtime.
    ///
    /// # Errors
    /// The signal handler or the subreaper attribute cannot be set.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let mut signals = signal(SignalKind::child())?;
        let reaper = Arc::new(Self::default());
        let task = Arc::clone(&reaper);
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                task.reap();
            }
        });
        Ok(reaper)
    }

    /// Spawns a child of the agent itself and returns its pid and exit.
    ///
    /// # Errors
    /// The child cannot be started.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(i32, ExitReceiver)> {
        let mut waiters = self.lock();
        // Dropped without a wait: the exit is collected by `reap`.
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        Ok((pid, Self::insert(&mut waiters, pid)))
    }

    /// Registers a process that is not yet the agent's child, but will be.
    pub(crate) fn adopt(&self, pid: i32) -> ExitReceiver {
        Self::insert(&mut self.lock(), pid)
    }

    fn insert(waiters: &mut HashMap<i32, watch::Sender<Option<Exit>>>, pid: i32) -> ExitReceiver {
        let (sender, receiver) = watch::channel(None);
        waiters.insert(pid, sender);
        receiver
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) {
        let mut waiters = self.lock();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let code = status
                .exit_status()
                .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
            let Some(code) = code else { continue };
            let pid = Pid::as_raw(Some(pid));
            if let Some(sender) = waiters.remove(&pid) {
                sender.send_replace(Some(Exit {
                    status: code,
                    at: Instant::now(),
                }));
            } else {
                log::debug("reaper", format!("orphan {pid} ended with {code}"));
            }
        }
    }
}

/// Waits for the exit; a lost sender counts as killed, since nobody can tell any more.
pub(crate) async fn exited(receiver: &mut ExitReceiver) -> Exit {
    match receiver.wait_for(Option::is_some).await {
        Ok(value) => value.unwrap_or_else(lost_exit),
        Err(_) => lost_exit(),
    }
}

fn lost_exit() -> Exit {
    Exit {
        status: 255,
        at: Instant::now(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn child_status_reaches_its_spawner() {
        let reaper = Reaper::start().unwrap();
        let (_, mut exit) = reaper
            .spawn(Command::new("/bin/sh").args(["-c", "exit 7"]))
            .unwrap();
        let exit = tokio::time::timeout(Duration::from_secs(10), exited(&mut exit)).await;
        assert_eq!(exit.unwrap().status, 7);
    }
}
