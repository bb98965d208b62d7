//! What a machine reports by itself, as events on the port.
//!
//! ```text
//!   vmm-io ── exited ──▶ exit kept here, then one event of `exited_token` ─┐
//!   any    ── warning ─▶ events of `log_token`, bounded and counted ───────┴─▶ port ─▶ Python
//! ```
//!
//! Called on threads of the machine, which never attach to the interpreter. The exit's token gets
//! its event whatever happens: also when the machine never ran.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_core::event::{VmEvents, VmExit};
use vsock_io::event::{Completion, EventQueue, EventSink, Value};
use vsock_io::status::Code;

/// Reports of one machine.
pub(super) struct Reports {
    queue: Arc<EventQueue>,
    exited_token: u64,
    log_token: Option<u64>,
    exit: OnceLock<VmExit>,
    is_told: AtomicBool,
}

impl Reports {
    pub(super) fn new(queue: Arc<EventQueue>, exited_token: u64, log_token: Option<u64>) -> Self {
        Self {
            queue,
            exited_token,
            log_token,
            exit: OnceLock::new(),
            is_told: AtomicBool::new(false),
        }
    }

    /// How it ended, if it has.
    pub(super) fn exit(&self) -> Option<&VmExit> {
        self.exit.get()
    }

    /// It ended without having run.
    pub(super) fn never_ran(&self, why: &str) {
        let completion = Completion::failed(self.exited_token, Code::CANCELLED, why);
        self.tell(completion);
    }

    fn tell(&self, completion: Completion) {
        if !self.is_told.swap(true, Ordering::AcqRel) {
            self.queue.complete(completion);
        }
    }
}

impl VmEvents for Reports {
    fn exited(&self, exit: &VmExit) {
        // Before the event: whoever gets it asks for the reason.
        let _first = self.exit.set(exit.clone());
        self.tell(Completion::ok(self.exited_token, Value::None));
    }

    fn warning(&self, text: &str) {
        if let Some(token) = self.log_token {
            self.queue.log(token, text);
        }
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        self.never_ran("the machine was given up");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(queue: &EventQueue) -> Vec<(u64, Code)> {
        let events = queue.drain().into_iter();
        events.map(|event| (event.token, event.code)).collect()
    }

    #[test]
    fn an_exit_is_told_once_and_kept() {
        let queue = Arc::new(EventQueue::new(0).unwrap());
        let reports = Reports::new(Arc::clone(&queue), 5, None);
        reports.exited(&VmExit::Reset);
        reports.never_ran("not true any more");
        assert_eq!(reports.exit(), Some(&VmExit::Reset));
        drop(reports);
        assert_eq!(tokens(&queue), [(5, Code::OK)]);
    }

    #[test]
    fn a_machine_that_never_ran_is_told_as_well() {
        let queue = Arc::new(EventQueue::new(0).unwrap());
        drop(Reports::new(Arc::clone(&queue), 5, None));
        assert_eq!(tokens(&queue), [(5, Code::CANCELLED)]);
    }

    #[test]
    fn warnings_have_a_token_of_their_own() {
        let queue = Arc::new(EventQueue::new(0).unwrap());
        let reports = Reports::new(Arc::clone(&queue), 5, Some(6));
        reports.warning("odd");
        assert_eq!(tokens(&queue), [(6, Code::OK)]);
    }
}
