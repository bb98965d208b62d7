//! From the wire form of an OCI spec to the spec libcontainer reads.
//!
//! The wire cannot tell zero from absent; the rules for that are here and in `resources`. The
//! result goes through the OCI crate's own parser, so an unknown word in an enumeration is an
//! `INVALID_ARGUMENT` and never a panic. Called by `container` before anything is created.

mod process;
mod resources;

use std::collections::HashMap;
use std::path::Path;

use libcontainer::oci_spec::runtime::Spec;
use protocols::oci;
use serde_json::{Map, Value, json};

pub(crate) use process::process;
pub(crate) use resources::resources;

use crate::error::{AgentError, Result};

/// What a container shares with its sandbox, as paths of namespace files.
#[derive(Debug, Default, Clone)]
pub(crate) struct SharedNamespaces {
    pub(crate) ipc: Option<String>,
    pub(crate) uts: Option<String>,
    pub(crate) pid: Option<String>,
}

/// A converted spec and what the agent has to do itself.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    pub(crate) spec: Spec,
    /// `net.*` keys: the pod's network namespace is the guest's own.
    pub(crate) network_sysctls: Vec<(String, String)>,
    /// What was left out, for the log.
    pub(crate) ignored: Vec<&'static str>,
}

/// Converts a container's spec; its root becomes `root`.
///
/// # Errors
/// A part that is required is missing, or a value is not one the OCI specification knows.
pub(crate) fn container(
    source: &oci::Spec,
    root: &Path,
    cgroups_path: &str,
    shared: &SharedNamespaces,
) -> Result<GuestSpec> {
    let linux = source
        .Linux
        .as_ref()
        .ok_or_else(|| AgentError::invalid("OCI spec", "linux section is missing"))?;
    let mut ignored = Vec::new();
    let mut network_sysctls = Vec::new();
    let mut section = linux_section(linux, cgroups_path, shared, &mut ignored)?;
    let mut sysctl = HashMap::new();
    for (key, value) in &linux.Sysctl {
        let key = key.replace('/', ".");
        if key.starts_with("net.") {
            network_sysctls.push((key, value.clone()));
        } else {
            sysctl.insert(key, value.clone());
        }
    }
    insert_unless(&mut section, "sysctl", sysctl.is_empty(), json!(sysctl));
    if let Some(profile) = linux
        .Seccomp
        .as_ref()
        .filter(|p| !p.DefaultAction.is_empty())
    {
        section.insert("seccomp".into(), seccomp(profile));
    }

    let has_uts = linux.Namespaces.iter().any(|ns| ns.Type == "uts");
    let process_source = source
        .Process
        .as_ref()
        .ok_or_else(|| AgentError::invalid("OCI spec", "process section is missing"))?;
    let mut value = json!({
        "ociVersion": if source.Version.starts_with("1.") { source.Version.as_str() } else { "1.0.2" },
        "process": process::json_form(process_source, None)?,
        "root": {
            "path": root,
            "readonly": source.Root.as_ref().is_some_and(|root| root.Readonly),
        },
        "mounts": source.Mounts.iter().map(mount).collect::<Vec<_>>(),
        "annotations": source.Annotations,
        "linux": section,
    });
    if let Some(map) = value.as_object_mut() {
        insert_unless(
            map,
            "hostname",
            source.Hostname.is_empty() || !has_uts,
            json!(source.Hostname),
        );
        if let Some(hooks) = source.Hooks.as_ref() {
            let start: Vec<Value> = hooks.StartContainer.iter().map(hook).collect();
            if !start.is_empty() {
                map.insert("hooks".into(), json!({ "startContainer": start }));
            }
            if hooks.Prestart.len()
                + hooks.Poststart.len()
                + hooks.Poststop.len()
                + hooks.CreateRuntime.len()
                + hooks.CreateContainer.len()
                > 0
            {
                ignored.push("hooks that belong to the host");
            }
        }
    }
    Ok(GuestSpec {
        spec: parse("OCI spec", value)?,
        network_sysctls,
        ignored,
    })
}

fn linux_section(
    linux: &oci::Linux,
    cgroups_path: &str,
    shared: &SharedNamespaces,
    ignored: &mut Vec<&'static str>,
) -> Result<Map<String, Value>> {
    let mut section = Map::new();
    section.insert("cgroupsPath".into(), json!(cgroups_path));
    section.insert("namespaces".into(), namespaces(linux, shared)?);
    section.insert("devices".into(), linux.Devices.iter().map(device).collect());
    if let Some(limits) = linux.Resources.as_ref() {
        section.insert("resources".into(), resources::json_form(limits));
        if !limits.Devices.is_empty() {
            ignored.push("device cgroup rules");
        }
    }
    for (key, paths) in [
        ("maskedPaths", &linux.MaskedPaths),
        ("readonlyPaths", &linux.ReadonlyPaths),
    ] {
        insert_unless(&mut section, key, paths.is_empty(), json!(paths));
    }
    // libcontainer knows the recursive kinds by the names of the others, and has no others.
    let propagation = linux.RootfsPropagation.as_str();
    insert_unless(
        &mut section,
        "rootfsPropagation",
        propagation.is_empty(),
        json!(propagation.strip_prefix('r').unwrap_or(propagation)),
    );
    if !linux.MountLabel.is_empty() {
        ignored.push("SELinux mount label");
    }
    if linux.IntelRdt.is_some() {
        ignored.push("Intel RDT");
    }
    Ok(section)
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(what: &'static str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|error| AgentError::invalid(what, error.to_string()))
}

fn insert_unless(map: &mut Map<String, Value>, key: &str, absent: bool, value: Value) {
    if !absent {
        map.insert(key.to_owned(), value);
    }
}

/// Both spellings of a namespace are in use; the agent adds `pid`, `mount` and `cgroup` itself and
/// never makes a network namespace.
fn namespaces(linux: &oci::Linux, shared: &SharedNamespaces) -> Result<Value> {
    let mut list = vec![
        namespace("pid", shared.pid.as_deref()),
        namespace("mount", None),
        namespace("cgroup", None),
    ];
    for entry in &linux.Namespaces {
        match entry.Type.as_str() {
            "ipc" => list.push(namespace("ipc", shared.ipc.as_deref())),
            "uts" => list.push(namespace("uts", shared.uts.as_deref())),
            "user" => return Err(AgentError::Unimplemented("a user namespace")),
            "pid" | "mount" | "mnt" | "cgroup" | "network" | "net" | "time" => {}
            other => {
                return Err(AgentError::invalid(
                    "OCI spec",
                    format!("unknown namespace type {other:?}"),
                ));
            }
        }
    }
    Ok(Value::Array(list))
}

fn namespace(kind: &str, path: Option<&str>) -> Value {
    match path {
        Some(path) => json!({ "type": kind, "path": path }),
        None => json!({ "type": kind }),
    }
}

fn mount(source: &oci::Mount) -> Value {
    // Runtimes send bind mounts with other types (`local`); the options say what they are.
    let is_bind = source
        .options
        .iter()
        .any(|option| option == "bind" || option == "rbind");
    let kind = if is_bind {
        "bind"
    } else {
        source.type_.as_str()
    };
    let mut value = json!({ "destination": source.destination, "options": source.options });
    if let Some(map) = value.as_object_mut() {
        insert_unless(map, "type", kind.is_empty(), json!(kind));
        insert_unless(
            map,
            "source",
            source.source.is_empty(),
            json!(source.source),
        );
    }
    value
}

fn hook(source: &oci::Hook) -> Value {
    let mut value = json!({ "path": source.Path, "args": source.Args, "env": source.Env });
    if let Some(map) = value.as_object_mut() {
        insert_unless(map, "timeout", source.Timeout <= 0, json!(source.Timeout));
    }
    value
}

fn device(source: &oci::LinuxDevice) -> Value {
    const DEFAULT_MODE: u32 = 0o666;
    json!({
        "path": source.Path,
        "type": source.Type,
        "major": source.Major,
        "minor": source.Minor,
        "fileMode": if source.FileMode == 0 { DEFAULT_MODE } else { source.FileMode },
        "uid": source.UID,
        "gid": source.GID,
    })
}

fn seccomp(source: &oci::LinuxSeccomp) -> Value {
    let mut value = json!({
        "defaultAction": source.DefaultAction,
        "syscalls": source.Syscalls.iter().map(syscall).collect::<Vec<_>>(),
    });
    if let Some(map) = value.as_object_mut() {
        let architectures = &source.Architectures;
        insert_unless(
            map,
            "architectures",
            architectures.is_empty(),
            json!(architectures),
        );
        insert_unless(map, "flags", source.Flags.is_empty(), json!(source.Flags));
    }
    value
}

fn syscall(source: &oci::LinuxSyscall) -> Value {
    let args: Vec<Value> = source
        .Args
        .iter()
        .map(|arg| {
            json!({ "index": arg.Index, "value": arg.Value, "valueTwo": arg.ValueTwo, "op": arg.Op })
        })
        .collect();
    let mut value = json!({ "names": source.Names, "action": source.Action });
    if let Some(map) = value.as_object_mut() {
        // Senders put 0 where the profile says nothing, and nothing means EPERM.
        let errno = source.errnoret();
        insert_unless(map, "errnoRet", errno == 0, json!(errno));
        insert_unless(map, "args", args.is_empty(), json!(args));
    }
    value
}

#[cfg(test)]
mod tests;
