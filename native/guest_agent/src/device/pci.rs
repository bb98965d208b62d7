//! PCI paths: slots from the root bus down, as runtimes name devices behind bridges.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{AgentError, Result};

/// `02/01.1`: function 1 of slot 1 on the bus behind the bridge in slot 2 of the root bus.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PciPath(Vec<(u8, u8)>);

impl PciPath {
    /// # Errors
    /// An element is no slot (`SS` or `SS.F`, hexadecimal).
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let invalid = || AgentError::invalid("PCI path", text);
        let elements = text
            .split('/')
            .map(|element| {
                let (slot, function) = element.split_once('.').unwrap_or((element, "0"));
                let slot = u8::from_str_radix(slot, 16)
                    .ok()
                    .filter(|slot| *slot < 32)?;
                let function = u8::from_str_radix(function, 16).ok().filter(|f| *f < 8)?;
                Some((slot, function))
            })
            .collect::<Option<Vec<_>>>();
        elements.map(Self).ok_or_else(invalid)
    }

    /// The device's directory below `sys`, if every bridge on the way is there.
    pub(crate) fn directory(&self, sys: &Path) -> Option<PathBuf> {
        let mut directory = sys.join("devices/pci0000:00");
        let mut bus = "0000:00".to_owned();
        for (depth, (slot, function)) in self.0.iter().enumerate() {
            if depth > 0 {
                let buses = fs::read_dir(directory.join("pci_bus")).ok()?;
                bus = buses.flatten().next()?.file_name().into_string().ok()?;
            }
            directory.push(format!("{bus}:{slot:02x}.{function:x}"));
        }
        directory.is_dir().then_some(directory)
    }

    /// The node of the virtio block device in this place.
    pub(crate) fn find_block(&self, sys: &Path) -> Option<PathBuf> {
        let device = self.directory(sys)?;
        let virtio = fs::read_dir(device)
            .ok()?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))?;
        let block = fs::read_dir(virtio.path().join("block"))
            .ok()?
            .flatten()
            .next()?;
        let node = Path::new("/dev").join(block.file_name());
        node.exists().then_some(node)
    }

    /// The name of the network interface in this place.
    pub(crate) fn find_interface(&self, sys: &Path) -> Option<String> {
        let device = self.directory(sys)?;
        let virtio = fs::read_dir(device)
            .ok()?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))?;
        let interface = fs::read_dir(virtio.path().join("net"))
            .ok()?
            .flatten()
            .next()?;
        interface.file_name().into_string().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_functions_are_read() {
        assert_eq!(
            PciPath::parse("02/1f.3").unwrap(),
            PciPath(vec![(2, 0), (31, 3)])
        );
        for text in ["", "20", "2/", "1.8", "x", "../.."] {
            assert!(PciPath::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn device_behind_a_bridge_is_found() {
        let sys = tempfile::tempdir().unwrap();
        let bridge = sys.path().join("devices/pci0000:00/0000:00:02.0");
        fs::create_dir_all(bridge.join("pci_bus/0000:01")).unwrap();
        fs::create_dir_all(bridge.join("0000:01:03.0/virtio4/net/eth7")).unwrap();
        let path = PciPath::parse("02/03").unwrap();
        assert_eq!(path.find_interface(sys.path()).as_deref(), Some("eth7"));
        assert_eq!(PciPath::parse("02/04").unwrap().directory(sys.path()), None);
    }
}
