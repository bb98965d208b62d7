//! The process part of a spec: arguments, environment, identity, capabilities, limits.

use libcontainer::oci_spec::runtime::{LinuxCapabilities, Process};
use protocols::oci;
use serde_json::{Value, json};

use super::{insert_unless, parse};
use crate::error::{AgentError, Result};

/// Names the kernel of the OCI crate's time knows; newer ones cannot be granted and are left out.
const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Converts a process to execute in a container. Without capabilities it gets `inherited`.
///
/// # Errors
/// As [`json_form`].
pub(crate) fn process(
    source: &oci::Process,
    inherited: Option<&LinuxCapabilities>,
) -> Result<Process> {
    parse("OCI process", json_form(source, inherited)?)
}

/// The process as OCI JSON.
///
/// # Errors
/// There are no arguments, or a string that goes to `execve` holds a NUL.
pub(super) fn json_form(
    source: &oci::Process,
    inherited: Option<&LinuxCapabilities>,
) -> Result<Value> {
    if source.Args.is_empty() {
        return Err(AgentError::invalid("OCI process", "args must not be empty"));
    }
    let strings = source.Args.iter().chain(&source.Env);
    if strings.chain([&source.Cwd]).any(|text| text.contains('\0')) {
        return Err(AgentError::invalid(
            "OCI process",
            "a string holds a NUL byte",
        ));
    }
    // Entries that name no variable cannot be set; other runtimes drop them too.
    let environment: Vec<&String> = source
        .Env
        .iter()
        .filter(|entry| entry.find('=').is_some_and(|at| at > 0))
        .collect();
    let user = source.User.get_or_default();
    let mut value = json!({
        "terminal": source.Terminal,
        "user": {
            "uid": user.UID,
            "gid": user.GID,
            "additionalGids": user.AdditionalGids,
        },
        "args": source.Args,
        "env": environment,
        "cwd": if source.Cwd.is_empty() { "/" } else { source.Cwd.as_str() },
        // Explicit even at zero: the agent's own score must not be inherited.
        "oomScoreAdj": source.OOMScoreAdj,
        "rlimits": source.Rlimits.iter().map(|limit| {
            json!({ "type": limit.Type, "hard": limit.Hard, "soft": limit.Soft })
        }).collect::<Vec<_>>(),
    });
    if let Some(map) = value.as_object_mut() {
        // An explicit `false` makes libcontainer load seccomp after it gave up the right to.
        insert_unless(map, "noNewPrivileges", !source.NoNewPrivileges, json!(true));
        let capabilities = match (source.Capabilities.as_ref(), inherited) {
            (Some(sets), _) => Some(capabilities(sets)),
            (None, Some(inherited)) => Some(json!(inherited)),
            (None, None) => None,
        };
        insert_unless(
            map,
            "capabilities",
            capabilities.is_none(),
            json!(capabilities),
        );
    }
    Ok(value)
}

fn capabilities(source: &oci::LinuxCapabilities) -> Value {
    json!({
        "bounding": capability_set(&source.Bounding),
        "effective": capability_set(&source.Effective),
        "inheritable": capability_set(&source.Inheritable),
        "permitted": capability_set(&source.Permitted),
        "ambient": capability_set(&source.Ambient),
    })
}

/// With and without the prefix, in any case.
fn capability_set(names: &[String]) -> Vec<String> {
    names
        .iter()
        .map(|name| {
            let upper = name.trim_matches('"').to_ascii_uppercase();
            upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
        })
        .filter(|name| CAPABILITIES.contains(&name.as_str()))
        .map(|name| format!("CAP_{name}"))
        .collect()
}
