//! Copies between the host's descriptors (FIFOs, pipes, sockets, files) and the standard streams
//! of guest processes. Each is a small state machine inside the agent connection's source.

pub mod fifo;
pub mod pump;
pub mod window;
