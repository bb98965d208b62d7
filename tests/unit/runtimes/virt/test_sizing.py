import json
import os
from typing import Any

import pytest

from kata_hybrid.config.model import BuiltinConfig, Config, QemuConfig, RuntimeConfig
from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.runtimes.oci.spec import Spec, parse
from kata_hybrid.runtimes.virt.sizing import Limits, bounded, sandbox_limits, sized

_MIB = 1 << 20


def spec(*, annotations: dict[str, str] | None = None, resources: object = None) -> Spec:
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/"},
        "annotations": annotations or {},
        "linux": {"resources": resources},
    }
    return parse(json.dumps(document).encode())


def pod(**limits: str) -> Spec:
    named = {f"io.kubernetes.cri.sandbox-{name.replace('_', '-')}": limits[name] for name in limits}
    annotations = {"io.kubernetes.cri.container-type": "sandbox", **named}
    # The pause container's own, which are not the pod's.
    return spec(annotations=annotations, resources={"memory": {"limit": 5 * _MIB}})


def test_a_pods_limits_are_in_its_annotations() -> None:
    limits = sandbox_limits(pod(cpu_quota="150000", cpu_period="100000", memory="268435456"))
    assert limits == Limits(cpus=1.5, memory_bytes=256 * _MIB)


def test_a_single_containers_limits_are_its_own() -> None:
    resources = {"cpu": {"quota": 50000, "period": 100000}, "memory": {"limit": 64 * _MIB}}
    assert sandbox_limits(spec(resources=resources)) == Limits(cpus=0.5, memory_bytes=64 * _MIB)


@pytest.mark.parametrize(
    "limited",
    [
        pod(cpu_quota="250000"),
        spec(resources={"cpu": {"quota": 250000}}),
        spec(resources={"cpu": {"quota": 250000, "period": 0}}),
    ],
)
def test_a_quota_alone_is_of_the_kernels_period(limited: Spec) -> None:
    assert sandbox_limits(limited) == Limits(cpus=2.5)


@pytest.mark.parametrize(
    "unlimited",
    [
        pod(),
        pod(cpu_quota="0", cpu_period="100000", memory="0"),
        pod(cpu_quota="-1", cpu_period="100000", memory="-1"),
        spec(),
        spec(resources={"cpu": {"quota": -1, "period": 100000}, "memory": {"limit": -1}}),
        spec(resources={"cpu": None, "memory": {"limit": None}}),
    ],
)
def test_no_limit_is_no_limit(unlimited: Spec) -> None:
    assert sandbox_limits(unlimited) == Limits()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (pod(memory="1_000"), "io.kubernetes.cri.sandbox-memory = '1_000'"),
        (pod(memory="1G"), "io.kubernetes.cri.sandbox-memory = '1G'"),
        (pod(cpu_quota="0x10", cpu_period="1"), "io.kubernetes.cri.sandbox-cpu-quota = '0x10'"),
        (spec(resources={"memory": {"limit": 1.5}}), "linux.resources: memory = 1.5"),
        (spec(resources={"cpu": {"quota": True}}), "linux.resources: cpu-quota = True"),
        (spec(resources={"cpu": {"quota": 1 << 64}}), "linux.resources: cpu-quota = 18446744"),
        (pod(memory="9" * 5000), "io.kubernetes.cri.sandbox-memory = '999"),
        (spec(resources={"cpu": [1]}), "linux.resources.cpu must be an object"),
    ],
)
def test_a_limit_that_is_no_number_is_named(wrong: Spec, named: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        sandbox_limits(wrong)
    assert named in str(caught.value)


def test_each_limit_sizes_only_what_it_limits() -> None:
    plain = Config(builtin=BuiltinConfig(default_vcpus=3.0, memory_mib=512))
    by_memory = sized(plain, Limits(memory_bytes=100 * _MIB)).builtin
    assert (by_memory.default_vcpus, by_memory.memory_mib) == (3.0, 228)
    by_cpus = sized(plain, Limits(cpus=1.5)).builtin
    assert (by_cpus.default_vcpus, by_cpus.memory_mib) == (1.5, 512)
    assert sized(plain, Limits()) == plain


def test_what_the_machine_itself_needs_is_added() -> None:
    table = QemuConfig(overhead_vcpus=0.6, overhead_memory_mib=33)
    qemu = sized(Config(qemu=table), Limits(cpus=1.5, memory_bytes=300 * _MIB + 1)).qemu
    assert qemu.vcpu_count(host_cpu_count=16) == 3
    assert qemu.memory_mib == 334


def test_a_machine_is_neither_too_small_nor_larger_than_its_host() -> None:
    config = Config(builtin=BuiltinConfig(overhead_memory_mib=0))
    small = sized(config, Limits(cpus=0.01, memory_bytes=1)).builtin
    assert (small.vcpu_count(), small.memory_mib) == (1, 128)
    host_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MIB
    large = bounded(sized(config, Limits(cpus=1e6, memory_bytes=1 << 62)))
    assert large.builtin.vcpu_count(host_cpu_count=8) == 8
    assert large.builtin.memory_mib == host_mib - host_mib % 2
    least = min(host_mib, 512)
    capped = bounded(Config(qemu=QemuConfig(memory_mib=1 << 20, max_memory_mib=513)))
    assert capped.qemu.memory_mib == least - least % 2
    assert bounded(Config(qemu=QemuConfig(memory_mib=131))).qemu.memory_mib == 131


def test_limits_size_nothing_if_the_configuration_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(runtime=RuntimeConfig(is_sized_by_limits=False))
    assert sized(config, Limits(cpus=4.0)) == config
    assert "static_sandbox_resource_mgmt" in caplog.text
