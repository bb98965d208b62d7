"""How machines end, each told from the others, and what the process has of them."""

from pathlib import Path

import pytest

from lab_guest.image import GuestImage
from lab_guest.machine import Machine

pytestmark = pytest.mark.timeout(120)

END_TIMEOUT_S = 30.0


@pytest.mark.parametrize(
    ("command", "reason", "detail"),
    [
        pytest.param("busybox poweroff -f", "guest-shutdown", "", id="shutdown"),
        pytest.param("busybox reboot -f", "guest-reset", "", id="reset"),
        pytest.param("echo c >/proc/sysrq-trigger", "guest-panic", "sysrq", id="panic"),
        pytest.param(
            "echo triple >/sys/kernel/reboot/type; busybox reboot -f",
            "guest-triple-fault",
            "triple fault",
            id="triple-fault",
        ),
    ],
)
def test_an_end_of_the_guests(
    image: GuestImage, run_dir: Path, command: str, reason: str, detail: str
) -> None:
    with Machine(image, run_dir, memory_mib=256, has_host_root=False) as machine:
        machine.start()
        running = machine.begin(command)
        exit_ = machine.wait_exit(timeout_s=END_TIMEOUT_S)
        running.close()
        assert exit_.reason == reason
        assert detail in exit_.detail
        assert machine.vm.state == "stopped"


def test_an_end_of_the_hosts_while_paused(image: GuestImage, run_dir: Path) -> None:
    with Machine(image, run_dir, memory_mib=256, has_host_root=False) as machine:
        machine.start()
        machine.vm.pause()
        machine.vm.stop()
        assert machine.wait_exit(timeout_s=END_TIMEOUT_S).reason == "killed"


def test_its_threads_are_processors_and_one_more(guest: Machine) -> None:
    ids = guest.vm.thread_ids()
    assert set(ids) == {"vcpu-0", "vmm-io"}
    tasks = {
        path.name: (path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()
    }
    # Workers of io_uring are the kernel's, and those of the extension's caller there is one.
    others = {name: comm for name, comm in tasks.items() if not comm.startswith("iou-")}
    assert len(others) == len(ids) + 1, others
    for name, thread in ids.items():
        assert tasks[str(thread)] == name
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Seccomp"] == "2", f"{name} has no filter"
        assert fields["NoNewPrivs"] == "1"
