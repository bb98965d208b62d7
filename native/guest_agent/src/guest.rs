//! The guest itself: what it can do, its processors and memory, its clock and random numbers.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use protobuf::MessageField;
use protocols::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, OnlineCPUMemRequest,
    SetGuestDateTimeRequest,
};
use protocols::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::{AgentError, IoContext, Result};
use crate::forward;
use crate::mount::absolute;
use crate::storage;

const CPU_DIRECTORY: &str = "/sys/devices/system/cpu";
const MEMORY_DIRECTORY: &str = "/sys/devices/system/memory";

/// New processors show up with their hot-plug events; so often, so many times.
const ONLINE_TRIES: u32 = 100;
const ONLINE_INTERVAL: Duration = Duration::from_millis(50);

/// `WaitProcess` leaves a process's output readable: clients may wait and read at the same time.
const WAIT_KEEPS_OUTPUT: &str = "wait-keeps-output";

/// # Errors
/// The kernel gives a block size that is no number.
pub(crate) fn details(request: &GuestDetailsRequest) -> Result<GuestDetailsResponse> {
    let mut details = AgentDetails::new();
    env!("CARGO_PKG_VERSION").clone_into(&mut details.version);
    details.init_daemon = std::process::id() == 1;
    details.storage_handlers = storage::DRIVERS.map(str::to_owned).to_vec();
    details.supports_seccomp = Path::new("/proc/sys/kernel/seccomp").exists();
    details.extra_features = ["seccomp", WAIT_KEEPS_OUTPUT, forward::FEATURE]
        .map(str::to_owned)
        .to_vec();
    let mut response = GuestDetailsResponse::new();
    response.agent_details = MessageField::some(details);
    if request.mem_block_size {
        response.mem_block_size_bytes = block_size()?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = Path::new(MEMORY_DIRECTORY).join("probe").exists();
    }
    Ok(response)
}

/// Hexadecimal, without a prefix; no file: no hot-plug.
fn block_size() -> Result<u64> {
    let path = Path::new(MEMORY_DIRECTORY).join("block_size_bytes");
    let Ok(text) = fs::read_to_string(path) else {
        return Ok(0);
    };
    u64::from_str_radix(text.trim(), 16)
        .map_err(|_| AgentError::Runtime(format!("Invalid block size {text:?}")))
}

/// Puts processors online until `nb_cpus` are, and then all memory.
///
/// # Errors
/// The processors do not appear in time.
pub(crate) async fn online(request: &OnlineCPUMemRequest) -> Result<()> {
    let wanted = request.nb_cpus as usize;
    let mut tries = 0;
    while wanted > 0 && online_cpus(wanted)? < wanted {
        tries += 1;
        if tries >= ONLINE_TRIES {
            return Err(AgentError::Timeout {
                what: "putting processors online",
            });
        }
        tokio::time::sleep(ONLINE_INTERVAL).await;
    }
    if !request.cpu_only {
        for offline in offline_in(Path::new(MEMORY_DIRECTORY), "memory")? {
            // A block the kernel does not want online stays as it is.
            let _ = fs::write(offline, "1");
        }
    }
    Ok(())
}

/// Puts what is missing of `wanted` online; how many are online then.
fn online_cpus(wanted: usize) -> Result<usize> {
    let path = Path::new(CPU_DIRECTORY).join("online");
    let count = |path: &Path| Ok(count_cpus(&fs::read_to_string(path).on("read", path)?));
    let online = count(&path)?;
    if online >= wanted {
        return Ok(online);
    }
    for offline in offline_in(Path::new(CPU_DIRECTORY), "cpu")?
        .into_iter()
        .take(wanted - online)
    {
        fs::write(&offline, "1").on("write", offline)?;
    }
    count(&path)
}

/// `0-3,5` are five.
fn count_cpus(list: &str) -> usize {
    list.trim()
        .split(',')
        .filter_map(|range| {
            let (low, high) = range.split_once('-').unwrap_or((range, range));
            let (low, high): (usize, usize) = (low.parse().ok()?, high.parse().ok()?);
            high.checked_sub(low)?.checked_add(1)
        })
        .sum()
}

/// The `online` files below `directory` that say 0.
fn offline_in(directory: &Path, prefix: &str) -> Result<Vec<std::path::PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.on("read", directory)?,
    };
    let mut files: Vec<_> = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
            number.is_some_and(|number| number.parse::<u32>().is_ok())
        })
        .map(|entry| entry.path().join("online"))
        .filter(|file| fs::read_to_string(file).is_ok_and(|text| text.trim() == "0"))
        .collect();
    files.sort();
    Ok(files)
}

/// Announces memory to a kernel that cannot be told by firmware.
///
/// # Errors
/// The kernel has no probe file.
pub(crate) fn probe_memory(addresses: &[u64]) -> Result<()> {
    let probe = Path::new(MEMORY_DIRECTORY).join("probe");
    for address in addresses {
        fs::write(&probe, format!("{address:#X}").replace('X', "x")).on("write", &probe)?;
    }
    Ok(())
}

/// Mixes `data` in and has the generator start over.
///
/// # Errors
/// There is no data, or the kernel refuses.
pub(crate) fn reseed(data: &[u8]) -> Result<()> {
    const DEVICE: &str = "/dev/random";
    /// `_IOW('R', 0x01, int)` and `_IO('R', 0x07)` in linux/random.h.
    const RNDADDTOENTCNT: libc::Ioctl = 0x4004_5201;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    if data.is_empty() {
        return Err(AgentError::invalid("random data", "is empty"));
    }
    fs::write(DEVICE, data).on("write", DEVICE)?;
    let device = fs::OpenOptions::new()
        .write(true)
        .open(DEVICE)
        .on("open", DEVICE)?;
    let bits = libc::c_int::try_from(data.len().saturating_mul(8)).unwrap_or(libc::c_int::MAX);
    // SAFETY: the request reads one int, to which the pointer leads.
    let counted = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDTOENTCNT, &raw const bits) };
    check(counted, "count entropy")?;
    // SAFETY: the request takes no argument.
    let reseeded = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    check(reseeded, "reseed random numbers")
}

fn check(result: libc::c_int, operation: &'static str) -> Result<()> {
    if result < 0 {
        return Err(std::io::Error::last_os_error()).during(operation);
    }
    Ok(())
}

/// # Errors
/// The time is out of range.
pub(crate) fn set_time(request: &SetGuestDateTimeRequest) -> Result<()> {
    let time = Timespec {
        tv_sec: request.Sec,
        tv_nsec: request.Usec.saturating_mul(1000),
    };
    clock_settime(ClockId::Realtime, time).during("set clock")
}

/// # Errors
/// The path cannot be opened.
pub(crate) fn volume_stats(path: &str) -> Result<VolumeStatsResponse> {
    let path = absolute(path)?;
    let stats = rustix::fs::statvfs(&path).on("stat file system of", &path)?;
    let usage = |unit: Unit, total: u64, free: u64, available: u64| {
        let mut usage = VolumeUsage::new();
        usage.unit = unit.into();
        usage.total = total;
        usage.available = available;
        usage.used = total.saturating_sub(free);
        usage
    };
    let bytes = |blocks: u64| blocks.saturating_mul(stats.f_frsize);
    let mut condition = VolumeCondition::new();
    "OK".clone_into(&mut condition.message);
    let mut response = VolumeStatsResponse::new();
    response.usage = vec![
        usage(
            Unit::BYTES,
            bytes(stats.f_blocks),
            bytes(stats.f_bfree),
            bytes(stats.f_bavail),
        ),
        usage(Unit::INODES, stats.f_files, stats.f_ffree, stats.f_favail),
    ];
    response.volume_condition = MessageField::some(condition);
    Ok(response)
}

/// A few gauges in Prometheus's text form.
pub(crate) fn metrics() -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut family = |name: &str, rows: &[(String, String)]| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# TYPE {name} gauge");
        for (label, value) in rows {
            let _ = writeln!(text, "{name}{{item=\"{label}\"}} {value}");
        }
    };
    let load = read("/proc/loadavg");
    let loads: Vec<_> = ["load1", "load5", "load15"]
        .iter()
        .zip(load.split(' '))
        .map(|(label, value)| ((*label).to_owned(), value.to_owned()))
        .collect();
    family("kata_guest_load", &loads);
    let rows = |text: &str, factor: u64| -> Vec<(String, String)> {
        text.lines()
            .filter_map(|line| {
                let (key, value) = line.split_once(':')?;
                let value: u64 = value.split_ascii_whitespace().next()?.parse().ok()?;
                let key = key.to_ascii_lowercase().replace(['(', ')'], "_");
                Some((key, value.saturating_mul(factor).to_string()))
            })
            .collect()
    };
    family("kata_guest_meminfo", &rows(&read("/proc/meminfo"), 1024));
    family("kata_agent_io_stat", &rows(&read("/proc/self/io"), 1));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        for (list, count) in [("0\n", 1), ("0-3,5\n", 5), ("", 0), ("3-1,x", 0)] {
            assert_eq!(count_cpus(list), count, "{list:?}");
        }
    }

    #[test]
    fn offline_files_are_those_that_say_zero() {
        let directory = tempfile::tempdir().unwrap();
        for (name, state) in [("cpu1", "0\n"), ("cpu2", "1\n"), ("cpufreq", "0\n")] {
            fs::create_dir(directory.path().join(name)).unwrap();
            fs::write(directory.path().join(name).join("online"), state).unwrap();
        }
        let files = offline_in(directory.path(), "cpu").unwrap();
        assert_eq!(files, [directory.path().join("cpu1/online")]);
    }

    #[test]
    fn details_advertise_that_output_outlives_the_wait() {
        let response = details(&GuestDetailsRequest::new()).unwrap();
        assert!(
            response
                .agent_details
                .extra_features
                .contains(&WAIT_KEEPS_OUTPUT.to_owned())
        );
    }

    #[test]
    fn volume_statistics_count_bytes_and_inodes() {
        let response = volume_stats("/tmp").unwrap();
        assert_eq!(response.usage[0].unit, Unit::BYTES.into());
        assert!(response.usage[0].total >= response.usage[0].available);
        assert!(volume_stats("tmp").is_err());
    }
}
