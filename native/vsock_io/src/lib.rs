//! Talking to the guest from the host: dialling, the agent's ttRPC client, stdio copies between
//! FIFOs and the agent, and a vsock device served to another process's machine (vhost-user).
//!
//! Everything runs on one thread, `vsock-io`, which [`reactor::Reactor`] owns: it waits in epoll
//! and calls the [`reactor::Source`]s registered with it. Other threads post commands; results
//! leave as [`event::Completion`]s through the [`event::EventSink`] the owner passed in. Nothing
//! here knows of Python, containers or the machine monitor. What comes from the guest is
//! hostile: it is length-checked before anything is allocated, and a malformed message ends a
//! request or a connection, never the thread.

#![deny(unsafe_code)]

pub mod address;
pub mod agent;
pub mod dial;
pub mod event;
pub mod hybrid;
pub mod reactor;
pub mod relay;
pub mod status;
pub mod stdio;
mod thread;
pub mod ttrpc;
pub mod vhost_user;
