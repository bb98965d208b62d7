//! Devices of a machine, from what Python says of them. Making one opens files, so it happens
//! detached from the interpreter; what is opened belongs to the machine once it is added.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::FromPyObject;
use vmm_core::rate_limiter::RateLimiterConfig;
use vmm_core::virtio::balloon::{Balloon, BalloonConfig, BalloonControl};
use vmm_core::virtio::block::{Block, BlockConfig, EngineChoice};
use vmm_core::virtio::device::VirtioDevice;
use vmm_core::virtio::fs::{CacheMode, Fs, FsConfig};
use vmm_core::virtio::net::{Net, NetConfig, TapSource};
use vmm_core::virtio::rng::Rng;
use vmm_core::virtio::vsock::{Vsock, VsockConfig};

use crate::convert::take_fd;
use crate::errors::{MachineError, NativeError};

pub(super) type Device = Box<dyn VirtioDevice>;

/// Letters of disk names: `vda` to `vdz`; a machine has room for fewer.
const LETTERS: std::ops::RangeInclusive<char> = 'a'..='z';

/// The other end of a network card.
#[derive(FromPyObject)]
pub(super) enum Tap {
    /// A tap's name.
    Name(String),
    /// Open queues of one, given away.
    Fds(Vec<RawFd>),
}

impl Tap {
    /// Take over what is given.
    ///
    /// # Errors
    /// A number is no open descriptor; those before it are closed.
    pub(super) fn take(self) -> Result<TapSource, NativeError> {
        Ok(match self {
            Self::Name(name) => TapSource::Name(name),
            Self::Fds(fds) => {
                TapSource::Fds(fds.into_iter().map(take_fd).collect::<Result<_, _>>()?)
            }
        })
    }
}

/// Who does the I/O of a disk, by its word.
fn engine(word: &str) -> Result<EngineChoice, NativeError> {
    match word {
        "auto" => Ok(EngineChoice::Auto),
        "io_uring" => Ok(EngineChoice::Uring),
        "sync" => Ok(EngineChoice::Sync),
        _ => Err(NativeError::Word {
            argument: "engine",
            allowed: "auto, io_uring, sync",
            given: word.to_owned(),
        }),
    }
}

/// What the guest may keep of a folder, by its word.
pub(super) fn cache_mode(word: &str) -> Result<CacheMode, NativeError> {
    match word {
        "never" => Ok(CacheMode::Never),
        "auto" => Ok(CacheMode::Auto),
        "always" => Ok(CacheMode::Always),
        _ => Err(NativeError::Word {
            argument: "cache",
            allowed: "never, auto, always",
            given: word.to_owned(),
        }),
    }
}

/// Where a Linux guest finds the disk that has `before` others before it.
pub(super) fn disk_node(before: usize) -> String {
    let letter = LETTERS.clone().nth(before).unwrap_or(*LETTERS.end());
    format!("/dev/vd{letter}")
}

/// How a disk is to be.
///
/// # Errors
/// The engine is another word.
pub(super) fn disk_config(
    id: String,
    path: PathBuf,
    is_read_only: bool,
    is_direct: bool,
    engine: &str,
    rate_limiter: Option<RateLimiterConfig>,
) -> Result<BlockConfig, NativeError> {
    Ok(BlockConfig {
        id,
        path,
        is_read_only,
        is_direct,
        engine: self::engine(engine)?,
        rate_limiter,
    })
}

/// A device that disks come into.
pub(super) fn disk_slot(name: String) -> Result<Device, MachineError> {
    Ok(Box::new(Block::slot(name)?))
}

/// A disk.
pub(super) fn disk(config: BlockConfig) -> Result<Device, MachineError> {
    Ok(Box::new(Block::new(config)?))
}

/// A shared folder.
pub(super) fn folder(
    tag: String,
    folder: PathBuf,
    cache: CacheMode,
    is_read_only: bool,
) -> Result<Device, MachineError> {
    Ok(Box::new(Fs::new(FsConfig {
        cache,
        is_read_only,
        ..FsConfig::new(tag, folder)
    })?))
}

/// A socket device.
pub(super) fn vsock(path: PathBuf, guest_cid: u64) -> Result<Device, MachineError> {
    Ok(Box::new(Vsock::new(VsockConfig { guest_cid, path })?))
}

/// A network card.
pub(super) fn net(config: NetConfig) -> Result<Device, MachineError> {
    Ok(Box::new(Net::new(config)?))
}

/// An entropy device.
pub(super) fn rng(limits: &RateLimiterConfig) -> Result<Device, MachineError> {
    Ok(Box::new(Rng::new(limits).map_err(MachineError::Rng)?))
}

/// A balloon, and what controls it.
pub(super) fn balloon(config: BalloonConfig) -> (Device, Arc<BalloonControl>) {
    let (balloon, control) = Balloon::new(config);
    (Box::new(balloon), control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_in_the_order_they_come() {
        let names: Vec<String> = [0, 1, 25, 26].into_iter().map(disk_node).collect();
        assert_eq!(names, ["/dev/vda", "/dev/vdb", "/dev/vdz", "/dev/vdz"]);
    }
}
