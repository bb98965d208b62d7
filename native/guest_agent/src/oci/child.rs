//! `kata-agent oci`: makes one container or one process with libcontainer, then ends.
//!
//! Single-threaded. Its standard streams are those of the new process; [`CONTROL_FD`] leads to the
//! agent. See the module above for the exchange.

use std::os::fd::BorrowedFd;
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::executor::AgentExecutor;
use super::notes::NoteSubscriber;
use super::{CONTROL_FD, FAILURE_FD, Order, OrderKind, PACKET_BYTES, Report};
use crate::error::chain;

/// Runs the child.
pub(crate) fn main() -> ExitCode {
    // SAFETY: the agent passes this descriptor to every child, and it stays open until that ends.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    // SAFETY: as above.
    let failure = unsafe { BorrowedFd::borrow_raw(FAILURE_FD) };
    // Without these two somebody else started us.
    if fcntl_setfd(control, FdFlags::CLOEXEC).is_err()
        || fcntl_setfd(failure, FdFlags::CLOEXEC).is_err()
    {
        return ExitCode::FAILURE;
    }
    // Only fails when set twice.
    let _ = tracing::subscriber::set_global_default(NoteSubscriber { control });
    let report = match receive(control).and_then(|order| carry_out(&order)) {
        Ok(pid) => Report::Done { pid },
        Err(text) => Report::Failed(text),
    };
    let is_done = matches!(report, Report::Done { .. });
    let sent = serde_json::to_vec(&report)
        .is_ok_and(|packet| send(control, &packet, SendFlags::NOSIGNAL).is_ok());
    if !sent {
        return ExitCode::FAILURE;
    }
    if is_done {
        // Returns when the agent has registered the pid, or is gone.
        let _ = recv(control, &mut [0_u8; 1], RecvFlags::empty());
    }
    ExitCode::SUCCESS
}

fn receive(control: BorrowedFd<'_>) -> Result<Order, String> {
    let mut packet = vec![0; PACKET_BYTES];
    let (length, _) = recv(control, packet.as_mut_slice(), RecvFlags::empty())
        .map_err(|error| format!("receive order: {error}"))?;
    serde_json::from_slice(packet.get(..length).unwrap_or_default())
        .map_err(|error| format!("read order: {error}"))
}

fn carry_out(order: &Order) -> Result<i32, String> {
    make(order).map_err(|error| chain(&error))
}

fn make(order: &Order) -> Result<i32, LibcontainerError> {
    let builder = ContainerBuilder::new(order.container_id.clone(), SyscallType::default())
        .with_root_path(&order.state_root)?
        .with_console_socket(order.console_socket.as_ref())
        .validate_id()?;
    match &order.kind {
        OrderKind::Create { bundle } => {
            let container = builder
                .with_executor(AgentExecutor::default())
                .as_init(bundle)
                .with_systemd(false)
                .with_detach(true)
                .build()?;
            match container.pid() {
                Some(pid) => Ok(pid.as_raw()),
                None => Err(LibcontainerError::Other("container has no process".into())),
            }
        }
        OrderKind::Exec(exec) => {
            let seccomp = match &exec.seccomp_from {
                Some(path) => Spec::load(path)?
                    .linux()
                    .as_ref()
                    .and_then(|linux| linux.seccomp().clone()),
                None => None,
            };
            let executor = AgentExecutor {
                seccomp,
                restricted: exec.restricted.clone(),
                ..AgentExecutor::default()
            };
            let pid = builder
                .with_executor(executor)
                .as_tenant()
                .with_detach(true)
                .with_process(Some(&exec.process))
                .with_sub_cgroup(exec.sub_cgroup.clone())
                .build()?;
            Ok(pid.as_raw())
        }
    }
}
