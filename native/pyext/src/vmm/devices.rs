//! Devices of a machine, from what Python says of them. Making one opens files, so it happens
//! detached from the interpreter; what is opened belongs to the machine once it is added.

use std::path::PathBuf;

use vmm_core::virtio::device::VirtioDevice;
use vmm_core::virtio::fs::{CacheMode, Fs, FsConfig};

use crate::errors::NativeError;

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

/// A shared folder.
pub(super) fn folder(
    tag: String,
    folder: PathBuf,
    cache: CacheMode,
    is_read_only: bool,
) -> Result<Box<dyn VirtioDevice>, NativeError> {
    let device = Fs::new(FsConfig {
        cache,
        is_read_only,
        ..FsConfig::new(tag, folder)
    })?;
    Ok(Box::new(device))
}
