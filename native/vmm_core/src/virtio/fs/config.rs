//! What a shared folder is to be, checked before there is a device.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::protocol::{TAG_SIZE, open_reply};

/// How long the guest may trust what it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Not at all: each access asks, and data is not kept. For folders the host writes too.
    Never,
    /// Names and attributes for a second, data until a file is opened again or was changed.
    #[default]
    Auto,
    /// Until memory is short. For folders that only this guest writes.
    Always,
}

impl CacheMode {
    /// How long names and attributes are good for.
    pub(super) fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }

    /// `FOPEN_*` of files.
    pub(super) fn file_flags(self) -> u32 {
        match self {
            Self::Never => open_reply::DIRECT_IO | open_reply::PARALLEL_DIRECT_WRITES,
            Self::Auto => 0,
            Self::Always => open_reply::KEEP_CACHE,
        }
    }

    /// `FOPEN_*` of directories.
    pub(super) fn directory_flags(self) -> u32 {
        match self {
            Self::Never | Self::Auto => 0,
            Self::Always => open_reply::KEEP_CACHE | open_reply::CACHE_DIR,
        }
    }
}

/// A folder to share.
#[derive(Clone, Debug)]
pub struct FsConfig {
    /// What the guest mounts it by: 1 to 36 bytes.
    pub tag: String,
    /// The folder. Mounts made below it later are seen.
    pub folder: PathBuf,
    /// What the guest may keep.
    pub cache: CacheMode,
    /// Refuse every change.
    pub is_read_only: bool,
    /// Entries of each queue: a power of two.
    pub queue_size: u16,
}

impl FsConfig {
    /// A writable folder with the usual queue.
    pub fn new(tag: impl Into<String>, folder: impl Into<PathBuf>) -> Self {
        Self {
            tag: tag.into(),
            folder: folder.into(),
            cache: CacheMode::default(),
            is_read_only: false,
            queue_size: 1024,
        }
    }

    /// Check what needs no system call.
    pub(super) fn check(&self) -> Result<(), FsError> {
        if self.tag.is_empty() || self.tag.len() > TAG_SIZE || self.tag.contains('\0') {
            return Err(FsError::Tag(self.tag.clone()));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size > virtio_core::ring::MAX_SIZE {
            return Err(FsError::QueueSize(self.queue_size));
        }
        Ok(())
    }
}

/// Why a folder cannot be shared.
#[derive(Debug, Error)]
pub enum FsError {
    /// a tag the configuration space cannot hold
    #[error("tag {0:?}: 1 to {TAG_SIZE} bytes, none of them zero")]
    Tag(String),
    /// a queue size that is none
    #[error("queue of {0} entries: a power of two up to {max}", max = virtio_core::ring::MAX_SIZE)]
    QueueSize(u16),
    /// the folder is missing, or may not be entered
    #[error("share folder {folder}", folder = folder.display())]
    Folder {
        /// What was to be shared.
        folder: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// the path is of something else
    #[error("share folder {folder}: not a directory", folder = folder.display())]
    NotDirectory {
        /// What was to be shared.
        folder: PathBuf,
    },
}

impl FsError {
    /// For `map_err` on opening the folder.
    pub(super) fn folder(folder: &Path, errno: Errno) -> Self {
        let folder = folder.to_path_buf();
        match errno {
            Errno::NOTDIR => Self::NotDirectory { folder },
            errno => Self::Folder {
                folder,
                source: errno.into(),
            },
        }
    }
}
