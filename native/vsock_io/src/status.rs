//! Status codes of `google.rpc.Status`, the only error classes that cross the wire and the
//! event port. A peer may send any number, so this is a number with names, not an enum.

use std::fmt;

/// A google.rpc status code; 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub i32);

impl Code {
    /// Success.
    pub const OK: Self = Self(0);
    /// The caller gave up or the thread was closed.
    pub const CANCELLED: Self = Self(1);
    /// No better class is known.
    pub const UNKNOWN: Self = Self(2);
    /// The caller's argument is wrong whatever the state of the system.
    pub const INVALID_ARGUMENT: Self = Self(3);
    /// Time ran out first.
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    /// The named thing does not exist (any more).
    pub const NOT_FOUND: Self = Self(5);
    /// A limit was reached: message size, stream ids, queued bytes.
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    /// Our own bug, or the guest broke the protocol.
    pub const INTERNAL: Self = Self(13);
    /// The other side is gone or never came.
    pub const UNAVAILABLE: Self = Self(14);
    /// Bytes could not be delivered.
    pub const DATA_LOSS: Self = Self(15);

    /// Whether the code means success.
    #[must_use]
    pub fn is_ok(self) -> bool {
        self == Self::OK
    }

    /// The name in google.rpc, if it has one.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "OK",
            1 => "CANCELLED",
            2 => "UNKNOWN",
            3 => "INVALID_ARGUMENT",
            4 => "DEADLINE_EXCEEDED",
            5 => "NOT_FOUND",
            6 => "ALREADY_EXISTS",
            7 => "PERMISSION_DENIED",
            8 => "RESOURCE_EXHAUSTED",
            9 => "FAILED_PRECONDITION",
            10 => "ABORTED",
            11 => "OUT_OF_RANGE",
            12 => "UNIMPLEMENTED",
            13 => "INTERNAL",
            14 => "UNAVAILABLE",
            15 => "DATA_LOSS",
            16 => "UNAUTHENTICATED",
            _ => return None,
        })
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "status {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Code;

    #[test]
    fn unnamed_codes_print_their_number() {
        assert_eq!(Code(99).to_string(), "status 99");
        assert_eq!(Code::DATA_LOSS.to_string(), "DATA_LOSS");
    }
}
