//! A container's cgroup files as the wire's statistics.
//!
//! A file that is not there (a controller that is off) leaves its part at zero; only a group that is
//! gone is an error. Read on a blocking thread, without any lock.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use protobuf::MessageField;
use protocols::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, PidsStats, StatsContainerResponse, ThrottlingData,
};

use crate::cgroup::{Cgroup, keyed};
use crate::error::{IoContext, Result};

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;

/// Reads the statistics.
///
/// # Errors
/// The group is gone.
pub(crate) fn read(cgroup: &Cgroup) -> Result<StatsContainerResponse> {
    let directory = cgroup.directory();
    let cpu = directory.join("cpu.stat");
    let cpu = fs::read_to_string(&cpu).on("read", cpu)?;
    let mut stats = CgroupStats::new();
    stats.cpu_stats = MessageField::some(cpu_stats(&cpu));
    stats.memory_stats = MessageField::some(memory_stats(&directory));
    stats.pids_stats = MessageField::some(pids_stats(&directory));
    let io = fs::read_to_string(directory.join("io.stat")).unwrap_or_default();
    stats.blkio_stats = MessageField::some(blkio_stats(&io));
    stats.hugetlb_stats = hugetlb_stats(&directory);
    let mut response = StatsContainerResponse::new();
    response.cgroup_stats = MessageField::some(stats);
    Ok(response)
}

fn cpu_stats(text: &str) -> CpuStats {
    let count = |key| keyed(text, key).unwrap_or_default();
    let time = |key| count(key).saturating_mul(NANOSECONDS_PER_MICROSECOND);
    let mut usage = CpuUsage::new();
    usage.total_usage = time("usage_usec");
    usage.usage_in_usermode = time("user_usec");
    usage.usage_in_kernelmode = time("system_usec");
    let mut throttling = ThrottlingData::new();
    throttling.periods = count("nr_periods");
    throttling.throttled_periods = count("nr_throttled");
    throttling.throttled_time = time("throttled_usec");
    let mut stats = CpuStats::new();
    stats.cpu_usage = MessageField::some(usage);
    stats.throttling_data = MessageField::some(throttling);
    stats
}

/// A file with one number; `max` is the largest.
fn number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    match text.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

fn memory_data(directory: &Path, prefix: &str) -> MemoryData {
    let value = |suffix| number(&directory.join(format!("{prefix}.{suffix}"))).unwrap_or_default();
    let mut data = MemoryData::new();
    data.usage = value("current");
    data.max_usage = value("peak");
    data.limit = value("max");
    data
}

fn memory_stats(directory: &Path) -> MemoryStats {
    let text = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    let mut stats = MemoryStats::new();
    stats.cache = keyed(&text, "file").unwrap_or_default();
    stats.usage = MessageField::some(memory_data(directory, "memory"));
    let mut swap = memory_data(directory, "memory.swap");
    let events = fs::read_to_string(directory.join("memory.swap.events")).unwrap_or_default();
    swap.failcnt = keyed(&events, "fail").unwrap_or_default();
    stats.swap_usage = MessageField::some(swap);
    let mut kernel = MemoryData::new();
    kernel.usage = keyed(&text, "kernel").unwrap_or_default();
    kernel.limit = u64::MAX;
    stats.kernel_usage = MessageField::some(kernel);
    stats.stats = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
        .collect();
    stats
}

fn pids_stats(directory: &Path) -> PidsStats {
    let mut stats = PidsStats::new();
    stats.current = number(&directory.join("pids.current")).unwrap_or_default();
    let limit = number(&directory.join("pids.max")).unwrap_or_default();
    stats.limit = if limit == u64::MAX { 0 } else { limit };
    stats
}

/// `8:0 rbytes=1 wbytes=2 …`; readers take the byte rows from the one list.
fn blkio_stats(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::new();
    for line in text.lines() {
        let mut words = line.split(' ');
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((Ok(major), Ok(minor))) = device.map(|(a, b)| (a.parse(), b.parse())) else {
            continue;
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let op = match key {
                "rbytes" => "read",
                "wbytes" => "write",
                other => other,
            };
            let mut entry = BlkioStatsEntry::new();
            (entry.major, entry.minor) = (major, minor);
            op.clone_into(&mut entry.op);
            entry.value = value.parse().unwrap_or_default();
            stats.io_service_bytes_recursive.push(entry);
        }
    }
    stats
}

fn hugetlb_stats(directory: &Path) -> HashMap<String, HugetlbStats> {
    let Ok(entries) = fs::read_dir(directory) else {
        return HashMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            let mut stats = HugetlbStats::new();
            stats.usage = number(&entry.path())?;
            let events = directory.join(format!("hugetlb.{size}.events"));
            let events = fs::read_to_string(events).unwrap_or_default();
            stats.failcnt = keyed(&events, "max").unwrap_or_default();
            Some((size.to_owned(), stats))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_nanoseconds() {
        let stats = cpu_stats("usage_usec 7\nuser_usec 4\nsystem_usec 3\nthrottled_usec 2\n");
        assert_eq!(stats.cpu_usage.total_usage, 7000);
        assert_eq!(stats.throttling_data.throttled_time, 2000);
    }

    #[test]
    fn memory_files_are_mapped_and_max_is_the_largest_number() {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2\nkernel 3\n"),
        ] {
            fs::write(directory.path().join(file), text).unwrap();
        }
        let stats = memory_stats(directory.path());
        assert_eq!((stats.usage.usage, stats.usage.limit), (4096, u64::MAX));
        assert_eq!((stats.cache, stats.kernel_usage.usage), (2, 3));
        assert_eq!(stats.stats["anon"], 1);
    }

    #[test]
    fn unlimited_pids_are_zero() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pids.max"), "max\n").unwrap();
        assert_eq!(pids_stats(directory.path()).limit, 0);
    }

    #[test]
    fn io_rows_become_entries_per_device() {
        let stats = blkio_stats("8:0 rbytes=1 wbytes=2 rios=3\nbad line\n");
        let entries: Vec<_> = stats
            .io_service_bytes_recursive
            .iter()
            .map(|entry| (entry.major, entry.op.as_str(), entry.value))
            .collect();
        assert_eq!(entries, [(8, "read", 1), (8, "write", 2), (8, "rios", 3)]);
    }
}
