//! `kata_hybrid._native.vmm`: machines in this process, and what this host can run.
//!
//! One file for each thing the module has. Every call that makes, changes or waits for a machine
//! runs detached from the interpreter; what a machine reports by itself goes to the event port
//! (`reports`), from threads that never attach.

mod balloon;
mod config;
mod devices;
mod exit;
mod limit;
mod machine;
mod metrics;
mod probe;
mod reports;

pub(crate) use balloon::Balloon;
pub(crate) use config::VmConfig;
pub(crate) use exit::VmExit;
pub(crate) use limit::Limit;
pub(crate) use machine::Vm;
pub(crate) use metrics::DeviceMetrics;
pub(crate) use probe::{KvmProbe, probe_kvm};
