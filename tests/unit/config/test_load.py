import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.config.foreign import FOREIGN
from kata_hybrid.config.keys import TABLES
from kata_hybrid.config.load import CONFIG_FILE_VARIABLE, find_config, load_config, read_config
from kata_hybrid.config.model import BuiltinConfig, Config, HypervisorName, LogLevel, QemuConfig
from kata_hybrid.errors import InvalidConfigError
from kata_hybrid.types import FolderCache

FULL = """
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/k/vmlinux"
initrd = "/k/initrd.img"
machine_type = "q35"
machine_accelerators = "accel=tcg"
kernel_params = 'one=1 "quoted=a b" two'
default_vcpus = 2.5
default_memory = 512
overhead_vcpus = 0.5
overhead_memory = 64
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/lib/qemu/virtiofsd"
virtio_fs_cache = "none"
virtio_fs_extra_args = ["--thread-pool-size=1"]
enable_debug = true

[agent.kata]
reconnect_timeout_ms = 5000
create_container_timeout = 45
health_check_request_timeout_ms = 1500
server_port = 2024
log_port = 2025

[runtime]
hypervisor_name = "qemu"
agent_name = "kata"
name = "virt_container"
log_level = "debug"
disable_guest_seccomp = true
static_sandbox_resource_mgmt = false
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(InvalidConfigError) as caught:
        read_config(write(tmp_path / "configuration.toml", text))
    assert str(tmp_path / "configuration.toml") in str(caught.value)
    return str(caught.value)


def test_every_key_arrives(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "c.toml", FULL))
    assert config.qemu.kernel_params == ("one=1", '"quoted=a b"', "two")
    assert config.qemu.vcpu_count(host_cpu_count=8) == 3
    assert config.qemu.memory_mib == 512
    assert (config.qemu.overhead_vcpus, config.qemu.overhead_memory_mib) == (0.5, 64)
    assert config.qemu.virtio_fs_cache is FolderCache.NEVER
    assert config.qemu.virtio_fs_daemon == Path("/usr/lib/qemu/virtiofsd")
    assert config.agent.boot_timeout_s == 10
    assert config.agent.health_check_timeout_s == 1.5
    assert config.agent.request_timeout_s == 45
    assert (config.agent.server_port, config.agent.log_port) == (2024, 2025)
    assert config.runtime.log_level is LogLevel.DEBUG
    assert config.runtime.logging_level == logging.DEBUG
    assert config.runtime.disable_guest_seccomp
    assert not config.runtime.is_sized_by_limits


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "")
    assert read_config(path) == Config(files=(path,))


def test_defaults_are_one_vcpu_and_2_gib() -> None:
    assert QemuConfig().vcpu_count(host_cpu_count=64) == 1
    assert QemuConfig().memory_mib == 2048


@pytest.mark.parametrize(("configured", "count"), [(0, 1), (-1, 4), (0.2, 1), (3.1, 4), (99, 4)])
def test_vcpus_are_whole_and_at_most_the_hosts(configured: float, count: int) -> None:
    assert QemuConfig(default_vcpus=configured).vcpu_count(host_cpu_count=4) == count


def test_an_unknown_key_is_named_with_its_value_and_the_nearest(tmp_path: Path) -> None:
    text = refused(tmp_path, "[hypervisor.qemu]\ndefault_vcpu = 2\n")
    assert "hypervisor.qemu.default_vcpu = 2" in text
    assert text.endswith("default_vcpus")


def test_an_unknown_table_is_named_with_the_nearest(tmp_path: Path) -> None:
    assert "[runtim]" in refused(tmp_path, "[runtim]\nname = 1\n")
    assert refused(tmp_path, "[hypervisor.qmeu]\n").endswith("hypervisor.qemu")
    assert "agent = 1" in refused(tmp_path, "agent = 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("default_memory = '2G'", "whole number from 128"),
        ("default_memory = true", "whole number"),
        ("default_memory = 64", "whole number from 128"),
        ("default_vcpus = nan", "a number"),
        ("default_vcpus = 'two'", "a number"),
        ("default_vcpus = 1025", "a number of at most 1024"),
        ("overhead_vcpus = -0.5", "a number from 0"),
        ("overhead_memory = 1.5", "whole number from 0"),
        ("enable_debug = 1", "true or false"),
        ("kernel = 'vmlinux'", "an absolute path"),
        ("kernel = ''", "an absolute path"),
        ("kernel_params = 'a=\"b'", "closed quotes"),
        ("shared_fs = 'none'", "one of virtio-fs"),
        ("machine_type = 'pc'", "one of q35"),
        ("virtio_fs_cache = 'sometimes'", "one of never, auto, always"),
        ("virtio_fs_extra_args = '-x'", "a list of texts"),
        ("virtio_fs_extra_args = [1]", "a text"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    tmp_path: Path, line: str, expected: str
) -> None:
    text = refused(tmp_path, f"[hypervisor.qemu]\n{line}\n")
    assert f"hypervisor.qemu.{line.split(' ', maxsplit=1)[0]}" in text
    assert expected in text


@pytest.mark.parametrize(
    "line", ["server_port = 0", "reconnect_timeout_ms = 0", "create_container_timeout = -1"]
)
def test_agent_numbers_have_bounds(tmp_path: Path, line: str) -> None:
    assert "agent.kata." in refused(tmp_path, f"[agent.kata]\n{line}\n")


def test_what_is_no_toml_is_refused(tmp_path: Path) -> None:
    assert "not TOML" in refused(tmp_path, "[hypervisor")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfigError, match="not TOML"):
        read_config(path)


def test_a_huge_file_is_refused(tmp_path: Path) -> None:
    assert "larger than" in refused(tmp_path, "#" * (2 << 20))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_configuration_or_refused(tmp_path_factory: object, data: bytes) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    path = tmp_path_factory.mktemp("any") / "c.toml"
    path.write_bytes(data)
    try:
        read_config(path)
    except InvalidConfigError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right


JSON_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="ascii", exclude_characters="\x7f"), max_size=20),
    st.lists(st.text("ab", max_size=3), max_size=3),
)
KEYS = st.sampled_from([(table, key) for table, keys in TABLES.items() for key in keys])


@given(KEYS, JSON_VALUES)
def test_every_key_accepts_or_names_itself(
    tmp_path_factory: object, key: tuple[tuple[str, ...], str], value: object
) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    table, name = key
    path = tmp_path_factory.mktemp("key") / "c.toml"
    path.write_text(f"[{'.'.join(table)}]\n{name} = {json.dumps(value)}\n")
    try:
        config = read_config(path)
    except InvalidConfigError as error:
        assert ".".join((*table, name)) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert config.files == (path,)


@given(
    memory=st.integers(128, 16 << 20),
    vcpus=st.integers(-5, 1024),
    params=st.lists(st.text("abc=.1", min_size=1, max_size=8), max_size=4),
    arguments=st.lists(st.text("abc ,'-=", max_size=8), max_size=3),
    is_debug=st.booleans(),
)
def test_values_survive_the_round_trip(
    tmp_path_factory: object,
    *,
    memory: int,
    vcpus: int,
    params: list[str],
    arguments: list[str],
    is_debug: bool,
) -> None:
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    path = tmp_path_factory.mktemp("round") / "c.toml"
    path.write_text(
        "[hypervisor.qemu]\n"
        f"default_memory = {memory}\ndefault_vcpus = {vcpus}\n"
        f"kernel_params = {json.dumps(' '.join(params))}\n"
        f"virtio_fs_extra_args = {json.dumps(arguments)}\n"
        f"enable_debug = {json.dumps(is_debug)}\n"
    )
    assert read_config(path).qemu == QemuConfig(
        memory_mib=memory,
        default_vcpus=float(vcpus),
        kernel_params=tuple(params),
        virtio_fs_extra_args=tuple(arguments),
        enable_debug=is_debug,
    )


def test_drop_ins_follow_in_order_of_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "[hypervisor.qemu]\ndefault_memory = 256\n")
    first = write(tmp_path / "config.d/10-a", "[hypervisor.qemu]\ndefault_memory = 300\n")
    second = write(tmp_path / "config.d/20-b", "[hypervisor.qemu]\nenable_debug = true\n")
    config = read_config(path)
    assert (config.qemu.memory_mib, config.qemu.enable_debug) == (300, True)
    assert config.files == (path, first, second)


def test_a_wrong_drop_in_is_named_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "")
    wrong = write(tmp_path / "config.d/x.toml", "[runtime]\nenable_debug = 3\n")
    with pytest.raises(InvalidConfigError, match=str(wrong)):
        read_config(path)


def test_drop_ins_are_beside_the_resolved_file(tmp_path: Path) -> None:
    real = write(tmp_path / "real/c.toml", "")
    write(tmp_path / "real/config.d/a", "[runtime]\nenable_debug = true\n")
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    assert read_config(link).runtime.enable_debug


def test_a_drop_in_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "")
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d/a").symlink_to(path)
    with pytest.raises(InvalidConfigError, match="not a regular file"):
        read_config(path)


def test_a_file_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="absent"):
        load_config(environment={CONFIG_FILE_VARIABLE: str(tmp_path / "absent")})


def test_the_environment_comes_before_the_option_before_the_defaults(tmp_path: Path) -> None:
    default = write(tmp_path / "default.toml", "")
    environment = {CONFIG_FILE_VARIABLE: "/env.toml"}
    option = Path("/option.toml")

    def find(environment: dict[str, str], option: Path | None) -> Path | None:
        return find_config(
            environment=environment,
            option_path=option,
            default_paths=(tmp_path / "absent", default),
        )

    assert find(environment, option) == Path("/env.toml")
    assert find({}, option) == option
    assert find({}, None) == default


def test_without_any_file_the_defaults_are_in_force() -> None:
    assert load_config(environment={}, default_paths=()) == Config()


def test_katas_name_of_the_monitor_in_the_runtimes_process_is_ours(tmp_path: Path) -> None:
    config = read_config(
        write(
            tmp_path / "c.toml",
            "[hypervisor.dragonball]\ndefault_memory = 300\nshared_fs = 'inline-virtio-fs'\n"
            "[runtime]\nhypervisor_name = 'dragonball'\n",
        )
    )
    assert config.runtime.hypervisor_name is HypervisorName.BUILTIN
    assert config.builtin.memory_mib == 300


def test_a_wrong_key_is_named_as_the_file_spells_its_table(tmp_path: Path) -> None:
    text = refused(tmp_path, "[hypervisor.dragonball]\ndefault_vcpu = 2\n")
    assert "hypervisor.dragonball.default_vcpu = 2" in text


@pytest.mark.parametrize("name", HypervisorName)
def test_whoever_describes_one_monitor_means_that_one(tmp_path: Path, name: HypervisorName) -> None:
    path = write(tmp_path / "c.toml", f"[hypervisor.{name.value}]\ndefault_memory = 300\n")
    assert read_config(path).runtime.hypervisor_name is name


def test_whoever_describes_both_monitors_leaves_the_choice(tmp_path: Path) -> None:
    text = "[hypervisor.builtin]\ndefault_memory = 300\n[hypervisor.qemu]\ndefault_memory = 300\n"
    assert read_config(write(tmp_path / "c.toml", text)).runtime.hypervisor_name is None


def test_a_monitor_that_is_named_wins_over_the_one_described(tmp_path: Path) -> None:
    text = "[hypervisor.qemu]\ndefault_memory = 300\n[runtime]\nhypervisor_name = 'builtin'\n"
    config = read_config(write(tmp_path / "c.toml", text))
    assert config.runtime.hypervisor_name is HypervisorName.BUILTIN


def test_the_builtin_monitor_has_fewer_processors_than_a_large_host() -> None:
    assert Config().builtin.vcpu_count(host_cpu_count=64) == 1
    config = BuiltinConfig(default_vcpus=-1)
    assert config.vcpu_count(host_cpu_count=64) == 32


# --- keys of Kata's only --------------------------------------------------------------------------

SHIPPED = """
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/k/vmlinux"
initrd = "/k/initrd.img"
rootfs_type = "ext4"
enable_annotations = ["enable_iommu", "kernel_params", "default_.*"]
valid_hypervisor_paths = ["/usr/bin/qemu*"]
kernel_params = "cgroup_no_v1=all"
firmware = ""
cpu_features = "pmu=off"
default_maxvcpus = 0
default_bridges = 1
default_memory = 2048
memory_slots = 10
default_maxmemory = 0
block_device_driver = "virtio-scsi"
block_device_aio = "io_uring"
disable_block_device_use = false
enable_virtio_mem = false
virtio_fs_cache_size = 0
virtio_fs_queue_size = 1024
hot_plug_vfio = "no-port"
disable_guest_selinux = true

[hypervisor.qemu.factory]
enable_template = false

[hypervisor.clh]
path = "/usr/bin/cloud-hypervisor"

[agent.kata]
dial_timeout_ms = 45
kernel_modules = []
[agent.kata.mem_agent]
mem_agent_enable = false

[factory]
vm_cache_number = 0

[runtime]
hypervisor_name = "qemu"
create_container_timeout = 60
sandbox_cgroup_only = true
keep_abnormal = true
vfio_mode = "guest-kernel"
dan_conf = "/no/such/folder"
experimental = []
"""


def test_a_file_like_katas_is_read_and_what_is_missing_is_noted(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "c.toml", SHIPPED))
    assert config.qemu.memory_mib == 2048
    assert config.qemu.valid_paths == ("/usr/bin/qemu*",)
    assert [pattern.pattern for pattern in config.qemu.enable_annotations][-1] == "default_.*"
    assert config.agent.request_timeout_s == 60
    assert config.notices == (
        "table [hypervisor.clh]: no such machine monitor here",
        "runtime.keep_abnormal = True",
    )


@pytest.mark.parametrize(
    "line",
    [
        "confidential_guest = true",
        "rootless = true",
        "kernel_verity_params = 'root_hash=1'",
        "image = '/opt/kata/kata-containers.img'",
        "seccomp_sandbox = 'on'",
        "disable_guest_selinux = false",
    ],
)
def test_a_key_whose_loss_would_matter_is_refused(tmp_path: Path, line: str) -> None:
    text = refused(tmp_path, f"[hypervisor.qemu]\n{line}\n")
    assert f"hypervisor.qemu.{line.split(' ', maxsplit=1)[0]}" in text
    assert "not implemented" in text


def test_a_table_that_is_switched_on_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", "[agent.kata.mem_agent]\nenable = true\n")
    assert read_config(path).notices == ("agent.kata.mem_agent = {'enable': True}",)


def test_an_unknown_key_of_a_table_that_is_katas_only_is_named(tmp_path: Path) -> None:
    assert "template_path" in refused(tmp_path, "[factory]\ntemplat_path = 'x'\n")


def test_a_monitor_that_is_not_here_cannot_be_chosen(tmp_path: Path) -> None:
    assert "one of builtin, qemu" in refused(
        tmp_path, "[hypervisor.clh]\n[runtime]\nhypervisor_name = 'clh'\n"
    )


def test_no_key_is_both_ours_and_katas_only() -> None:
    for table, keys in FOREIGN.items():
        assert not keys.keys() & TABLES.get(table, {}).keys()


def test_a_wrong_pattern_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path, "[hypervisor.qemu]\nenable_annotations = ['(']\n")
    assert "a list of regular expressions" in text


def test_a_later_file_takes_back_what_an_earlier_one_asks_for(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.toml",
        "[hypervisor.qemu]\nimage = '/i'\n[runtime]\nkeep_abnormal = true\nenable_pprof = true\n",
    )
    write(
        tmp_path / "config.d/10",
        "[hypervisor.qemu]\nimage = ''\ninitrd = '/i'\n[runtime]\nkeep_abnormal = false\n",
    )
    assert read_config(path).notices == ("runtime.enable_pprof = True",)


def test_a_file_that_describes_another_monitor_only_is_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, "[hypervisor.firecracker]\njailer_path = '/j'\n")
    assert "describes hypervisor.firecracker alone" in text


@pytest.mark.parametrize("line", ["experimental = ['force_guest_pull']"])
def test_what_the_runtime_would_leave_unprotected_is_refused(tmp_path: Path, line: str) -> None:
    assert "not implemented" in refused(tmp_path, f"[runtime]\n{line}\n")


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 3000])
def test_a_pattern_that_python_cannot_compile_is_named(tmp_path: Path, pattern: str) -> None:
    text = f"[hypervisor.qemu]\nenable_annotations = ['{pattern}']\n"
    assert "a list of regular expressions" in refused(tmp_path, text)
