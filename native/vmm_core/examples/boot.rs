//! The bare runner: boots a kernel, prints its console, and says how it ended.
//!
//!     boot KERNEL [--initrd FILE] [--command-line TEXT] [--vcpus N] [--memory-mib N]
//!                 [--backing anonymous|shared|hugepages] [--disk FILE]... [--read-only-disk FILE]...
//!                 [--folder TAG=FOLDER]... [--vsock SOCKET] [--until TEXT] [--snapshot FOLDER]
//!                 [--restore FOLDER]
//!
//! No Python, no containers: what a machine costs by itself is measured with this. With `--until` the
//! machine is stopped when its console has shown the text, with `--snapshot` after it was written to
//! a folder; then the time since the start and the memory of the process besides the guest's are
//! printed. A disk's serial number is its file's name.

#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::error::Error;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm_core::event::{VmEvents, VmExit};
use vmm_core::memory::MemoryBacking;
use vmm_core::virtio::block::{Block, BlockConfig, EngineChoice};
use vmm_core::virtio::fs::{Fs, FsConfig};
use vmm_core::virtio::vsock::{Vsock, VsockConfig};
use vmm_core::vm::{Vm, VmConfig};

/// The guest's context id: the first that is nobody's.
const GUEST_CID: u64 = 3;

/// What ends the wait.
enum News {
    Ended(VmExit),
    Seen,
}

struct Events(Mutex<Sender<News>>);

impl VmEvents for Events {
    fn exited(&self, exit: &VmExit) {
        if let Ok(news) = self.0.lock() {
            // The receiver waits until there is one.
            let _received = news.send(News::Ended(exit.clone()));
        }
    }

    fn warning(&self, text: &str) {
        println!("warning: {text}");
    }
}

struct Options {
    config: VmConfig,
    disks: Vec<BlockConfig>,
    folders: Vec<(String, PathBuf)>,
    vsock: Option<PathBuf>,
    until: Option<String>,
    snapshot: Option<PathBuf>,
    restore: Option<PathBuf>,
}

fn parse() -> Result<Options, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().ok_or("usage: boot KERNEL [options]")?;
    let config = VmConfig {
        kernel: PathBuf::from(kernel),
        initrd: None,
        command_line: "console=ttyS0 reboot=k panic=-1".to_owned(),
        vcpu_count: 1,
        memory_mib: 256,
        memory_backing: MemoryBacking::default(),
    };
    let mut options = Options {
        config,
        disks: Vec::new(),
        folders: Vec::new(),
        vsock: None,
        until: None,
        snapshot: None,
        restore: None,
    };
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or("an option needs a value")?;
        let config = &mut options.config;
        match option.as_str() {
            "--initrd" => config.initrd = Some(PathBuf::from(value)),
            "--command-line" => config.command_line = value,
            "--vcpus" => config.vcpu_count = value.parse()?,
            "--memory-mib" => config.memory_mib = value.parse()?,
            "--backing" => {
                config.memory_backing = match value.as_str() {
                    "anonymous" => MemoryBacking::Anonymous,
                    "shared" => MemoryBacking::Shared,
                    "hugepages" => MemoryBacking::HugePages,
                    other => return Err(format!("no backing {other}").into()),
                }
            }
            "--disk" => options.disks.push(disk(value.into(), false)),
            "--read-only-disk" => options.disks.push(disk(value.into(), true)),
            "--folder" => {
                let (tag, folder) = value.split_once('=').ok_or("--folder TAG=FOLDER")?;
                options
                    .folders
                    .push((tag.to_owned(), PathBuf::from(folder)));
            }
            "--vsock" => options.vsock = Some(PathBuf::from(value)),
            "--until" => options.until = Some(value),
            "--snapshot" => options.snapshot = Some(PathBuf::from(value)),
            "--restore" => options.restore = Some(PathBuf::from(value)),
            other => return Err(format!("no option {other}").into()),
        }
    }
    Ok(options)
}

fn disk(path: PathBuf, is_read_only: bool) -> BlockConfig {
    let id = path
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    BlockConfig {
        id,
        path,
        is_read_only,
        is_direct: false,
        engine: EngineChoice::Auto,
        rate_limiter: None,
    }
}

/// Print what comes through the pipe, and tell when `until` was in it.
fn follow(console: &OwnedFd, until: Option<&str>, news: &Sender<News>) {
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = rustix::io::read(console, &mut buffer) {
        let text = String::from_utf8_lossy(buffer.get(..count).unwrap_or(&[]));
        print!("{text}");
        let _flushed = std::io::stdout().flush();
        if let Some(until) = until {
            seen.push_str(&text);
            if seen.contains(until) {
                let _received = news.send(News::Seen);
                return;
            }
            // The text may come in two parts.
            let keep = seen.len().saturating_sub(until.len());
            let keep = (keep..=seen.len()).find(|at| seen.is_char_boundary(*at));
            seen = seen.split_off(keep.unwrap_or(0));
        }
    }
}

/// KiB of the process that are not the guest's memory: proportional set size, all mappings but the
/// largest ones, which are the guest's.
fn memory_kib(guest_mib: u32) -> Result<u64, Box<dyn Error>> {
    let mut total = 0;
    let mut is_guest = false;
    for line in fs::read_to_string("/proc/self/smaps")?.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let start = u64::from_str_radix(start, 16)?;
            let end = u64::from_str_radix(end, 16)?;
            // Half of it, should the kernel have split the mapping at the gap.
            is_guest = end - start >= u64::from(guest_mib) << 19;
        } else if first == "Pss:" && !is_guest {
            total += words.next().unwrap_or_default().parse::<u64>()?;
        }
    }
    Ok(total)
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = parse()?;
    let (sender, news) = channel();
    let events = Arc::new(Events(Mutex::new(sender.clone())));
    let (reader, writer) = rustix::pipe::pipe()?;
    rustix::io::ioctl_fionbio(&writer, true)?;
    let until = options.until.clone();
    let follower = std::thread::spawn(move || follow(&reader, until.as_deref(), &sender));

    let began = Instant::now();
    let guest_mib = options.config.memory_mib;
    let vm = Vm::new(options.config, Some(writer), events)?;
    for config in options.disks {
        vm.add_device(Box::new(Block::new(config)?))?;
    }
    for (tag, folder) in options.folders {
        vm.add_device(Box::new(Fs::new(FsConfig::new(tag, folder))?))?;
    }
    if let Some(path) = options.vsock {
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            path,
        };
        vm.add_device(Box::new(Vsock::new(config)?))?;
    }
    start(&vm, options.restore.as_deref())?;
    let started = began.elapsed();
    let is_over = match news.recv()? {
        News::Ended(exit) => {
            println!("{exit}");
            true
        }
        News::Seen => {
            println!();
            false
        }
    };
    let seen = began.elapsed();
    let memory = memory_kib(guest_mib)?;
    if let Some(folder) = options.snapshot
        && !is_over
    {
        vm.pause()?;
        vm.snapshot(&folder)?;
    }
    vm.stop()?;
    drop(vm);
    let _printed = follower.join();
    println!(
        "started_us={} seen_us={} stopped_us={} memory_kib={memory}",
        micros(started),
        micros(seen),
        micros(began.elapsed())
    );
    Ok(())
}

fn start(vm: &Vm, snapshot: Option<&Path>) -> Result<(), Box<dyn Error>> {
    match snapshot {
        None => vm.start()?,
        Some(folder) => {
            vm.restore(folder)?;
            vm.resume()?;
        }
    }
    Ok(())
}

fn micros(duration: Duration) -> u128 {
    duration.as_micros()
}
