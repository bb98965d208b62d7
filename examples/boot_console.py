"""Boot a Linux kernel in this process and print its console: ``boot_console.py KERNEL [INITRD]``.

Needs a ``/dev/kvm`` that runs kernels (``kata-hybrid check`` says whether this one does).
"""

import os
import select
import sys

from kata_hybrid._native.events import EventPort
from kata_hybrid._native.vmm import Vm, VmConfig

port = EventPort()
config = VmConfig(
    kernel=sys.argv[1],
    initrd=sys.argv[2] if len(sys.argv) > 2 else None,  # noqa: PLR2004 - the second argument
    command_line="console=ttyS0 reboot=k panic=-1",
    memory_mib=256,
)
vm = Vm(config, port, exited_token=1, console_fd=os.dup(1))
vm.start()
select.select([port], [], [])
print(vm.exit)
