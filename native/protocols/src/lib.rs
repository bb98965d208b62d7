//! Messages of the Kata agent protocol, generated from `proto/kata_hybrid/protos/`.
//!
//! The host side uses only the messages; the guest agent turns on the feature `server`, which adds
//! the asynchronous service traits and their registration. Nothing here is written by hand, so
//! nothing here decides anything: meaning is given to messages by the crates that use them.

#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated; the .proto files are the documentation"
)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
    #[cfg(feature = "server")]
    include!(concat!(env!("OUT_DIR"), "/services.rs"));
}

pub use messages::{agent, agent_types, csi, health, oci};
#[cfg(feature = "server")]
pub use messages::{agent_ttrpc, health_ttrpc};
pub use protobuf::well_known_types::empty;
