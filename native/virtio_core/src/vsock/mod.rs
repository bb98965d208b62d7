//! The socket device (virtio 1.2, section 5.10) with the host's end on Unix sockets, for whichever
//! transport brings the rings: the built-in machine's own, or vhost-user.
//!
//! [`hybrid::HybridVsock`] is the device without its registers; it is told when to look and given
//! the rings to look at. Layers, from the protocol up:
//!
//! - `packet`, `credit`, `connection`, `handshake`: pure values;
//! - `endpoint`, `table`, `muxer`: host sockets and the connections between them and the guest;
//! - `receive`, `exchange`: packets onto and off the rings;
//! - `listener`, `hybrid`: the sockets by which host processes come in, and turns.
//!
//! All of it runs on one thread, which never blocks in it.

pub mod connection;
pub mod credit;
pub mod endpoint;
pub mod exchange;
pub mod handshake;
pub mod hybrid;
pub mod listener;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod muxer;
pub mod packet;
pub mod receive;
pub mod table;

/// The ring of buffers for the guest to receive in (virtio 1.2, 5.10.2).
pub const RX_QUEUE: usize = 0;
/// The ring of packets from the guest.
pub const TX_QUEUE: usize = 1;
/// The ring of buffers for events.
pub const EVENT_QUEUE: usize = 2;
/// rx, tx and event.
pub const QUEUE_COUNT: usize = 3;
