//! virtio-fs (virtio 1.2, section 5.11): a host folder, served to the guest by FUSE.
//!
//! ```text
//!   ring ─► device ─► server ─► share ─┬─ nodes     what the guest looked up, one O_PATH each
//!            turns     bytes    FUSE   └─ handles   what the guest opened
//! ```
//!
//! The guest is hostile: every number in a request is checked, what it makes the host hold is
//! bounded, and no request leads out of the folder, because only single names are ever resolved,
//! relative to a descriptor, and no symbolic link is ever followed: the guest does that itself.
//! Data moves between files and guest memory in one system call, and such requests allocate
//! nothing. All of it runs on the I/O thread.
//!
//! Written here rather than taken from fuse-backend-rs, which allocates for each request, changes
//! the whole process's umask, holds as many descriptors as the guest likes, and cannot be
//! restored in another process.

mod attributes;
mod config;
#[cfg(test)]
mod containment_tests;
mod credentials;
mod descriptor_path;
mod device;
mod directories;
mod entries;
mod files;
mod handle;
mod listing;
mod metrics;
#[cfg(test)]
mod mock_guest;
mod node;
mod protocol;
mod reply;
mod request;
mod server;
mod session;
mod share;
mod state;
mod table;
mod xattrs;

pub use config::{CacheMode, FsConfig, FsError};
pub use credentials::prepare_thread;
pub use device::Fs;
