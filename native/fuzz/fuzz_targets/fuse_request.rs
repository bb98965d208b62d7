//! FUSE requests of a hostile guest to a shared folder, with a host that changes it meanwhile.
//!
//! The input is a program: an operation byte, then its operands. Rings, guest memory and the folder
//! are real. Checked beside panics and sanitizer findings: nothing around the folder is reached,
//! answers fit the room they were given, and a device restored from another's state has the same
//! nodes and handles.

#![no_main]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use fuzz_support::Input;
use libfuzzer_sys::fuzz_target;
use rustix::process::{Resource, Rlimit, setrlimit};
use virtio_core::mock::{MockBuffer, MockDriver, mock_ram};
use virtio_core::ram::GuestRam;
use vmm_core::virtio::device::VirtioDevice;
use vmm_core::virtio::fs::{CacheMode, Fs, FsConfig};
use vmm_core::virtio::mock::MockTransport;

const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const RAM_SIZE: usize = 0x4_0000;
/// No file gets larger than this.
const MAX_FILE: u64 = 1 << 20;
const SECRET: &[u8] = b"secret";
const FALLOCATE: u32 = 43;
const NAMES: [&[u8]; 8] = [
    b"file",
    b"directory",
    b"link",
    b"new",
    b"inner",
    b"..",
    b"../canary",
    b"fifo",
];

/// What the host changes.
const HOST_NAMES: [&str; 4] = ["file", "directory", "link", "new"];

/// Nearly always a number the guest was given or could be, now and then any.
fn number(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        255 => u64::from_le_bytes(input.take()),
        low @ 128.. => u64::from(input.byte()) << 32 | u64::from(low & 15),
        low => u64::from(low),
    }
}

/// Where the folder is, with a canary next to it.
fn around() -> &'static Path {
    static AROUND: OnceLock<PathBuf> = OnceLock::new();
    AROUND.get_or_init(|| {
        let limit = Rlimit {
            current: Some(MAX_FILE),
            maximum: Some(MAX_FILE),
        };
        setrlimit(Resource::Fsize, limit).expect("a lower limit");
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        PathBuf::from(format!("/dev/shm/fuse_request.{}", std::process::id()))
    })
}

/// The folder as each program finds it.
fn make_folder() -> PathBuf {
    let folder = around().join("shared");
    let _absent = fs::remove_dir_all(around());
    fs::create_dir_all(folder.join("directory/inner")).expect("a directory");
    fs::write(around().join("canary"), SECRET).expect("a file");
    fs::write(folder.join("file"), b"text").expect("a file");
    symlink("../canary", folder.join("link")).expect("a link");
    folder
}

fn assert_untouched() {
    assert_eq!(
        fs::read(around().join("canary")).expect("the canary"),
        SECRET
    );
    let count = fs::read_dir(around()).expect("our directory").count();
    assert_eq!(count, 2, "the canary and the folder");
}

struct Guest {
    fs: Fs,
    drivers: [MockDriver; 2],
    transport: MockTransport,
}

fn boot(ram: &std::sync::Arc<GuestRam>, mut fs: Fs) -> Guest {
    let drivers = [0x1000, 0x2000].map(|base| MockDriver::new(ram, base, 16));
    let transport = MockTransport::new(ram, 2);
    let activation = transport.activation(
        virtio_core::features::RING,
        &[Some(&drivers[0]), Some(&drivers[1])],
    );
    fs.activate(activation).expect("both queues");
    Guest {
        fs,
        drivers,
        transport,
    }
}

/// A request with a body of `words` and names.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    let opcode = u32::from(input.byte() % 54);
    let node = number(input);
    let owner = if input.byte() & 7 == 0 { 1000u32 } else { 0 };
    let mut bytes = vec![0; 4];
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(owner.to_le_bytes());
    bytes.extend(owner.to_le_bytes());
    bytes.extend([0; 8]);
    for _ in 0..input.byte() % 12 {
        bytes.extend(number(input).to_le_bytes());
    }
    if input.byte() & 1 == 1 {
        bytes.extend(input.take::<4>());
    }
    for _ in 0..input.byte() % 3 {
        bytes.extend(NAMES[usize::from(input.byte()) % NAMES.len()]);
        bytes.push(0);
    }
    for _ in 0..input.byte() % 4 {
        bytes.extend(input.take::<8>());
    }
    let len = u32::try_from(bytes.len()).expect("short");
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    for _ in 0..input.byte() % 3 {
        let at = usize::from(input.byte()) % bytes.len();
        bytes[at] = input.byte();
    }
    bytes
}

/// Put a request into a queue, cut in two on either side.
fn send(input: &mut Input<'_>, guest: &mut Guest, bytes: &[u8]) {
    let room = match input.byte() {
        few @ ..64 => u32::from(few),
        many => u32::from(many) * 64,
    };
    let Guest {
        fs,
        drivers,
        transport,
    } = guest;
    let index = usize::from(input.byte() & 1);
    let driver = &mut drivers[index];
    driver.write(REQUEST, bytes);
    let len = u32::try_from(bytes.len()).expect("short");
    let cut = u32::from(input.byte()).min(len);
    let answer_cut = u32::from(input.byte()).min(room);
    let mut buffers = vec![
        MockBuffer::readable(REQUEST, cut),
        MockBuffer::readable(REQUEST + u64::from(cut), len - cut),
        MockBuffer::writable(ANSWER, answer_cut),
        MockBuffer::writable(ANSWER + u64::from(answer_cut), room - answer_cut),
    ];
    buffers.retain(|buffer| buffer.len > 0);
    driver.add(&buffers);
    transport.kick(index);
    transport.settle(fs).expect("a sound ring");
    let used = driver.take_used();
    assert_eq!(used.len(), 1);
    assert!(used[0].len <= room);
}

fn held(fs: &Fs) -> Vec<(&'static str, u64)> {
    let mut metrics = fs.metrics();
    metrics.retain(|(name, _)| name.starts_with("current"));
    metrics
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let folder = make_folder();
    let config = FsConfig {
        cache: [CacheMode::Never, CacheMode::Auto, CacheMode::Always]
            [usize::from(input.byte()) % 3],
        is_read_only: input.byte() & 15 == 15,
        ..FsConfig::new("shared", &folder)
    };
    let ram = mock_ram(RAM_SIZE);
    let mut guest = boot(&ram, Fs::new(config.clone()).expect("a folder"));
    if input.byte() & 15 != 15 {
        let mut init = vec![0; 104];
        init[0] = 104;
        init[4] = 26;
        init[40..48].copy_from_slice(&[7, 0, 0, 0, 39, 0, 0, 0]);
        init[52..60].fill(0xff);
        send(&mut Input::new(&[255, 1, 40, 16]), &mut guest, &init);
    }
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        match input.byte() % 16 {
            0 => {
                let state = guest.fs.save().expect("a state");
                let mut fs = Fs::new(config.clone()).expect("a folder");
                fs.restore(&state).expect("its own state");
                assert_eq!(held(&fs), held(&guest.fs));
                guest = boot(&ram, fs);
            }
            1 => {
                let mut path = || folder.join(HOST_NAMES[usize::from(input.byte()) % 4]);
                let (from, to) = (path(), path());
                let _outcome = match input.byte() % 4 {
                    0 => fs::rename(from, to),
                    1 => fs::remove_file(from),
                    2 => symlink("..", from),
                    _ => fs::create_dir(from),
                };
            }
            2 => {
                // The driver starts anew.
                guest.fs.reset();
                guest = boot(&ram, guest.fs);
            }
            _ => {
                let mut bytes = request(&mut input);
                let opcode = bytes.get(4..8).map(|word| word.try_into().expect("four"));
                if opcode.map(u32::from_le_bytes) == Some(FALLOCATE) {
                    // It may take more of the host than a file may be large: bound the length.
                    bytes.resize(72, 0);
                    bytes[59..64].fill(0);
                    bytes[58] &= 7;
                }
                send(&mut input, &mut guest, &bytes);
            }
        }
        assert_untouched();
    }
    drop(guest);
    let _removed = fs::remove_dir_all(around());
});
