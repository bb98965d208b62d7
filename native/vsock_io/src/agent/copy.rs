//! A copy of a standard stream as its connection keeps it: in either direction, with the token
//! of the event that reports its end.
//!
//! [`AgentSource`](super::source::AgentSource) drives the copies on the I/O thread; a copy that
//! could not be given to it is completed by whoever noticed.

use std::collections::HashMap;

use crate::event::{Completion, Value};
use crate::reactor::{Context, ReactorHandle};
use crate::status::Code;
use crate::stdio::pump::{InputCopy, Link, Outcome, OutputCopy, Reply};

/// A running copy.
pub(super) struct Copy {
    pub(super) token: u64,
    pub(super) pump: Pump,
}

/// The two directions.
pub(super) enum Pump {
    Output(OutputCopy),
    Input(InputCopy),
}

impl Pump {
    pub(super) fn start(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.start(link),
            Self::Input(copy) => copy.start(link),
        }
    }

    pub(super) fn reply(&mut self, reply: Reply<'_>, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.reply(reply, link),
            Self::Input(copy) => copy.reply(reply, link),
        }
    }

    pub(super) fn ready(&mut self, link: &mut Link<'_, '_>) -> Option<Outcome> {
        match self {
            Self::Output(copy) => copy.ready(link),
            Self::Input(copy) => copy.ready(link),
        }
    }

    pub(super) fn stop(&mut self, code: Code, message: &str) -> Outcome {
        match self {
            Self::Output(copy) => copy.stop(code, message),
            Self::Input(copy) => copy.stop(code, message),
        }
    }
}

/// Close the copy's descriptor, then report, so that the receiver finds it closed.
pub(super) fn finish(
    copies: &mut HashMap<u64, Copy>,
    id: u64,
    outcome: Option<Outcome>,
    context: &mut Context<'_>,
) {
    if let Some(outcome) = outcome
        && let Some(Copy { token, pump }) = copies.remove(&id)
    {
        context.unwatch(id);
        drop(pump);
        complete(context.registry().handle(), token, outcome);
    }
}

/// Report the end of a copy.
pub(super) fn complete(handle: &ReactorHandle, token: u64, outcome: Outcome) {
    let Outcome {
        code,
        message,
        count,
    } = outcome;
    handle.sink().complete(Completion {
        token,
        code,
        value: Value::Count(count),
        message,
    });
}

/// The end of a copy that moved nothing.
pub(super) fn not_started(code: Code, message: String) -> Outcome {
    Outcome {
        code,
        message,
        count: 0,
    }
}
