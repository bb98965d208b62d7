import pytest

from kata_hybrid.config.model import AgentConfig, BuiltinConfig, Config, HypervisorName, QemuConfig
from kata_hybrid.errors import InvalidConfigError
from kata_hybrid.hypervisor.kernel_params import kernel_params


def test_the_users_parameters_come_last() -> None:
    config = Config(qemu=QemuConfig(kernel_params=("panic=5", "mine")))
    assert kernel_params(config, HypervisorName.QEMU)[-2:] == ("panic=5", "mine")


def test_the_agent_is_told_to_log_and_to_use_cgroup_v2() -> None:
    params = kernel_params(Config(), HypervisorName.QEMU)
    assert {"agent.log_vport=1025", "cgroup_no_v1=all", "panic=-1", "reboot=k"} <= set(params)


def test_quiet_unless_debugging() -> None:
    assert "quiet" in kernel_params(Config(), HypervisorName.QEMU)
    assert "quiet" not in kernel_params(
        Config(qemu=QemuConfig(enable_debug=True)), HypervisorName.QEMU
    )


def test_agent_options_become_parameters() -> None:
    agent = AgentConfig(
        enable_debug=True, debug_console_enabled=True, server_port=9, container_pipe_size=4096
    )
    params = kernel_params(Config(agent=agent), HypervisorName.QEMU)
    assert {
        "agent.log=debug",
        "agent.debug_console",
        "agent.debug_console_vport=1026",
        "agent.server_addr=vsock://-1:9",
        "agent.container_pipe_size=4096",
    } <= set(params)


def test_a_command_line_the_kernel_would_cut_is_refused() -> None:
    config = Config(qemu=QemuConfig(kernel_params=("x" * 2048,)))
    with pytest.raises(InvalidConfigError, match=r"hypervisor\.qemu\.kernel_params"):
        kernel_params(config, HypervisorName.QEMU)


def test_each_monitor_has_parameters_of_its_own() -> None:
    config = Config(
        builtin=BuiltinConfig(kernel_params=("a",), enable_debug=True),
        qemu=QemuConfig(kernel_params=("b",)),
    )
    builtin = kernel_params(config, HypervisorName.BUILTIN)
    assert builtin[-1] == "a"
    assert "quiet" not in builtin
    assert kernel_params(config, HypervisorName.QEMU)[-1] == "b"
