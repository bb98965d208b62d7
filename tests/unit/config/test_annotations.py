import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.config.annotations import PREFIX, annotated
from kata_hybrid.config.model import (
    ANY,
    BuiltinConfig,
    Config,
    HypervisorName,
    NetworkModel,
    QemuConfig,
    RuntimeConfig,
)
from kata_hybrid.errors import InvalidSpecError

H = "hypervisor."


def config(**qemu: Any) -> Config:
    """QEMU is chosen, and its pods may use any annotation."""
    return Config(
        qemu=QemuConfig(**{"enable_annotations": ANY, **qemu}),
        runtime=RuntimeConfig(hypervisor_name=HypervisorName.QEMU),
    )


def refused(before: Config, name: str, text: str) -> str:
    with pytest.raises(InvalidSpecError) as caught:
        annotated(before, {PREFIX + name: text})
    assert PREFIX + name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("default_vcpus", "2.5", "default_vcpus", 2.5),
        ("default_max_vcpus", "3", "max_vcpus", 3),
        ("default_memory", "512", "memory_mib", 512),
        ("default_memory", " 512M ", "memory_mib", 512),
        ("default_memory", "2 GiB", "memory_mib", 2048),
        ("default_memory", "1g", "memory_mib", 1024),
        ("default_memory", "262144k", "memory_mib", 256),
        ("kernel", "/k", "kernel", Path("/k")),
        ("initrd", "/i", "initrd", Path("/i")),
        ("machine_type", "q35", "machine_type", "q35"),
        ("cpu_features", "pmu=off", "cpu_features", "pmu=off"),
    ],
)
def test_an_annotation_sets_its_key(name: str, text: str, field: str, value: object) -> None:
    assert getattr(annotated(config(), {PREFIX + H + name: text}).qemu, field) == value


def test_kernel_parameters_replace_those_of_the_same_name_and_follow_the_others() -> None:
    before = config(kernel_params=("a=1", "quiet", "b=2"))
    after = annotated(before, {PREFIX + H + "kernel_params": "b=3 quiet c"})
    assert after.qemu.kernel_params == ("a=1", "b=3", "quiet", "c")


def test_more_arguments_for_virtiofsd_follow_the_files() -> None:
    before = config(virtio_fs_extra_args=("-a",))
    after = annotated(before, {PREFIX + H + "virtio_fs_extra_args": "-b,-c"})
    assert after.qemu.virtio_fs_extra_args == ("-a", "-b", "-c")
    as_list = annotated(before, {PREFIX + H + "virtio_fs_extra_args": '["-o", "x,y"]'})
    assert as_list.qemu.virtio_fs_extra_args == ("-a", "-o", "x,y")
    assert annotated(before, {PREFIX + H + "virtio_fs_extra_args": ""}) == before


def test_the_most_processors_can_be_made_fewer_only() -> None:
    name = PREFIX + H + "default_max_vcpus"
    for asked, most in (("1", 1), ("64", 2), ("0", 2)):
        assert annotated(config(max_vcpus=2), {name: asked}).qemu.max_vcpus == most
    assert QemuConfig(default_vcpus=8, max_vcpus=2).vcpu_count(host_cpu_count=4) == 2


def test_other_annotations_are_none_of_ours() -> None:
    before = config()
    assert annotated(before, {"io.kubernetes.cri.sandbox-id": "x", "io.katacontainers.x": "y"}) == (
        before
    )


def test_runtime_and_agent_have_theirs() -> None:
    after = annotated(
        Config(),
        {
            PREFIX + "runtime.disable_guest_seccomp": "true",
            PREFIX + "runtime.internetworking_model": "none",
            PREFIX + "runtime.create_container_timeout": "7",
            PREFIX + "runtime.name": "virt-container",
            PREFIX + "agent.container_pipe_size": "4096",
        },
    )
    assert after.runtime.disable_guest_seccomp
    assert after.runtime.network_model is NetworkModel.NONE
    assert after.runtime.name == "virt_container"
    assert (after.agent.request_timeout_s, after.agent.container_pipe_size) == (7, 4096)


# --- what is allowed ------------------------------------------------------------------------------


def test_nothing_of_the_hypervisors_is_allowed_by_default() -> None:
    text = refused(Config(), H + "default_vcpus", "2")
    assert "not allowed" in text
    assert "enable_annotations" in text


def test_a_pattern_has_to_match_the_whole_name() -> None:
    allowing = config(enable_annotations=(re.compile("path"), re.compile("default_.*")))
    assert annotated(allowing, {PREFIX + H + "default_memory": "300"}).qemu.memory_mib == 300
    assert "not allowed" in refused(allowing, H + "jailer_path", "/j")


def test_a_monitor_that_the_annotation_chooses_has_its_own_list() -> None:
    before = Config(
        builtin=BuiltinConfig(enable_annotations=ANY),
        qemu=QemuConfig(),
        runtime=RuntimeConfig(hypervisor_name=HypervisorName.BUILTIN),
    )
    chosen = {PREFIX + "runtime.hypervisor_name": "qemu", PREFIX + H + "default_vcpus": "2"}
    with pytest.raises(InvalidSpecError, match="not allowed"):
        annotated(before, chosen)


def test_with_the_choice_open_an_annotation_counts_for_those_that_allow_it() -> None:
    before = Config(builtin=BuiltinConfig(enable_annotations=ANY))
    after = annotated(before, {PREFIX + H + "default_memory": "512"})
    assert (after.builtin.memory_mib, after.qemu.memory_mib) == (512, 2048)
    both = Config(
        builtin=BuiltinConfig(enable_annotations=ANY), qemu=QemuConfig(enable_annotations=ANY)
    )
    after = annotated(both, {PREFIX + H + "machine_accelerators": "accel=tcg"})
    assert after.qemu.machine_accelerators == "accel=tcg"
    assert after.notices == ()


def test_what_only_one_of_two_monitors_can_take_is_for_that_one() -> None:
    both = Config(
        builtin=BuiltinConfig(enable_annotations=ANY), qemu=QemuConfig(enable_annotations=ANY)
    )
    after = annotated(both, {PREFIX + H + "default_memory": "2T"})
    assert (after.builtin.memory_mib, after.qemu.memory_mib) == (2048, 2 << 20)
    assert "whole number" in refused(both, H + "default_memory", "99T")


def test_a_monitor_that_the_file_does_not_describe_cannot_be_chosen() -> None:
    before = Config(
        runtime=RuntimeConfig(hypervisor_name=HypervisorName.BUILTIN),
        described=frozenset({HypervisorName.BUILTIN}),
    )
    assert "does not describe qemu" in refused(before, "runtime.hypervisor_name", "qemu")
    assert annotated(before, {PREFIX + "runtime.hypervisor_name": "builtin"}) == before


def test_the_runtimes_list_can_be_shortened() -> None:
    before = Config(runtime=RuntimeConfig(enable_annotations=()))
    assert "not allowed" in refused(before, "runtime.disable_guest_seccomp", "true")
    assert "not allowed" in refused(before, "runtime.create_container_timeout", "1")


@pytest.mark.parametrize(
    ("name", "field", "key"),
    [
        ("path", "valid_paths", "valid_hypervisor_paths"),
        ("virtio_fs_daemon", "valid_virtio_fs_daemons", "valid_virtio_fs_daemon_paths"),
        ("entropy_source", "valid_entropy_sources", "valid_entropy_sources"),
    ],
)
def test_a_path_of_the_hosts_has_to_be_on_its_list(name: str, field: str, key: str) -> None:
    assert key in refused(config(), H + name, "/opt/a/b")
    listed = config(**{field: ("/usr/*", "/opt/?/b")})
    after = annotated(listed, {PREFIX + H + name: "/opt/a/b"})
    assert Path("/opt/a/b") in {
        getattr(after.qemu, each.name) for each in dataclasses.fields(QemuConfig)
    }
    assert key in refused(listed, H + name, "/opt/aa/b")
    for outside in ("/usr/../root/evil", "/usr/lib/evil", "/opt/../b", "/usr/..", "usr/x"):
        assert key in refused(listed, H + name, outside) or "absolute" in refused(
            listed, H + name, outside
        )


def test_a_pod_may_ask_to_be_in_its_cgroup_not_to_be_out_of_it() -> None:
    name = "runtime.sandbox_cgroup_only"
    allowing = config()
    assert not annotated(allowing, {PREFIX + name: "false"}).runtime.sandbox_cgroup_only
    inside = annotated(allowing, {PREFIX + name: "true"})
    assert inside.runtime.sandbox_cgroup_only
    assert "only the configuration" in refused(inside, name, "false")


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (H + "default_vcpus", "two", "a number"),
        (H + "default_vcpus", "nan", "a number"),
        (H + "default_vcpus", "1e9", "a number"),
        (H + "default_vcpus", "1_0", "a number"),
        (H + "default_vcpus", "٣", "a number"),
        (H + "default_vcpus", "2000", "a number of at most"),
        (H + "default_max_vcpus", "9" * 5000, "a whole number"),
        (H + "virtio_fs_extra_args", "[1]", "a text"),
        (H + "virtio_fs_extra_args", "[", "in JSON"),
        (H + "default_max_vcpus", "-1", "a whole number"),
        (H + "default_memory", "much", "a size such as"),
        (H + "default_memory", "1.5G", "a size such as"),
        (H + "default_memory", "", "a size such as"),
        (H + "default_memory", "64", "whole number from 128"),
        (H + "default_memory", "9" * 40, "a size such as"),
        (H + "default_memory", "9" * 18, "whole number from 128"),
        (H + "kernel", "vmlinux", "an absolute path"),
        (H + "kernel_params", 'a="b', "closed quotes"),
        (H + "machine_type", "pc", "one of q35"),
        ("runtime.disable_guest_seccomp", "yes", "true or false"),
        ("runtime.sandbox_cgroup_only", "no", "true or false"),
        ("runtime.name", "wasm-container", "one of virt_container"),
        ("runtime.hypervisor_name", "clh", "one of builtin, qemu"),
        ("agent.container_pipe_size", "²", "a whole number"),
        (H + "no_such_thing", "1", "unknown"),
        ("runtime.no_such_thing", "1", "unknown"),
        ("image.name", "1", "hypervisor, agent, runtime"),
        ("hypervisor", "1", "unknown"),
        ("", "1", "hypervisor, agent, runtime"),
    ],
)
def test_a_wrong_annotation_is_named_with_what_was_expected(
    name: str, text: str, expected: str
) -> None:
    assert expected in refused(config(), name, text)


@pytest.mark.parametrize("name", ["kernel_verity_params", "rootless", "jailer_path", "image"])
def test_what_would_leave_a_guest_less_protected_is_refused(name: str) -> None:
    assert "not implemented" in refused(config(), H + name, "true")
    assert annotated(config(), {PREFIX + H + name: ""}) == config()


def test_the_rest_of_katas_is_noted_unless_it_is_off() -> None:
    name = PREFIX + H + "enable_iommu"
    assert annotated(config(), {name: "true"}).notices == (f"{name} = 'true'",)
    assert annotated(config(), {name: "false"}) == config()
    for harmless, text in (
        ("block_device_queue_size", "64"),
        ("network_queues", "1"),
        ("enable_iommu", " false "),
        ("rootless", " false "),
        ("pcie_root_port", "0"),
    ):
        assert annotated(config(), {PREFIX + H + harmless: text}) == config()


NAMES = st.text("abcdefhiknoprstuvy_.", max_size=24)


@given(
    st.dictionaries(
        st.builds(
            lambda part, name: f"{PREFIX}{part}.{name}",
            st.sampled_from(["hypervisor", "agent", "runtime", "x"]),
            st.one_of(
                NAMES,
                st.sampled_from(
                    ["default_memory", "default_vcpus", "kernel_params", "path", "name"]
                ),
            ),
        ),
        st.text(max_size=12),
        max_size=4,
    )
)
def test_any_annotations_are_taken_or_named(annotations: dict[str, str]) -> None:
    try:
        after = annotated(config(), annotations)
    except InvalidSpecError as error:
        assert any(name in str(error) for name in annotations)  # noqa: PT017 - either is right
    else:
        # The same whatever the order of the map.
        assert annotated(config(), dict(reversed(annotations.items()))) == after
