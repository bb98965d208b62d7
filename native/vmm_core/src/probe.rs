//! Can KVM run an ordinary kernel here? Found out by running a tiny guest, not by looking.
//!
//! ```text
//!   open /dev/kvm ─► API version ─► machine, memory, vCPU ─► run ─► the right sum at the port: usable
//!        │               │                  │                 └─► any other exit, or none in 2 s ─┐
//!        └───────────────┴──────────────────┴─────────────────────────────────────► not usable ◄──┘
//! ```
//!
//! Some hosts offer a complete `/dev/kvm` whose guests' kernel mode is emulated in part; tiny
//! guests run there and kernels do not. The guest therefore executes what such emulators lack.
//! [`probe_kvm`] may be called on any thread; the guest runs on one of its own, which ends with it.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

#[cfg(target_arch = "x86_64")]
use kvm_ioctls::{Kvm, VcpuExit};
#[cfg(target_arch = "x86_64")]
use virtio_core::ram::GuestRam;
#[cfg(target_arch = "x86_64")]
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[cfg(target_arch = "x86_64")]
use crate::arch::probe_guest;
use crate::event::chain;
use crate::kvm::{self, KvmError};

/// The guest runs some thirty instructions; this is for a host that is stuck.
const RUN_TIMEOUT: Duration = Duration::from_secs(2);
/// Between the signal and the end of the run.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmProbe {
    /// The guest ran to its end with the right result.
    pub is_usable: bool,
    /// Why not, in one line, or what was seen to work.
    pub reason: String,
    /// `KVM_GET_API_VERSION`, if `/dev/kvm` could be opened.
    pub api_version: Option<i32>,
}

/// Open `/dev/kvm` and run a tiny long-mode guest. Takes milliseconds; never fails.
pub fn probe_kvm() -> KvmProbe {
    let unusable = |reason: String, api_version| KvmProbe {
        is_usable: false,
        reason,
        api_version,
    };
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return unusable(chain(&error), None),
    };
    let api_version = match kvm::check_api_version(&kvm) {
        Ok(version) => version,
        Err(error) => return unusable(chain(&error), Some(kvm.get_api_version())),
    };
    match run_guarded(kvm) {
        Ok(seen) => KvmProbe {
            is_usable: true,
            reason: format!("a long-mode guest ran {seen}{}", module_note()),
            api_version: Some(api_version),
        },
        Err(reason) => unusable(format!("{reason}{}", module_note()), Some(api_version)),
    }
}

/// Run the guest on its own thread, for [`RUN_TIMEOUT`] at most.
fn run_guarded(kvm: kvm_ioctls::Kvm) -> Result<String, String> {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("kvm-probe".to_owned())
        .spawn(move || {
            // The receiver is gone only if we were given up on.
            let _result = sender.send(run_guest(&kvm));
        })
        .map_err(|error| format!("start the probe's thread: {error}"))?;
    let mut result = receiver.recv_timeout(RUN_TIMEOUT);
    if result.is_err() {
        kvm::kick(&thread);
        result = receiver.recv_timeout(STOP_TIMEOUT);
    }
    match result {
        Ok(result) => {
            // It has nothing left to do but end.
            let _result = thread.join();
            result
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err("KVM_RUN cannot be interrupted: the probe's thread was left behind".to_owned())
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => Err("the probe's thread panicked".to_owned()),
    }
}

#[cfg(target_arch = "x86_64")]
fn run_guest(kvm: &Kvm) -> Result<String, String> {
    let text = |error: KvmError| chain(&error);
    let range = [(GuestAddress(0), probe_guest::MEMORY_SIZE)];
    let memory = GuestMemoryMmap::from_ranges(&range)
        .map_err(KvmError::Allocate)
        .map_err(text)?;
    let vm = kvm::create_vm(kvm).map_err(text)?;
    let machine = kvm::MappedVm::new(vm, GuestRam::new(memory)).map_err(text)?;
    let mut guest = probe_guest::build(kvm, &machine.vm, machine.ram().mappings()).map_err(text)?;
    kvm::block_signals();
    kvm::make_kickable(&guest.vcpu).map_err(text)?;

    let what = match guest.vcpu.run() {
        Ok(VcpuExit::IoOut(probe_guest::RESULT_PORT, data)) => {
            let expected = guest.expected;
            return match data.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) {
                Some(sum) if sum == expected => Ok(probe_guest::INSTRUCTIONS.to_owned()),
                sum => Err(format!(
                    "the probe's guest computed {sum:x?} instead of {expected:#x}"
                )),
            };
        }
        Ok(VcpuExit::InternalError) => {
            let suberror = kvm::internal_error_suberror(&mut guest.vcpu);
            format!(
                "KVM_EXIT_INTERNAL_ERROR, suberror {suberror}{}",
                suberror_name(suberror)
            )
        }
        Ok(VcpuExit::Shutdown) => "KVM_EXIT_SHUTDOWN (triple fault)".to_owned(),
        Ok(VcpuExit::FailEntry(reason, _cpu)) => format!("KVM_EXIT_FAIL_ENTRY, reason {reason:#x}"),
        Ok(other) => format!("an unexpected exit: {other:?}"),
        Err(error) if error.errno() == libc::EINTR => {
            return Err(format!(
                "the probe's guest did not end within {RUN_TIMEOUT:?}"
            ));
        }
        Err(error) => format!("KVM_RUN: {error}"),
    };
    let place = guest
        .vcpu
        .get_regs()
        .map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.rip));
    Err(format!("the probe's guest ended with {what}{place}"))
}

#[cfg(not(target_arch = "x86_64"))]
fn run_guest(kvm: &kvm_ioctls::Kvm) -> Result<String, String> {
    kvm::create_vm(kvm).map_err(|error: KvmError| chain(&error))?;
    Err("the probe has no guest for this architecture".to_owned())
}

#[cfg(target_arch = "x86_64")]
fn suberror_name(suberror: u32) -> &'static str {
    match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => " (instruction emulation failed)",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => " (simultaneous exceptions)",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => " (event delivery failed)",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => " (unexpected exit reason)",
        _ => "",
    }
}

/// Names the kernel module behind `/dev/kvm`, if one of the known ones is loaded.
fn module_note() -> String {
    ["kvm_pvm", "kvm_intel", "kvm_amd"]
        .into_iter()
        .find(|module| std::path::Path::new("/sys/module").join(module).exists())
        .map_or_else(String::new, |module| format!(" (KVM module {module})"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_probe_is_quick_and_gives_one_line() {
        let start = Instant::now();
        let probe = probe_kvm();
        assert!(start.elapsed() < RUN_TIMEOUT, "{probe:?}");
        assert!(!probe.reason.is_empty());
        assert!(!probe.reason.contains('\n'));
    }

    #[test]
    fn a_partly_emulating_kvm_is_not_usable() {
        if !Path::new("/sys/module/kvm_pvm").exists() {
            return;
        }
        let probe = probe_kvm();
        assert!(!probe.is_usable, "{probe:?}");
        assert!(probe.reason.contains("kvm_pvm"), "{probe:?}");
    }

    #[test]
    fn without_a_device_the_probe_says_so() {
        if Path::new("/dev/kvm").exists() {
            return;
        }
        let probe = probe_kvm();
        assert_eq!((probe.is_usable, probe.api_version), (false, None));
        assert!(probe.reason.contains("/dev/kvm"), "{probe:?}");
    }

    #[test]
    fn probing_again_and_again_gives_the_same_answer() {
        let first = probe_kvm();
        for _ in 0..20 {
            assert_eq!(probe_kvm(), first);
        }
    }
}
