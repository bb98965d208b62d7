//! A page of registers that the guest reads as memory, without leaving its vCPU.
//!
//! ```text
//!   page:   |  unused  ...  | registers |      the next page:  | configuration space ...
//!           0             0xf00       0x1000                    read and written by exits
//! ```
//!
//! An interrupt makes its driver read the status register, and a read that leaves the guest costs
//! more than the rest of the interrupt. Reads of virtio-mmio's registers have no effect, so the
//! host keeps their values here and KVM has the page as read-only memory; writes still leave the
//! guest. The registers are the last of the page: what is behind them has to be asked for.

#![expect(unsafe_code, reason = "a mapping shared with the guest")]

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Bytes of the page.
pub const PAGE_SIZE: usize = 0x1000;
/// Bytes of registers, at the page's end (virtio 1.2, 4.2.2: configuration space is at 0x100).
pub const REGISTERS_SIZE: usize = 0x100;
/// Where they begin.
pub const REGISTERS_START: usize = PAGE_SIZE - REGISTERS_SIZE;

/// One device's page. The guest only reads it.
#[derive(Debug)]
pub struct RegisterPage {
    page: NonNull<AtomicU32>,
}

// SAFETY: the page is this value's own until it is dropped, and reached by atomic accesses only.
unsafe impl Send for RegisterPage {}
// SAFETY: see above.
unsafe impl Sync for RegisterPage {}

impl RegisterPage {
    /// A page whose registers are all zero.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new() -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let page =
            unsafe { mmap_anonymous(ptr::null_mut(), PAGE_SIZE, access, MapFlags::PRIVATE) }?;
        let page = NonNull::new(page.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { page })
    }

    /// The register at `offset`: a multiple of four below [`REGISTERS_SIZE`].
    pub(crate) fn register(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset < REGISTERS_SIZE && offset.is_multiple_of(4),
            "no register"
        );
        // SAFETY: the sum is less than the page's size, which is one mapping.
        let register = unsafe { self.page.byte_add(REGISTERS_START + offset) };
        // SAFETY: the page is mapped while `self` is borrowed, the register is aligned, any bytes
        // are a value, and all access is atomic.
        unsafe { register.as_ref() }
    }

    /// What the guest reads at `offset`; 0 where there is no register.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        match usize::try_from(offset) {
            Ok(offset) if offset < REGISTERS_SIZE && offset.is_multiple_of(4) => {
                self.register(offset).load(Ordering::SeqCst)
            }
            _ => 0,
        }
    }

    /// Where the page is, for KVM.
    pub(crate) fn host_address(&self) -> u64 {
        self.page.as_ptr().addr() as u64
    }
}

impl Drop for RegisterPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and no reference into it outlives `self`.
        let _unmapped = unsafe { munmap(self.page.as_ptr().cast(), PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_the_last_of_the_page() {
        let page = RegisterPage::new().unwrap();
        page.register(0).store(7, Ordering::SeqCst);
        page.register(0xfc).store(9, Ordering::SeqCst);
        assert_eq!((page.read(0), page.read(4), page.read(0xfc)), (7, 0, 9));
        assert_eq!(
            (page.read(2), page.read(0x100), page.read(u64::MAX)),
            (0, 0, 0)
        );
        let last = page.register(0xfc).as_ptr().addr() as u64;
        assert_eq!(last, page.host_address() + 0xffc);
        assert!(page.host_address().is_multiple_of(0x1000));
    }

    #[test]
    #[should_panic = "no register"]
    fn there_is_nothing_behind_them() {
        RegisterPage::new().unwrap().register(0x100);
    }
}
