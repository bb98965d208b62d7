//! Kernel uevents, as a count that waiters watch. Memory that was plugged in is put online here.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recvfrom, socket_with};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::log;
use crate::readiness;

/// The kernel's multicast group.
const KERNEL_GROUP: u32 = 1;

/// A uevent has at most 2 KiB of variables (`UEVENT_BUFFER_SIZE`) and its path.
const EVENT_BYTES: usize = 8 * 1024;

/// Starts the task that reads uevents.
///
/// # Errors
/// The socket cannot be made or bound.
pub(super) fn listen() -> io::Result<watch::Receiver<u64>> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(KOBJECT_UEVENT),
    )?;
    bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
    let socket = readiness::watch(socket)?;
    let (sender, receiver) = watch::channel(0);
    tokio::spawn(async move { read_all(&socket, &sender).await });
    Ok(receiver)
}

async fn read_all(socket: &AsyncFd<OwnedFd>, count: &watch::Sender<u64>) {
    let mut buffer = vec![0_u8; EVENT_BYTES];
    loop {
        let Ok(mut ready) = socket.readable().await else {
            return;
        };
        let received = ready.try_io(|socket| {
            let flags = RecvFlags::DONTWAIT;
            Ok(recvfrom(socket.get_ref(), buffer.as_mut_slice(), flags)?)
        });
        match received {
            Ok(Ok((length, _, sender))) => {
                let is_kernel = sender
                    .and_then(|address| SocketAddrNetlink::try_from(address).ok())
                    .is_some_and(|address| address.pid() == 0);
                if is_kernel {
                    handle(buffer.get(..length).unwrap_or_default());
                    count.send_modify(|count| *count = count.wrapping_add(1));
                }
            }
            // Events were lost: whoever waits has to look again.
            Ok(Err(_)) => count.send_modify(|count| *count = count.wrapping_add(1)),
            Err(_would_block) => {}
        }
        if count.is_closed() {
            return;
        }
    }
}

fn handle(event: &[u8]) {
    if let Some(path) = added_memory(event) {
        // Memory that the kernel put online itself refuses this; a block that stays offline shows.
        let _ = fs::write(format!("/sys{path}/online"), "1");
        log::debug("uevent", format!("memory {path}"));
    }
}

/// The path of a memory block that was added.
fn added_memory(event: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(event).ok()?;
    let value = |key: &str| {
        text.split('\0')
            .find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
    };
    let path = value("DEVPATH")?;
    let is_memory = value("ACTION") == Some("add")
        && path.starts_with("/devices/system/memory/memory")
        && !path.contains("..");
    is_memory.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_memory_is_recognised() {
        let event = b"add@/x\0ACTION=add\0DEVPATH=/devices/system/memory/memory9\0SEQNUM=1\0";
        assert_eq!(added_memory(event), Some("/devices/system/memory/memory9"));
    }

    #[test]
    fn other_events_are_not_memory() {
        for event in [
            &b"ACTION=remove\0DEVPATH=/devices/system/memory/memory9\0"[..],
            b"ACTION=add\0DEVPATH=/devices/pci0000:00\0",
            b"\xff\xfe",
            b"",
        ] {
            assert_eq!(added_memory(event), None);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_parsed(event: Vec<u8>) {
            let _ = added_memory(&event);
        }
    }
}
