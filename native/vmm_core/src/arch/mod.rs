//! What differs between processors; nothing outside of this folder is per-architecture.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::probe_guest;
