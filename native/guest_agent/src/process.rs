//! One process of a container: its pid, its exit, its streams.
//!
//! Created by `container`; requests hold it by `Arc`, so a blocked read outlives the entry it was
//! found by. The streams stay readable after the exit was reported (`wait-keeps-output`).

use std::fs;
use std::sync::Mutex;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{AgentError, IoContext, Result};
use crate::reaper::{Exit, ExitReceiver, exited};
use crate::stdio::ProcessStdio;

pub(crate) struct Process {
    pub(crate) pid: i32,
    exit: ExitReceiver,
    pub(crate) stdio: ProcessStdio,
    /// When the exit was reported, or the output last read after that.
    reported: Mutex<Option<Instant>>,
}

impl Process {
    pub(crate) fn new(pid: i32, exit: ExitReceiver, stdio: ProcessStdio) -> Self {
        Self {
            pid,
            exit,
            stdio,
            reported: Mutex::new(None),
        }
    }

    pub(crate) fn exit(&self) -> &ExitReceiver {
        &self.exit
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Waits for the exit; any number may.
    pub(crate) async fn wait(&self) -> Exit {
        let exit = exited(&mut self.exit.clone()).await;
        self.touch_reported(true);
        exit
    }

    /// Output was read: somebody still wants it.
    pub(crate) fn note_read(&self) {
        self.touch_reported(false);
    }

    fn touch_reported(&self, is_report: bool) {
        let mut reported = lock(&self.reported);
        if is_report || reported.is_some() {
            *reported = Some(Instant::now());
        }
    }

    /// Since when nobody asked for anything after the exit was reported.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        *lock(&self.reported)
    }

    /// Sends `signal`; a process that is gone is no failure. The first process of a pid namespace
    /// ignores what it has no handler for, so `is_init` turns such a SIGTERM into a SIGKILL.
    ///
    /// # Errors
    /// The number is no signal, or the kernel refuses it.
    pub(crate) fn signal(&self, signal: u32, is_init: bool) -> Result<()> {
        if self.has_exited() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid)
            .ok_or_else(|| AgentError::invalid("pid", self.pid.to_string()))?;
        let number = i32::try_from(signal).unwrap_or(i32::MAX);
        if number == 0 {
            return accept_gone(rustix::process::test_kill_process(pid));
        }
        let is_term = number == Signal::TERM.as_raw();
        let number = if is_init && is_term && !self.handles(number) {
            Signal::KILL.as_raw()
        } else {
            number
        };
        if !(1..=libc::SIGRTMAX()).contains(&number) {
            return Err(AgentError::invalid("signal", signal.to_string()));
        }
        // SAFETY: any number the kernel accepts may be sent to another process; the C library's own
        // real-time signals are no concern across processes.
        let signal = unsafe { Signal::from_raw_unchecked(number) };
        accept_gone(kill_process(pid, signal))
    }

    /// Whether the process blocks, ignores or catches a signal.
    fn handles(&self, number: i32) -> bool {
        // Unreadable means gone, and then it does not matter.
        fs::read_to_string(format!("/proc/{}/status", self.pid))
            .is_ok_and(|status| is_handled(&status, number))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn accept_gone(result: rustix::io::Result<()>) -> Result<()> {
    match result {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).during("send signal"),
    }
}

fn is_handled(status: &str, number: i32) -> bool {
    let bit = 1_u64 << (number - 1).clamp(0, 63);
    status.lines().any(|line| {
        line.split_once(':').is_some_and(|(key, mask)| {
            matches!(key, "SigBlk" | "SigIgn" | "SigCgt")
                && u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & bit != 0)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handled_signals_are_read_from_every_mask() {
        for key in ["SigBlk", "SigIgn", "SigCgt"] {
            let status = format!("Name:\tx\n{key}:\t0000000000004000\n");
            assert!(is_handled(&status, libc::SIGTERM));
            assert!(!is_handled(&status, libc::SIGINT));
        }
        assert!(!is_handled("SigPnd:\t0000000000004000\n", libc::SIGTERM));
    }

    #[test]
    fn garbage_status_handles_nothing() {
        assert!(!is_handled("SigCgt:\tzz\nSigCgt\n", libc::SIGTERM));
    }
}
