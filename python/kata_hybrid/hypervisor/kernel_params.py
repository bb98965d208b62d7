"""The guest kernel's command line: ours, the agent's, then the user's, so that the user's win.

Boot parameters are here because they gain something. Measured from exec to init under TCG (QEMU
7.2, Debian's 6.1 cloud kernel, 2 GiB, best of 5 to 7 interleaved runs): 2.04 s with none, 1.58 s
with both and the machine trimmed (``qemu_command``). No gain beyond the noise: no_timer_check,
tsc=reliable, i8042.*, 8250.nr_uarts, mitigations=off, a CPU without la57, smap, xsave or pku, less
memory.
"""

from kata_hybrid.config.model import FORWARD_PORT, Config, HypervisorName
from kata_hybrid.errors import InvalidConfigError

_COMMAND_LINE_BYTES = 2048
"""COMMAND_LINE_SIZE of x86, with its final NUL."""

BASE = (
    "console=ttyS0",
    "reboot=k",
    # At once: with no firmware to return to, a panicked guest is of no use to anybody.
    "panic=-1",
    "cgroup_no_v1=all",
    "systemd.unified_cgroup_hierarchy=1",
)

FASTER_BOOT = (
    # The self-tests of the kernel's ciphers.
    "cryptomgr.notests",
    # Patches no lock prefixes: text patching is slow where code is translated.
    "noreplace-smp",
)

BUILTIN = (
    # Its devices are not behind PCI, and looking for one costs an exit per register.
    "pci=off",
)


def kernel_params(config: Config, name: HypervisorName) -> tuple[str, ...]:
    """Compose the parameters of the kernel that the monitor called ``name`` boots.

    Raises:
        InvalidConfigError: together they are longer than the kernel reads.
    """
    hypervisor = config.hypervisor(name)
    params = (
        *BASE,
        *(() if hypervisor.enable_debug else ("quiet",)),
        *FASTER_BOOT,
        *(BUILTIN if name is HypervisorName.BUILTIN else ()),
        *_agent_params(config),
        *hypervisor.kernel_params,
    )
    length = len(" ".join(params).encode())
    if length >= _COMMAND_LINE_BYTES:
        msg = (
            f"hypervisor.{name.value}.kernel_params: the guest's command line would have {length} "
            f"bytes, the kernel reads {_COMMAND_LINE_BYTES - 1}"
        )
        raise InvalidConfigError(msg)
    return params


def _agent_params(config: Config) -> tuple[str, ...]:
    agent = config.agent
    params = [f"agent.log_vport={agent.log_port}", f"agent.forward_vport={FORWARD_PORT}"]
    if agent.server_port != type(agent)().server_port:
        params.append(f"agent.server_addr=vsock://-1:{agent.server_port}")
    if agent.enable_debug:
        params.append("agent.log=debug")
    if agent.debug_console_enabled:
        params += ["agent.debug_console", "agent.debug_console_vport=1026"]
    if agent.container_pipe_size:
        params.append(f"agent.container_pipe_size={agent.container_pipe_size}")
    return tuple(params)
