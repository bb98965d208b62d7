//! Storages: what a runtime asks the guest to mount before a container can use it.
//!
//! Counted by mount point: a second storage with the same mount point mounts nothing. The last
//! user's release unmounts; a `shared` one stays until the guest ends. Adding and releasing take
//! turns; the mounting itself happens on blocking threads, since a shared folder may hang.

mod ephemeral;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use protocols::agent::Storage;
use protocols::agent_types::FSGroupChangePolicy;
use tokio::sync::Mutex;

use crate::device::Devices;
use crate::error::{AgentError, IoContext, Result, chain};
use crate::log;
use crate::mount::{Options, TargetKind, absolute, create_directory, mount_at, unmount_at};

/// Driver names, as `GetGuestDetails` lists them.
pub(crate) const DRIVERS: [&str; 9] = [
    "blk",
    "ephemeral",
    "local",
    "mmioblk",
    "nvdimm",
    "overlayfs",
    "scsi",
    "virtio-fs",
    "watchable-bind",
];

#[derive(Default)]
pub(crate) struct StorageTable {
    entries: Mutex<HashMap<PathBuf, Entry>>,
}

struct Entry {
    users: usize,
    is_shared: bool,
    is_mounted: bool,
}

impl StorageTable {
    /// Mounts storages in order and returns their mount points. All or none.
    ///
    /// # Errors
    /// A driver is unknown, a device does not appear, or a mount fails.
    pub(crate) async fn add(
        &self,
        storages: &[Storage],
        devices: &Devices,
    ) -> Result<Vec<PathBuf>> {
        let mut added = Vec::with_capacity(storages.len());
        for storage in storages {
            match self.add_one(storage, devices).await {
                Ok(mount_point) => added.push(mount_point),
                Err(error) => {
                    // Logged; why they are given up is what is to be told.
                    let _ = self.release(&added).await;
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    async fn add_one(&self, storage: &Storage, devices: &Devices) -> Result<PathBuf> {
        let mount_point = absolute(&storage.mount_point)?;
        let mut entries = self.entries.lock().await;
        if let Some(entry) = entries.get_mut(&mount_point) {
            entry.users += 1;
            entry.is_shared |= storage.shared;
            return Ok(mount_point);
        }
        let source = match storage.driver.as_str() {
            "blk" | "mmioblk" | "scsi" | "nvdimm" => {
                let node = devices.block_node(&storage.driver, &storage.source).await?;
                node.to_string_lossy().into_owned()
            }
            _ => storage.source.clone(),
        };
        let storage = storage.clone();
        let (target, is_shared) = (mount_point.clone(), storage.shared);
        let is_mounted = tokio::task::spawn_blocking(move || attach(&storage, &source, &target))
            .await
            .map_err(|_| AgentError::TaskLost)??;
        entries.insert(
            mount_point.clone(),
            Entry {
                users: 1,
                is_shared,
                is_mounted,
            },
        );
        Ok(mount_point)
    }

    /// Gives storages up, last first: all, whatever becomes of each.
    ///
    /// # Errors
    /// The first that could not be unmounted: its disk may have to be written yet. All are logged.
    pub(crate) async fn release(&self, mount_points: &[PathBuf]) -> Result<()> {
        let mut released = Ok(());
        let mut entries = self.entries.lock().await;
        for mount_point in mount_points.iter().rev() {
            let Some(entry) = entries.get_mut(mount_point) else {
                continue;
            };
            entry.users = entry.users.saturating_sub(1);
            if entry.users > 0 || entry.is_shared {
                continue;
            }
            let is_mounted = entry.is_mounted;
            entries.remove(mount_point);
            let target = mount_point.clone();
            let detached = tokio::task::spawn_blocking(move || detach(&target, is_mounted))
                .await
                .unwrap_or(Err(AgentError::TaskLost));
            if let Err(error) = &detached {
                log::warning("storage", chain(error));
            }
            released = released.and(detached);
        }
        released
    }
}

/// Mounts one storage; false: a directory was all it needed.
fn attach(storage: &Storage, source: &str, target: &Path) -> Result<bool> {
    let words = || storage.options.iter().map(String::as_str);
    let is_mounted = match storage.driver.as_str() {
        "virtio-fs" | "overlayfs" | "blk" | "mmioblk" | "scsi" | "nvdimm" | "watchable-bind" => {
            for directory in overlay_directories(&storage.driver_options) {
                create_directory(&absolute(directory)?, 0o755)?;
            }
            let mut options = Options::parse(words())?;
            options.is_bind |= storage.fstype == "bind";
            let is_file = options.is_bind && Path::new(source).is_file();
            let kind = if is_file {
                TargetKind::File
            } else {
                TargetKind::Directory
            };
            mount_at(source, target, &storage.fstype, &options, kind)?;
            true
        }
        "ephemeral" => {
            ephemeral::mount(storage, target)?;
            true
        }
        "local" => {
            ephemeral::make_local(storage, target)?;
            false
        }
        other => {
            return Err(AgentError::invalid("storage driver", other));
        }
    };
    if let Some(group) = storage.fs_group.as_ref() {
        let policy = group.group_change_policy.enum_value_or_default();
        let is_readonly = Options::parse(words())?
            .flags
            .contains(rustix::mount::MountFlags::RDONLY);
        let is_always = policy == FSGroupChangePolicy::Always;
        ephemeral::give_to_group(target, group.group_id, is_readonly, is_always)
            .on("change group of", target)?;
    }
    Ok(is_mounted)
}

fn overlay_directories(driver_options: &[String]) -> impl Iterator<Item = &str> {
    const KEY: &str = "io.katacontainers.volume.overlayfs.create_directory=";
    driver_options
        .iter()
        .filter_map(|option| option.strip_prefix(KEY))
}

fn detach(target: &Path, is_mounted: bool) -> Result<()> {
    if !is_mounted {
        return Ok(());
    }
    unmount_at(target)?;
    if target.is_dir() {
        // Only an empty directory goes; what is in one that lay below belongs to somebody.
        let _ = std::fs::remove_dir(target);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn unknown_driver_is_invalid() {
        let table = StorageTable::default();
        let devices = Devices::start(std::time::Duration::from_millis(1)).unwrap();
        let mut storage = Storage::new();
        storage.driver = "9p".into();
        storage.mount_point = "/run/x".into();
        let result = table.add(&[storage], &devices).await;
        assert!(matches!(result, Err(AgentError::Invalid { .. })));
    }

    #[tokio::test]
    async fn local_storage_is_a_directory_counted_by_its_mount_point() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap().join("a/b");
        let table = StorageTable::default();
        let devices = Devices::start(std::time::Duration::from_millis(1)).unwrap();
        let mut storage = Storage::new();
        storage.driver = "local".into();
        storage.mount_point = path.to_string_lossy().into_owned();
        storage.options = vec!["mode=0777".into()];
        let storages = [storage.clone(), storage];
        let added = table.add(&storages, &devices).await.unwrap();
        assert!(path.is_dir());
        table.release(&added[..1]).await.unwrap();
        assert_eq!(table.entries.lock().await.len(), 1);
        table.release(&added[..1]).await.unwrap();
        assert!(table.entries.lock().await.is_empty());
    }
}
