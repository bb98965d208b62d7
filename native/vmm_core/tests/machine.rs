//! The machine as its owner uses it, with guests of a few instructions that run on any KVM, also
//! one that cannot run a kernel: states, ends, pauses, snapshots, failures of a start.
//!
//! A guest is an ELF file with one segment of 64-bit code, entered as a kernel is. It has a serial
//! port to say something at, ports to end the machine at, and all memory mapped.

#![allow(clippy::unwrap_used, reason = "a test that can't go on fails")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm_core::event::{VmEvents, VmExit};
use vmm_core::memory::MemoryBacking;
use vmm_core::rate_limiter::RateLimiterConfig;
use vmm_core::virtio::rng::Rng;
use vmm_core::vm::{Vm, VmConfig, VmError, VmState};

const LOAD_ADDRESS: u64 = 0x100_0000;
const DEADLINE: Duration = Duration::from_secs(20);

/// `mov dx, 0x3f8; mov al, C; out dx, al`
fn say(character: u8) -> Vec<u8> {
    out(0x3f8, character)
}

/// `mov dx, PORT; mov al, VALUE; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// `jmp $`
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `ud2`: without an interrupt table, a triple fault.
const UNDEFINED: [u8; 2] = [0x0f, 0x0b];

fn switch_off() -> Vec<u8> {
    out(0x600, 0x34)
}

fn reset() -> Vec<u8> {
    out(0x64, 0xfe)
}

/// An ELF file that a loader puts at [`LOAD_ADDRESS`] and enters there.
fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD_ADDRESS.to_le_bytes()); // entry
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for field in [64u16, 56, 1, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(7u32.to_le_bytes()); // readable, writable, executable
    let size = code.len() as u64;
    for field in [120, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

struct Events(Mutex<Sender<VmExit>>);

impl VmEvents for Events {
    fn exited(&self, exit: &VmExit) {
        // A test that is over listens no more.
        let _heard = self.0.lock().unwrap().send(exit.clone());
    }

    fn warning(&self, text: &str) {
        panic!("{text}");
    }
}

struct Machine {
    vm: Vm,
    exits: Receiver<VmExit>,
    folder: TempDir,
}

impl Machine {
    fn new(code: &[u8]) -> Self {
        Self::with(code, |_| ())
    }

    fn with(code: &[u8], change: impl FnOnce(&mut VmConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, elf(code)).unwrap();
        let mut config = VmConfig {
            kernel,
            initrd: None,
            command_line: "tiny".to_owned(),
            vcpu_count: 1,
            memory_mib: 64,
            memory_backing: MemoryBacking::Anonymous,
        };
        change(&mut config);
        let (sender, exits) = channel();
        let vm = Vm::new(config, None, Arc::new(Events(Mutex::new(sender)))).unwrap();
        Self { vm, exits, folder }
    }

    fn exit(&self) -> VmExit {
        self.exits.recv_timeout(DEADLINE).expect("the machine ends")
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&self.vm.console_tail()).into_owned()
    }

    /// Wait for the guest to print `text`.
    fn wait_for(&self, text: &str) {
        let end = Instant::now() + DEADLINE;
        while !self.console().contains(text) {
            assert!(Instant::now() < end, "{text} in {:?}", self.console());
            std::thread::yield_now();
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn a_guest_that_switches_itself_off_has_shut_down() {
    let machine = Machine::new(&[say(b'A'), say(b'B'), switch_off()].concat());
    assert_eq!(machine.vm.state(), VmState::Created);
    machine.vm.start().unwrap();
    assert_eq!(machine.exit(), VmExit::Shutdown);
    assert_eq!(machine.vm.state(), VmState::Stopped);
    assert_eq!(machine.console(), "AB");
}

#[test]
fn a_guest_that_resets_has_reset() {
    let machine = Machine::new(&reset());
    machine.vm.start().unwrap();
    assert_eq!(machine.exit(), VmExit::Reset);
}

#[test]
fn a_reset_after_a_kernels_last_words_is_a_panic() {
    let words = "Kernel panic - not syncing: on purpose\n";
    let code: Vec<u8> = words.bytes().flat_map(say).chain(reset()).collect();
    let machine = Machine::new(&code);
    machine.vm.start().unwrap();
    let VmExit::Panic(line) = machine.exit() else {
        panic!("another end");
    };
    assert_eq!(line, words.trim_end());
}

#[test]
fn a_triple_fault_is_told_with_registers() {
    let machine = Machine::new(&UNDEFINED);
    machine.vm.start().unwrap();
    let exit = machine.exit();
    let VmExit::TripleFault(detail) = &exit else {
        panic!("{exit}");
    };
    assert!(detail.contains("rip="), "{detail}");
}

#[test]
fn a_guest_that_never_ends_is_stopped_and_stopping_repeats() {
    let machine = Machine::new(&[say(b'x'), SPIN.to_vec()].concat());
    machine.vm.start().unwrap();
    machine.wait_for("x");
    machine.vm.stop().unwrap();
    assert_eq!(machine.exit(), VmExit::Stopped);
    machine.vm.stop().unwrap();
    assert!(machine.exits.try_recv().is_err(), "one end is one report");
    assert!(matches!(machine.vm.pause(), Err(VmError::State { .. })));
    assert!(matches!(machine.vm.start(), Err(VmError::State { .. })));
}

#[test]
fn a_machine_that_ended_by_itself_keeps_nobody_waiting() {
    let machine = Machine::new(&reset());
    machine.vm.start().unwrap();
    machine.exit();
    let began = Instant::now();
    assert!(machine.vm.pause().is_err());
    machine.vm.stop().unwrap();
    // Far less than a request's time limit.
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_guest_reads_the_registers_that_it_writes() {
    // Says the first letter of the magic value and what became of a status of ACKNOWLEDGE.
    let mut code = vec![0xbe]; // mov esi, the first device's registers
    code.extend(0xc000_0f00u32.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0x8b, 0x06, 0xee]); // mov eax, [rsi]; out dx, al
    code.extend([0xc7, 0x46, 0x70, 1, 0, 0, 0]); // mov dword [rsi + 0x70], 1
    code.extend([0x8b, 0x46, 0x70, 0x04, b'0', 0xee]); // mov eax, [rsi + 0x70]; add al, '0'; out
    code.extend(switch_off());
    let machine = Machine::new(&code);
    machine
        .vm
        .add_device(Box::new(Rng::new(&RateLimiterConfig::default()).unwrap()))
        .unwrap();
    machine.vm.start().unwrap();
    assert_eq!(machine.exit(), VmExit::Shutdown);
    assert_eq!(machine.console(), "v1");
}

#[test]
fn several_vcpus_start_and_stop() {
    let code = [say(b'x'), SPIN.to_vec()].concat();
    let machine = Machine::with(&code, |config| config.vcpu_count = 4);
    machine.vm.start().unwrap();
    machine.wait_for("x");
    let names: Vec<String> = machine.vm.thread_ids().into_iter().map(|t| t.0).collect();
    assert_eq!(names, ["vcpu-0", "vcpu-1", "vcpu-2", "vcpu-3", "vmm-io"]);
    machine.vm.stop().unwrap();
    assert_eq!(machine.exit(), VmExit::Stopped);
}

/// Counts for ever and prints each number as one of 64 characters from `@` on:
/// `xor rcx, rcx; mov dx, 0x3f8; l: inc rcx; mov al, cl; and al, 0x3f; add al, 0x40; out dx, al;
/// jmp l`.
fn count_for_ever() -> Vec<u8> {
    let mut code = vec![0x48, 0x31, 0xc9, 0x66, 0xba, 0xf8, 0x03];
    code.extend([
        0x48, 0xff, 0xc1, 0x88, 0xc8, 0x24, 0x3f, 0x04, 0x40, 0xee, 0xeb, 0xf4,
    ]);
    code
}

/// Every character follows the one before it: nothing was skipped or done twice.
fn assert_counts(text: &[u8]) {
    for pair in text.windows(2) {
        let next = (pair[0] - 0x40 + 1) % 64 + 0x40;
        assert_eq!(pair[1], next, "{:?}", String::from_utf8_lossy(text));
    }
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    let machine = Machine::new(&count_for_ever());
    machine.vm.start().unwrap();
    for _ in 0..50 {
        machine.vm.pause().unwrap();
        machine.vm.pause().unwrap();
        assert_eq!(machine.vm.state(), VmState::Paused);
        let console = machine.vm.console_tail();
        assert_counts(&console);
        machine.vm.resume().unwrap();
        let end = Instant::now() + DEADLINE;
        while machine.vm.console_tail() == console {
            assert!(Instant::now() < end, "the guest goes on");
            std::thread::yield_now();
        }
    }
    machine.vm.pause().unwrap();
    machine.vm.stop().unwrap();
    assert_eq!(machine.exit(), VmExit::Stopped);
}

#[test]
fn a_restored_guest_goes_on_where_the_snapshot_was_taken() {
    let machine = Machine::new(&count_for_ever());
    machine.vm.start().unwrap();
    machine.wait_for("Z");
    machine.vm.pause().unwrap();
    let last = *machine.vm.console_tail().last().unwrap();
    let folder = machine.folder.path().join("snapshot");
    fs::create_dir(&folder).unwrap();
    machine.vm.snapshot(&folder).unwrap();
    machine.vm.resume().unwrap();
    machine.vm.stop().unwrap();

    for _clone in 0..2 {
        let again = Machine::new(&[]);
        again.vm.restore(&folder).unwrap();
        assert_eq!(again.vm.state(), VmState::Paused);
        again.vm.resume().unwrap();
        again.wait_for("Z");
        again.vm.stop().unwrap();
        let console = again.vm.console_tail();
        assert_eq!(console[0], (last - 0x40 + 1) % 64 + 0x40);
        assert_counts(&console);
    }
}

fn snapshot_of_tiny_guest(folder: &Path) {
    let machine = Machine::new(&[say(b'x'), SPIN.to_vec()].concat());
    machine.vm.start().unwrap();
    machine.wait_for("x");
    machine.vm.pause().unwrap();
    machine.vm.snapshot(folder).unwrap();
}

#[test]
fn a_snapshot_of_another_machine_or_a_damaged_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    snapshot_of_tiny_guest(folder.path());
    let larger = Machine::with(&[], |config| config.memory_mib = 128);
    let error = chain(&larger.vm.restore(folder.path()).unwrap_err());
    assert!(error.contains("bytes of memory"), "{error}");
    assert_eq!(larger.vm.state(), VmState::Stopped);

    let state = folder.path().join("state");
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, &bytes).unwrap();
    let error = Machine::new(&[]).vm.restore(folder.path()).unwrap_err();
    assert!(chain(&error).contains("damaged"), "{error}");

    bytes[middle] ^= 1;
    fs::write(&state, &bytes).unwrap();
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("memory"));
    memory.unwrap().set_len(1 << 20).unwrap();
    let error = Machine::new(&[]).vm.restore(folder.path()).unwrap_err();
    assert!(chain(&error).contains("memory file"), "{error}");
}

#[test]
fn a_missing_kernel_is_named_and_nothing_runs() {
    let machine = Machine::with(&[], |config| {
        config.kernel = PathBuf::from("/nowhere/vmlinux");
    });
    let error = machine.vm.start().unwrap_err();
    assert!(chain(&error).contains("/nowhere/vmlinux"), "{error}");
    assert_eq!(machine.vm.state(), VmState::Stopped);
    assert!(machine.vm.thread_ids().is_empty());
}

#[test]
fn numbers_out_of_range_are_refused_by_name() {
    let config = VmConfig {
        kernel: PathBuf::new(),
        initrd: None,
        command_line: String::new(),
        vcpu_count: 0,
        memory_mib: 64,
        memory_backing: MemoryBacking::Anonymous,
    };
    let make = |config: VmConfig| {
        let (sender, _exits) = channel();
        let events = Arc::new(Events(Mutex::new(sender)));
        Vm::new(config, None, events).unwrap_err().to_string()
    };
    assert!(make(config.clone()).contains("vcpu_count is 0"));
    let config = VmConfig {
        vcpu_count: 1,
        memory_mib: 1,
        ..config
    };
    assert!(make(config.clone()).contains("memory_mib is 1"));
    let config = VmConfig {
        memory_mib: 64,
        command_line: "x".repeat(5000),
        ..config
    };
    assert!(make(config).contains("command line bytes is 5000"));
}

#[test]
fn many_machines_one_after_the_other_leave_nothing() {
    let run = || {
        let machine = Machine::new(&[say(b'x'), SPIN.to_vec()].concat());
        machine.vm.start().unwrap();
        machine.wait_for("x");
        drop(machine.vm);
    };
    run();
    let before = (count("/proc/self/fd"), count("/proc/self/task"));
    for _ in 0..20 {
        run();
    }
    // Other tests of this process come and go; twenty machines would show.
    let after = (count("/proc/self/fd"), count("/proc/self/task"));
    assert!(
        after.0 < before.0 + 60 && after.1 < before.1 + 30,
        "{before:?} {after:?}"
    );
}

fn count(folder: &str) -> usize {
    fs::read_dir(folder).unwrap().count()
}
