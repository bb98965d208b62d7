//! System-level KVM calls: opening `/dev/kvm`, making a machine, guest memory, and running a
//! processor so that a signal ends the run.
//!
//! The only file that hands raw memory or signals to the kernel; each `unsafe` says why it is
//! sound. Called by the probe on its own thread.

#![expect(
    unsafe_code,
    reason = "memory slots, signal masks and exit records have no safe interface"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, Weak};

use kvm_bindings::{KVM_API_VERSION, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use virtio_core::ram::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use crate::lock::lock;
use crate::register_page::{PAGE_SIZE, RegisterPage};

/// Tries before a machine that signals keep from being made is given up.
const CREATE_VM_TRIES: usize = 5;
/// `KVM_SET_SIGNAL_MASK`: `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
/// Bytes of the kernel's signal set, as opposed to the C library's.
const KERNEL_SIGSET_SIZE: u32 = 8;

/// Why KVM could not be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// the device file is not there
    #[error("/dev/kvm does not exist: no KVM in this kernel, or its module is not loaded")]
    Absent,
    /// the device file may not be opened
    #[error("/dev/kvm may not be opened by this user: permission denied")]
    PermissionDenied,
    /// the device file cannot be opened
    #[error("open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// an API that nobody has seen since 2007
    #[error("KVM API version is {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// a call failed
    #[error("{name}")]
    Call {
        /// The ioctl.
        name: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// guest memory could not be made
    #[error("allocate guest memory")]
    Allocate(#[source] vm_memory::mmap::FromRangesError),
    /// guest memory could not be written
    #[error("write guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

impl KvmError {
    /// For `map_err` on the call `name`.
    pub(crate) fn call(name: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Call { name, source }
    }
}

/// Open `/dev/kvm`.
///
/// # Errors
/// It is absent, forbidden, or fails otherwise.
pub fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::PermissionDenied,
        _ => KvmError::Open(error),
    })
}

/// Check that the API is the one this crate speaks; gives its version.
///
/// # Errors
/// It is another.
pub fn check_api_version(kvm: &Kvm) -> Result<i32, KvmError> {
    let version = kvm.get_api_version();
    if u32::try_from(version) == Ok(KVM_API_VERSION) {
        Ok(version)
    } else {
        Err(KvmError::ApiVersion(version))
    }
}

/// Make an empty machine. Signals can interrupt this call, so it is tried again.
///
/// # Errors
/// `KVM_CREATE_VM` failed.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut tries = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && tries < CREATE_VM_TRIES => tries += 1,
            result => return result.map_err(KvmError::call("KVM_CREATE_VM")),
        }
    }
}

/// A machine and the memory its guest lives in, which goes last.
#[derive(Debug)]
pub struct MappedVm {
    /// The machine. Fields drop in order: no slot refers to memory that is gone.
    pub vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    register_pages: Vec<Arc<RegisterPage>>,
}

impl MappedVm {
    /// Give `vm` the ranges of `ram` as slots 0, 1, …
    ///
    /// # Errors
    /// `KVM_SET_USER_MEMORY_REGION` failed.
    pub fn new(vm: VmFd, ram: Arc<GuestRam>) -> Result<Self, KvmError> {
        for (slot, (address, len)) in (0u32..).zip(ram.ranges()) {
            let entry = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: address,
                memory_size: len,
                // Ranges have their first byte.
                userspace_addr: ram.host_address(address).unwrap_or(0) as u64,
            };
            // SAFETY: the range is a mapping owned by `ram`, which is kept in the same value as
            // `vm` and dropped after it. Ranges do not overlap (vm-memory checks that), slots are
            // distinct, and Rust code reaches the memory only by raw copies and volatile access.
            unsafe { vm.set_user_memory_region(entry) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(Self {
            vm: Arc::new(vm),
            ram,
            register_pages: Vec::new(),
        })
    }

    /// Let the guest read `page` at `address`, if this KVM can have memory that is only read;
    /// writes leave the guest as before.
    ///
    /// # Errors
    /// `KVM_SET_USER_MEMORY_REGION` failed.
    pub fn add_register_page(
        &mut self,
        page: Arc<RegisterPage>,
        address: u64,
    ) -> Result<(), KvmError> {
        if !self.vm.check_extension(Cap::ReadonlyMem) {
            return Ok(());
        }
        let slots = self.ram.ranges().count() + self.register_pages.len();
        let entry = kvm_userspace_memory_region {
            slot: u32::try_from(slots).unwrap_or(u32::MAX),
            flags: KVM_MEM_READONLY,
            guest_phys_addr: address,
            memory_size: PAGE_SIZE as u64,
            userspace_addr: page.host_address(),
        };
        // SAFETY: the page is a mapping of its own, kept in the same value as `vm` and dropped
        // after it; slots are distinct. The guest only reads it, and Rust code reaches it by
        // atomic accesses only.
        unsafe { self.vm.set_user_memory_region(entry) }
            .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        self.register_pages.push(page);
        Ok(())
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Have a write to `fd`, an eventfd, raise `gsi`.
    ///
    /// # Errors
    /// `KVM_IRQFD` failed.
    pub fn register_irqfd(&self, fd: impl AsFd, gsi: u32) -> Result<(), KvmError> {
        self.vm
            .register_irqfd(&event_fd(fd)?, gsi)
            .map_err(KvmError::call("KVM_IRQFD"))
    }

    /// The line of `gsi`, for a device.
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine {
            vm: Arc::downgrade(&self.vm),
            gsi,
            turn: Mutex::new(()),
        }
    }

    /// Have a guest's 32-bit write of `value` to `address` signal `fd`, an eventfd.
    ///
    /// # Errors
    /// `KVM_IOEVENTFD` failed.
    pub fn register_ioeventfd(
        &self,
        fd: impl AsFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(&event_fd(fd)?, &IoEventAddress::Mmio(address), value)
            .map_err(KvmError::call("KVM_IOEVENTFD"))
    }
}

/// A pin of the machine's interrupt controllers, edge triggered.
///
/// An irqfd would do the same, but for such a pin the kernel has a worker thread raise it, and a
/// switch to another thread and back for every interrupt costs more than these two calls.
#[derive(Debug)]
pub struct IrqLine {
    /// Devices may be kept for longer than the machine.
    vm: Weak<VmFd>,
    gsi: u32,
    /// An edge that another thread has not taken down yet would hide this one.
    turn: Mutex<()>,
}

impl IrqLine {
    /// Interrupt the guest, if it is still there.
    pub fn pulse(&self) {
        let Some(vm) = self.vm.upgrade() else {
            return;
        };
        let _turn = lock(&self.turn);
        for is_active in [true, false] {
            // Fails only in another process than the machine's, or without interrupt controllers.
            let _done = vm.set_irq_line(self.gsi, is_active);
        }
    }
}

/// A second descriptor of an eventfd in the type that kvm-ioctls wants. The kernel keeps the
/// eventfd itself, so this one may be closed again.
fn event_fd(fd: impl AsFd) -> Result<EventFd, KvmError> {
    let copy = fd.as_fd().try_clone_to_owned().map_err(|error| {
        let errno = error.raw_os_error().unwrap_or(0);
        KvmError::call("duplicate an eventfd")(kvm_ioctls::Error::new(errno))
    })?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

/// Why a `KVM_RUN` ended, as far as the record of the exit tells.
///
/// `suberror` of `KVM_EXIT_INTERNAL_ERROR`; call it only after that exit.
pub fn internal_error_suberror(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: every member of this union is plain old data, so any bytes are a valid value of it;
    // after this exit the kernel has filled in the `internal` member.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// The signal that ends a run: the process's own use of it, if any, is not touched, because it
/// is only ever sent to a thread that blocks it.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Block every signal in the calling thread but those its own faults raise. A failure is not
/// reported: with these arguments `pthread_sigmask` has none.
pub(crate) fn block_signals() {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is valid for writes; sigfillset initialises it.
    unsafe { libc::sigfillset(set.as_mut_ptr()) };
    for fault in [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
    ] {
        // SAFETY: `set` was initialised above and `fault` is a valid signal.
        unsafe { libc::sigdelset(set.as_mut_ptr(), fault) };
    }
    // SAFETY: `set` is initialised; no old mask is asked for. Only this thread's mask changes.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut()) };
}

/// Have `KVM_RUN` of `vcpu` return EINTR when [`kick`] is used on this thread, before or during
/// the run. The thread has to block signals ([`block_signals`]); no handler ever runs.
///
/// # Errors
/// The kernel refused the mask.
pub(crate) fn make_kickable(vcpu: &VcpuFd) -> Result<(), KvmError> {
    /// `struct kvm_signal_mask` with its set.
    #[repr(C, packed)]
    struct SignalMask {
        len: u32,
        set: u64,
    }
    // While the guest runs, all but the kick stay blocked. Signal n is bit n - 1.
    let mask = SignalMask {
        len: KERNEL_SIGSET_SIZE,
        set: !(1 << (kick_signal() - 1)),
    };
    // SAFETY: the kernel reads `len`, then that many bytes after it, all inside of `mask`; the
    // descriptor is a vCPU's for as long as `vcpu` is borrowed.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    if result == 0 {
        return Ok(());
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    Err(KvmError::call("KVM_SET_SIGNAL_MASK")(
        kvm_ioctls::Error::new(errno),
    ))
}

/// Take the kick that ended a run, if one is pending: the next run would end at once otherwise.
pub(crate) fn consume_kick() {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is valid for writes; sigemptyset initialises it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: `set` was initialised above and the signal is a valid one.
    unsafe { libc::sigaddset(set.as_mut_ptr(), kick_signal()) };
    let no_wait = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `set` is initialised, `no_wait` valid; nothing is written (null is allowed).
    unsafe { libc::sigtimedwait(set.as_ptr(), std::ptr::null_mut(), &raw const no_wait) };
}

/// End the run of a thread that called [`make_kickable`].
pub(crate) fn kick<T>(thread: &std::thread::JoinHandle<T>) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the thread was not joined (we hold its handle), so its id is valid even if it has
    // ended. The signal is blocked there, so at most it stays pending until the thread ends.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_forbidden_devices_are_told_apart() {
        assert!(KvmError::Absent.to_string().contains("does not exist"));
        assert!(
            KvmError::PermissionDenied
                .to_string()
                .contains("permission denied")
        );
    }
}
