"""The guest kernel's command line: ours, the agent's, then the user's, so that the user's win.

What each boot parameter gains under TCG is measured in ``docs/reference/boot-time.md``.
"""

from kata_hybrid.config.model import Config

BASE = (
    "console=ttyS0",
    "reboot=k",
    # At once: with no firmware to return to, a panicked guest is of no use to anybody.
    "panic=-1",
    "cgroup_no_v1=all",
    "systemd.unified_cgroup_hierarchy=1",
)

FASTER_BOOT = (
    "8250.nr_uarts=1",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.nopnp",
    "i8042.dumbkbd",
    "no_timer_check",
    "tsc=reliable",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "noreplace-smp",
)


def kernel_params(config: Config) -> tuple[str, ...]:
    """Compose the guest kernel's parameters."""
    return (
        *BASE,
        *(() if config.qemu.enable_debug else ("quiet",)),
        *FASTER_BOOT,
        *_agent_params(config),
        *config.qemu.kernel_params,
    )


def _agent_params(config: Config) -> tuple[str, ...]:
    agent = config.agent
    params = [f"agent.log_vport={agent.log_port}"]
    if agent.server_port != type(agent)().server_port:
        params.append(f"agent.server_addr=vsock://-1:{agent.server_port}")
    if agent.enable_debug:
        params.append("agent.log=debug")
    if agent.debug_console_enabled:
        params += ["agent.debug_console", "agent.debug_console_vport=1026"]
    if agent.container_pipe_size:
        params.append(f"agent.container_pipe_size={agent.container_pipe_size}")
    return tuple(params)
