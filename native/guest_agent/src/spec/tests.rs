use libcontainer::oci_spec::runtime::{Capability, LinuxNamespace, LinuxNamespaceType};
use proptest::prelude::*;
use protobuf::MessageField;

use super::*;

fn minimal() -> oci::Spec {
    let mut spec = oci::Spec::new();
    let mut process = oci::Process::new();
    process.Args = vec!["sh".into()];
    spec.Process = MessageField::some(process);
    spec.Root = MessageField::some(oci::Root::new());
    spec.Linux = MessageField::some(oci::Linux::new());
    spec
}

fn convert(source: &oci::Spec) -> Result<GuestSpec> {
    container(
        source,
        Path::new("/r"),
        "/c",
        &SharedNamespaces {
            ipc: Some("/ns/ipc".into()),
            ..Default::default()
        },
    )
}

fn add_namespace(spec: &mut oci::Spec, kind: &str) {
    let mut entry = oci::LinuxNamespace::new();
    entry.Type = kind.into();
    spec.Linux.mut_or_insert_default().Namespaces.push(entry);
}

#[test]
fn namespaces_are_completed_shared_and_never_network() {
    let mut source = minimal();
    for kind in ["mnt", "network", "ipc"] {
        add_namespace(&mut source, kind);
    }
    let converted = convert(&source).unwrap().spec;
    let list = converted
        .linux()
        .as_ref()
        .unwrap()
        .namespaces()
        .clone()
        .unwrap();
    let types: Vec<_> = list.iter().map(LinuxNamespace::typ).collect();
    assert!(types.contains(&LinuxNamespaceType::Pid));
    assert!(types.contains(&LinuxNamespaceType::Mount));
    assert!(!types.contains(&LinuxNamespaceType::Network));
    let ipc = list
        .iter()
        .find(|entry| entry.typ() == LinuxNamespaceType::Ipc)
        .unwrap();
    assert_eq!(ipc.path().as_deref(), Some(Path::new("/ns/ipc")));
}

#[test]
fn recursive_propagation_of_the_root_has_the_name_that_libcontainer_knows() {
    for (given, expected) in [
        ("", None),
        ("rshared", Some("shared")),
        ("rslave", Some("slave")),
        ("rprivate", Some("private")),
        ("slave", Some("slave")),
    ] {
        let mut source = minimal();
        source.Linux.mut_or_insert_default().RootfsPropagation = given.into();
        let converted = convert(&source).unwrap().spec;
        let linux = converted.linux().as_ref().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), expected);
    }
}

#[test]
fn unknown_namespace_is_invalid() {
    let mut source = minimal();
    add_namespace(&mut source, "moon");
    assert!(matches!(convert(&source), Err(AgentError::Invalid { .. })));
}

#[test]
fn both_capability_spellings_are_read_and_unknown_ones_dropped() {
    let mut source = minimal();
    let mut sets = oci::LinuxCapabilities::new();
    sets.Bounding = vec!["SYS_ADMIN".into(), "CAP_CHOWN".into(), "CAP_FLY".into()];
    source.Process.mut_or_insert_default().Capabilities = MessageField::some(sets);
    let converted = convert(&source).unwrap().spec;
    let process = converted.process().as_ref().unwrap();
    let bounding = process
        .capabilities()
        .as_ref()
        .unwrap()
        .bounding()
        .clone()
        .unwrap();
    assert_eq!(bounding, [Capability::SysAdmin, Capability::Chown].into());
}

#[test]
fn every_listed_capability_is_one_the_specification_knows() {
    let mut source = minimal();
    let mut sets = oci::LinuxCapabilities::new();
    sets.Bounding = caps::all().iter().map(ToString::to_string).collect();
    source.Process.mut_or_insert_default().Capabilities = MessageField::some(sets);
    let converted = convert(&source).unwrap().spec;
    let process = converted.process().as_ref().unwrap();
    let bounding = process
        .capabilities()
        .as_ref()
        .unwrap()
        .bounding()
        .clone()
        .unwrap();
    assert_eq!(bounding.len(), caps::all().len());
}

#[test]
fn network_sysctls_are_left_to_the_guest() {
    let mut source = minimal();
    let linux = source.Linux.mut_or_insert_default();
    linux
        .Sysctl
        .insert("net.ipv4.ip_forward".into(), "1".into());
    linux.Sysctl.insert("kernel/shmmax".into(), "9".into());
    let converted = convert(&source).unwrap();
    assert_eq!(
        converted.network_sysctls,
        [("net.ipv4.ip_forward".to_owned(), "1".to_owned())]
    );
    let sysctl = converted
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .sysctl()
        .clone()
        .unwrap();
    assert_eq!(sysctl.len(), 1);
}

#[test]
fn bind_options_decide_the_mount_type() {
    let mut source = minimal();
    let mut entry = oci::Mount::new();
    entry.destination = "/d".into();
    entry.type_ = "local".into();
    entry.source = "/s".into();
    entry.options = vec!["rbind".into()];
    source.Mounts.push(entry);
    let converted = convert(&source).unwrap().spec;
    let mounts = converted.mounts().as_ref().unwrap();
    assert_eq!(mounts[0].typ().as_deref(), Some("bind"));
}

#[test]
fn unlimited_is_kept_and_zero_is_absent() {
    let mut source = oci::LinuxResources::new();
    let mut memory = oci::LinuxMemory::new();
    memory.Limit = -1;
    source.Memory = MessageField::some(memory);
    source.Pids = MessageField::some(oci::LinuxPids::new());
    let converted = resources(&source).unwrap();
    let memory = converted.memory().as_ref().unwrap();
    assert_eq!(memory.limit(), Some(-1));
    assert_eq!(memory.swap(), None);
    assert!(converted.pids().is_none());
}

#[test]
fn seccomp_errno_zero_means_the_default() {
    let mut source = minimal();
    let mut rule = oci::LinuxSyscall::new();
    rule.Names = vec!["mkdir".into()];
    rule.Action = "SCMP_ACT_ERRNO".into();
    rule.set_errnoret(0);
    let mut profile = oci::LinuxSeccomp::new();
    profile.DefaultAction = "SCMP_ACT_ALLOW".into();
    profile.Architectures = vec!["SCMP_ARCH_X86_64".into()];
    profile.Syscalls = vec![rule];
    source.Linux.mut_or_insert_default().Seccomp = MessageField::some(profile);
    let converted = convert(&source).unwrap().spec;
    let seccomp = converted
        .linux()
        .as_ref()
        .unwrap()
        .seccomp()
        .clone()
        .unwrap();
    assert_eq!(seccomp.syscalls().as_ref().unwrap()[0].errno_ret(), None);
}

#[test]
fn unknown_seccomp_action_is_invalid() {
    let mut source = minimal();
    let mut profile = oci::LinuxSeccomp::new();
    profile.DefaultAction = "SCMP_ACT_DANCE".into();
    source.Linux.mut_or_insert_default().Seccomp = MessageField::some(profile);
    assert!(matches!(convert(&source), Err(AgentError::Invalid { .. })));
}

#[test]
fn process_without_capabilities_inherits_the_given_ones() {
    let mut source = oci::Process::new();
    source.Args = vec!["id".into()];
    let inherited = LinuxCapabilitiesFor::chown();
    let converted = process(&source, Some(&inherited)).unwrap();
    assert_eq!(converted.capabilities().as_ref(), Some(&inherited));
}

struct LinuxCapabilitiesFor;

impl LinuxCapabilitiesFor {
    fn chown() -> libcontainer::oci_spec::runtime::LinuxCapabilities {
        parse(
            "capabilities",
            json!({ "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"] }),
        )
        .unwrap()
    }
}

proptest! {
    #[test]
    fn arbitrary_strings_never_panic(args in prop::collection::vec(".*", 0..3),
                                     env in prop::collection::vec(".*", 0..3),
                                     kind in ".*", action in ".*", limit: i64) {
        let mut source = minimal();
        let process = source.Process.mut_or_insert_default();
        process.Args = args;
        process.Env = env;
        add_namespace(&mut source, &kind);
        let mut profile = oci::LinuxSeccomp::new();
        profile.DefaultAction = action;
        let linux = source.Linux.mut_or_insert_default();
        linux.Seccomp = MessageField::some(profile);
        let mut memory = oci::LinuxMemory::new();
        memory.Limit = limit;
        linux.Resources.mut_or_insert_default().Memory = MessageField::some(memory);
        let _ = convert(&source);
    }
}
