//! ttRPC, the agent's protocol: frames, the few messages coded by hand, and the book-keeping of
//! requests in flight. [`crate::agent`] drives these on the I/O thread.

pub mod client;
pub mod frame;
pub mod message;
