//! Carries libcontainer's error log to the agent.
//!
//! libcontainer logs the cause of a failure where it happens, often in a process that can only
//! send a short text to its parent. This subscriber sends each error event as a packet; the socket
//! is inherited by every process libcontainer clones. Runs in the child only.

use std::fmt::{self, Write as _};
use std::os::fd::BorrowedFd;

use rustix::net::{SendFlags, send};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::Report;

/// A longer note is cut.
const NOTE_BYTES: usize = 1024;

pub(super) struct NoteSubscriber {
    pub(super) control: BorrowedFd<'static>,
}

impl Subscriber for NoteSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = NoteText::default();
        event.record(&mut text);
        let note = Report::Note(text.join());
        if let Ok(packet) = serde_json::to_vec(&note) {
            // The agent may have stopped listening; the note is then of no use to anybody.
            let _ = send(
                self.control,
                &packet,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct NoteText {
    message: String,
    fields: String,
}

impl NoteText {
    fn join(mut self) -> String {
        if !self.fields.is_empty() {
            // Writing to a string cannot fail.
            let _ = write!(self.message, " ({})", self.fields.trim_start());
        }
        let mut end = NOTE_BYTES.min(self.message.len());
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        self.message.truncate(end);
        self.message
    }
}

impl Visit for NoteText {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}
