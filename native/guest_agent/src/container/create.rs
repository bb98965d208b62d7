//! Making a container: storages, bundle, spec, first process; and undoing it when a step fails.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use libcontainer::oci_spec::runtime::Spec;
use protocols::agent::CreateContainerRequest;
use protocols::oci;

use super::bundle::Bundle;
use super::{CONSOLE_DIRECTORY, Container, STATE_ROOT, Status, free};
use crate::cgroup::Cgroup;
use crate::device;
use crate::error::{AgentError, IoContext, Result};
use crate::log;
use crate::oci::{Launched, Order, OrderKind, launch};
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::spec;
use crate::stdio::{Pipes, ProcessStdio, null_stdio};

/// Makes a container whose first process waits for the start.
///
/// # Errors
/// The id is taken or malformed, or a step fails; the steps before it are undone.
pub(crate) async fn create(sandbox: &Arc<Sandbox>, request: CreateContainerRequest) -> Result<()> {
    let id = request.container_id.clone();
    check_id(&id)?;
    if !request.shared_mounts.is_empty() {
        return Err(AgentError::Unimplemented(
            "a mount shared between containers",
        ));
    }
    let reserved = sandbox.reserve(&id)?;
    let source = request
        .OCI
        .as_ref()
        .ok_or_else(|| AgentError::invalid("request", "OCI spec is missing"))?;
    let linux = source.Linux.get_or_default();
    let cgroup = Cgroup::new(&linux.CgroupsPath, &id)?;
    let bundle = Bundle::new(&id);

    let mut source = source.clone();
    device::update_spec(&mut source, &request.devices, &sandbox.devices).await?;
    let storages = sandbox
        .storages
        .add(&request.storages, &sandbox.devices)
        .await?;
    let built = build(
        sandbox,
        &id,
        &source,
        request.sandbox_pidns,
        (&cgroup, &bundle),
        &storages,
    )
    .await;
    match built {
        Ok(container) => {
            reserved.insert(container);
            Ok(())
        }
        Err(error) => {
            let state = PathBuf::from(STATE_ROOT).join(&id);
            let _ = cgroup.kill();
            let freed = tokio::task::spawn_blocking(move || {
                // libcontainer removes its own state when it fails.
                if state.exists() {
                    free(&cgroup, &bundle, &state);
                } else {
                    let _ = cgroup.remove();
                    let _ = bundle.remove();
                }
            });
            let _ = freed.await;
            let _ = sandbox.storages.release(&storages).await;
            Err(error)
        }
    }
}

async fn build(
    sandbox: &Arc<Sandbox>,
    id: &str,
    source: &oci::Spec,
    is_pid_shared: bool,
    (cgroup, bundle): (&Cgroup, &Bundle),
    storages: &[PathBuf],
) -> Result<Container> {
    let shared = sandbox.shared_namespaces(is_pid_shared)?;
    let converted = spec::container(
        source,
        &bundle.rootfs(),
        &cgroup.relative().to_string_lossy(),
        &shared,
    )?;
    for ignored in converted.ignored {
        log::info("container", format!("{id}: not applied: {ignored}"));
    }
    apply_network_sysctls(&converted.network_sysctls)?;
    let spec = Arc::new(converted.spec);
    let root = source.Root.get_or_default().Path.clone();
    prepare(Arc::clone(&spec), bundle.clone(), root).await?;

    let order = Order {
        container_id: id.to_owned(),
        state_root: STATE_ROOT.into(),
        console_socket: None,
        kind: OrderKind::Create {
            bundle: bundle.directory().to_path_buf(),
        },
    };
    let wire = source.Process.get_or_default();
    let (process, launched) = run(sandbox, order, wire).await?;
    if sandbox.oom.watch(id, cgroup).is_err() {
        log::warning(
            "container",
            format!("{id}: memory events cannot be watched"),
        );
    }
    sandbox.record_pid_namespace(&process);
    let spec_process = spec.process().as_ref();
    Ok(Container {
        id: id.to_owned(),
        cgroup: cgroup.clone(),
        init: Arc::new(process),
        status: Mutex::new(Status::Created),
        execs: Mutex::new(HashMap::new()),
        failure: Mutex::new(Some(launched)),
        bundle: bundle.clone(),
        storages: storages.to_vec(),
        capabilities: spec_process.and_then(|process| process.capabilities().clone()),
        has_seccomp: spec
            .linux()
            .as_ref()
            .is_some_and(|linux| linux.seccomp().is_some()),
    })
}

async fn prepare(spec: Arc<Spec>, bundle: Bundle, root: String) -> Result<()> {
    tokio::task::spawn_blocking(move || {
        fs::create_dir_all(STATE_ROOT).on("create", STATE_ROOT)?;
        fs::create_dir_all(CONSOLE_DIRECTORY).on("create", CONSOLE_DIRECTORY)?;
        bundle.mount_root(&root)?;
        bundle.create_working_directory(&spec);
        bundle.write_config(&spec)
    })
    .await
    .map_err(|_| AgentError::TaskLost)?
}

/// Makes a process with the streams it asks for. The descriptor tells of a failed `execve`.
pub(super) async fn run(
    sandbox: &Arc<Sandbox>,
    order: Order,
    source: &oci::Process,
) -> Result<(Process, std::os::fd::OwnedFd)> {
    let uid = source.User.get_or_default().UID;
    let reaper = Arc::clone(&sandbox.reaper);
    if !source.Terminal {
        let pipes = Pipes::new(uid, sandbox.config.container_pipe_size)?;
        let (child, agent) = pipes.into_parts();
        let launched = launch(reaper, order, child, None).await?;
        let stdio = ProcessStdio::pipes(agent, &launched.exit)?;
        return Ok(finish(launched, stdio));
    }
    let mut launched = launch(reaper, order, null_stdio()?, Some(CONSOLE_DIRECTORY.into())).await?;
    let master = launched.console.take().ok_or(AgentError::NoTty)?;
    own_terminal(&master, uid)?;
    let stdio = ProcessStdio::terminal(master, &launched.exit)?;
    if let Some(size) = source.ConsoleSize.as_ref().filter(|size| size.Height > 0) {
        stdio.resize(size.Height, size.Width)?;
    }
    Ok(finish(launched, stdio))
}

fn finish(launched: Launched, stdio: ProcessStdio) -> (Process, std::os::fd::OwnedFd) {
    (
        Process::new(launched.pid, launched.exit, stdio),
        launched.failure,
    )
}

/// The terminal belongs to the process's user, or programs cannot reopen it.
fn own_terminal(master: &std::os::fd::OwnedFd, uid: u32) -> Result<()> {
    if uid == 0 {
        return Ok(());
    }
    let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
    let peer = rustix::pty::ioctl_tiocgptpeer(master, flags).during("open terminal")?;
    rustix::fs::fchown(&peer, Some(rustix::fs::Uid::from_raw(uid)), None).during("own terminal")
}

/// The pod's network namespace is the guest's own, so these are set here.
fn apply_network_sysctls(keys: &[(String, String)]) -> Result<()> {
    for (key, value) in keys {
        let is_plain = key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !is_plain || key.contains("..") {
            return Err(AgentError::invalid("sysctl", key.as_str()));
        }
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        fs::write(&path, value).on("write", path)?;
    }
    Ok(())
}

/// `[a-zA-Z0-9][a-zA-Z0-9_.-]+`, and short enough for a file name.
fn check_id(id: &str) -> Result<()> {
    const MAX_BYTES: usize = 200;
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let is_valid = (2..=MAX_BYTES).contains(&id.len())
        && id
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && id.bytes().all(is_word);
    if is_valid {
        Ok(())
    } else {
        Err(AgentError::invalid("container id", id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_file_names_of_known_characters() {
        for id in ["c1", "0a.b-c_d"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", "c", ".x", "a/b", "a\0", "..", "é1", &"x".repeat(201)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }

    #[test]
    fn sysctl_keys_cannot_leave_their_directory() {
        assert!(apply_network_sysctls(&[("net.../../x".into(), "1".into())]).is_err());
    }
}
