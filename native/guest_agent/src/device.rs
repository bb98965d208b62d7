//! Devices of the guest: from the runtime's name of a device to its node.
//!
//! A device may have been there since boot, so sysfs is read first; then kernel uevents wake the
//! next look, until the hot-plug timeout. One task reads the uevent socket.

mod pci;
mod uevent;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocols::agent::Device;
use protocols::oci;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::error::{AgentError, IoContext, Result};
use crate::mount::absolute;
pub(crate) use pci::PciPath;

/// Between two looks at a device that is not ready.
const READY_PAUSE: Duration = Duration::from_millis(2);

pub(crate) struct Devices {
    timeout: Duration,
    /// Counts uevents.
    events: watch::Receiver<u64>,
}

impl Devices {
    /// Starts listening for uevents, on the current runtime.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub(crate) fn start(timeout: Duration) -> Result<Arc<Self>> {
        let events = uevent::listen().during("listen for uevents")?;
        Ok(Arc::new(Self { timeout, events }))
    }

    /// Looks until it finds, or the hot-plug timeout is over.
    ///
    /// # Errors
    /// It does not appear in time.
    pub(crate) async fn wait_for<T>(
        &self,
        what: &str,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.timeout;
        let mut events = self.events.clone();
        loop {
            // Marked first, so that an event during the look starts another.
            events.mark_unchanged();
            if let Some(found) = look() {
                return Ok(found);
            }
            if !matches!(timeout_at(deadline, events.changed()).await, Ok(Ok(()))) {
                return Err(AgentError::DeviceTimeout {
                    what: what.to_owned(),
                    seconds: self.timeout.as_secs(),
                });
            }
        }
    }

    /// The node of a block device, given as its driver names it.
    ///
    /// # Errors
    /// The name is malformed, or the device does not appear.
    pub(crate) async fn block_node(&self, driver: &str, source: &str) -> Result<PathBuf> {
        let node = self.find_block_node(driver, source).await?;
        // A disk may have come into a device that was there and empty, which no event tells; and a
        // device's node is there before the device can be opened.
        let deadline = Instant::now() + self.timeout;
        while is_empty(&node) || !opens(&node).await {
            if Instant::now() >= deadline {
                return Err(AgentError::DeviceTimeout {
                    what: source.to_owned(),
                    seconds: self.timeout.as_secs(),
                });
            }
            sleep(READY_PAUSE).await;
        }
        Ok(node)
    }

    async fn find_block_node(&self, driver: &str, source: &str) -> Result<PathBuf> {
        if source.starts_with("/dev/") {
            let node = absolute(source)?;
            return self
                .wait_for(source, || is_block(&node).then(|| node.clone()))
                .await;
        }
        match driver {
            "blk" => {
                let path = PciPath::parse(source)?;
                self.wait_for(source, || path.find_block(Path::new("/sys")))
                    .await
            }
            "scsi" => {
                let address = scsi_address(source)?;
                scan_scsi(address);
                let look = || find_scsi(Path::new("/sys/class/block"), address);
                self.wait_for(source, look).await
            }
            _ => Err(AgentError::invalid(
                "device",
                format!("{driver} {source:?}"),
            )),
        }
    }
}

/// Whether the kernel knows no sector of a block device.
fn is_empty(node: &Path) -> bool {
    let Some(name) = node.file_name() else {
        return false;
    };
    let size = Path::new("/sys/class/block").join(name).join("size");
    fs::read_to_string(size).is_ok_and(|sectors| sectors.trim() == "0")
}

/// Whether there is a device for a node; any other error is told by who uses it.
async fn opens(node: &Path) -> bool {
    let node = node.to_owned();
    // The first to open a disk waits for its partitions to be read.
    let opened = tokio::task::spawn_blocking(move || {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        open(node, flags, Mode::empty()).map(drop)
    });
    !matches!(opened.await, Ok(Err(Errno::NXIO)))
}

fn is_block(node: &Path) -> bool {
    fs::metadata(node).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// `ID:LUN`, in decimal.
fn scsi_address(text: &str) -> Result<(u32, u32)> {
    text.split_once(':')
        .and_then(|(id, lun)| Some((id.parse().ok()?, lun.parse().ok()?)))
        .ok_or_else(|| AgentError::invalid("SCSI address", text))
}

fn scan_scsi((id, lun): (u32, u32)) {
    let Ok(hosts) = fs::read_dir("/sys/class/scsi_host") else {
        return;
    };
    for host in hosts.flatten() {
        // A host that cannot be scanned has no new device.
        let _ = fs::write(host.path().join("scan"), format!("0 {id} {lun}"));
    }
}

fn find_scsi(class: &Path, (id, lun): (u32, u32)) -> Option<PathBuf> {
    let ending = format!(":0:{id}:{lun}/block");
    fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let target = fs::canonicalize(entry.path()).ok()?;
        let parent = target.parent()?;
        let node = Path::new("/dev").join(entry.file_name());
        (parent.to_string_lossy().ends_with(&ending) && is_block(&node)).then_some(node)
    })
}

/// Replaces the numbers of a spec's devices with those the guest's kernel gave.
///
/// # Errors
/// A device is malformed, not in the spec, given twice, or does not appear.
pub(crate) async fn update_spec(
    spec: &mut oci::Spec,
    devices: &[Device],
    finder: &Devices,
) -> Result<()> {
    let mut seen: Vec<&str> = Vec::new();
    for device in devices {
        let path = device.container_path.as_str();
        if device.type_.is_empty() || path.is_empty() {
            return Err(AgentError::invalid(
                "device",
                "type and container path are needed",
            ));
        }
        if seen.contains(&path) {
            return Err(AgentError::invalid(
                "device",
                format!("{path} is given twice"),
            ));
        }
        seen.push(path);
        let source = if device.type_ == "mmioblk" || device.type_ == "nvdimm" {
            &device.vm_path
        } else {
            &device.id
        };
        if !matches!(device.type_.as_str(), "blk" | "mmioblk" | "nvdimm" | "scsi") {
            return Err(AgentError::invalid("device type", device.type_.as_str()));
        }
        let node = finder.block_node(&device.type_, source).await?;
        let number = fs::metadata(&node).on("stat", &node)?.rdev();
        let entries = &mut spec.Linux.mut_or_insert_default().Devices;
        let entry = entries
            .iter_mut()
            .find(|entry| entry.Path == path)
            .ok_or_else(|| {
                AgentError::invalid("device", format!("{path} is not in the OCI spec"))
            })?;
        entry.Major = i64::from(rustix::fs::major(number));
        entry.Minor = i64::from(rustix::fs::minor(number));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scsi_addresses_are_two_numbers() {
        assert_eq!(scsi_address("3:1").unwrap(), (3, 1));
        for text in ["", "3", "3:", "a:b", "1:2:3"] {
            assert!(scsi_address(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_node_without_a_device_does_not_open() {
        let directory = tempfile::tempdir().unwrap();
        let node = directory.path().join("disk");
        // A number for local use, which no driver is given (Linux's devices.txt).
        let number = rustix::fs::makedev(120, 0);
        let kind = rustix::fs::FileType::BlockDevice;
        rustix::fs::mknodat(rustix::fs::CWD, &node, kind, Mode::RUSR, number).unwrap();
        assert!(is_block(&node));
        assert!(!opens(&node).await);
        assert!(opens(directory.path()).await);
    }

    #[tokio::test]
    async fn device_that_never_comes_is_reported_after_the_timeout() {
        let devices = Devices::start(Duration::from_millis(5)).unwrap();
        let result = devices.block_node("blk", "/dev/no-such-device").await;
        assert!(matches!(result, Err(AgentError::DeviceTimeout { .. })));
    }

    #[tokio::test]
    async fn device_missing_in_the_spec_is_invalid() {
        let devices = Devices::start(Duration::from_millis(5)).unwrap();
        let mut device = Device::new();
        device.type_ = "magic".into();
        device.container_path = "/dev/x".into();
        let result = update_spec(&mut oci::Spec::new(), &[device], &devices).await;
        assert!(matches!(result, Err(AgentError::Invalid { .. })));
    }
}
