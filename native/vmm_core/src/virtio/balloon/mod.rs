//! Memory balloon (virtio 1.2, 5.5): the guest gives memory back that it can do without.
//!
//! Two ways: the host sets a target and the driver inflates towards it, page by page; or the
//! driver reports what is free, in large ranges, whenever some is, and takes it again without
//! asking. Kata wants the second (`reclaim_guest_freed_memory`). Statistics and free page hints
//! are not offered: the guest's agent knows more, and hints are for migration.
//!
//! Made while the machine is built; [`BalloonControl`] is what stays with the control plane.

mod control;
mod device;
mod metrics;
mod pages;
mod state;

pub use control::BalloonControl;
pub use device::Balloon;

/// What a balloon is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Pages the guest is to give up, of 4 KiB each.
    pub target_pages: u32,
    /// The guest may take pages back before it kills a process for want of memory.
    pub deflates_on_oom: bool,
    /// The guest reports free pages.
    pub reports_free_pages: bool,
}
