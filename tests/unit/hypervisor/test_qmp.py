import asyncio
import copy
import json
import socket

import pytest

from harness.loop import on_loop
from kata_hybrid.aio.supervisor import Supervisor
from kata_hybrid.errors import VmmError
from kata_hybrid.hypervisor.qmp import ExitCauses, Monitor
from kata_hybrid.types import VmExit


def shutdown(reason: str) -> dict[str, object]:
    return {"event": "SHUTDOWN", "data": {"guest": True, "reason": reason}}


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("guest-shutdown", "guest-shutdown"),
        ("guest-reset", "guest-reset"),
        ("guest-panic", "guest-panic"),
        ("host-signal", "killed"),
        ("host-qmp-quit", "killed"),
        ("host-error", "failed"),
        ("something-new", "failed"),
    ],
)
def test_shutdown_event_becomes_a_reason(cause: str, reason: str) -> None:
    causes = ExitCauses()
    causes.note(shutdown(cause))
    assert causes.exit() == VmExit(reason=reason, detail=cause)


def test_a_reported_panic_wins_over_the_reset_that_follows() -> None:
    causes = ExitCauses()
    causes.note({"event": "GUEST_PANICKED", "data": {"action": "pause"}})
    causes.note(shutdown("guest-reset"))
    found = causes.exit()
    assert found is not None
    assert found.reason == "guest-panic"


def test_no_event_gives_no_reason() -> None:
    assert ExitCauses().exit() is None


@pytest.mark.parametrize("event", [{}, {"event": "SHUTDOWN"}, {"event": "SHUTDOWN", "data": 3}])
def test_odd_events_are_survived(event: dict[str, object]) -> None:
    causes = ExitCauses()
    causes.note(event)
    found = causes.exit()
    assert found is None or found.reason == "failed"


class Qemu:
    """The other end of a monitor: answers ``device_del`` as it is told to."""

    def __init__(self, *answers: dict[str, object]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def serve(self, endpoint: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=endpoint)

        def say(message: dict[str, object]) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        say({"QMP": {"version": {}, "capabilities": []}})
        # One request at a time is made, and none is long: a read is a request.
        while data := await reader.read(4096):
            request = json.loads(data)
            answer: dict[str, object] = {}
            if request["execute"] == "device_del":
                self.asked += 1
                answer = self.answers.pop(0)
            event = answer.pop("then", None)
            answer = answer if "error" in answer else {"return": {}}
            say(answer | ({"id": request["id"]} if "id" in request else {}))
            if event:
                say({"event": event, "data": {"device": "d"}, "timestamp": STAMP})
        writer.close()


STAMP = {"seconds": 1, "microseconds": 0}
NOT_FOUND = {"error": {"class": "DeviceNotFound", "desc": "Device 'd' not found"}}
PENDING = {"error": {"class": "GenericError", "desc": "d is already in the process of unplug"}}


@pytest.mark.parametrize(
    ("answers", "failure"),
    [
        ([{"then": "DEVICE_DELETED"}], None),
        ([NOT_FOUND], None),
        ([{**PENDING, "then": "DEVICE_DELETED"}], None),
        ([{}], "the guest has not let it go"),
        ([{"error": {"class": "GenericError", "desc": "no hot-plug"}}], "no hot-plug"),
    ],
)
@on_loop
async def test_a_device_is_gone_when_the_guest_let_it_go_or_it_is_not_there(
    answers: list[dict[str, object]], failure: str | None
) -> None:
    ours, theirs = socket.socketpair()
    qemu, monitor = Qemu(*copy.deepcopy(answers)), Monitor(ExitCauses())
    async with Supervisor("qemu") as supervisor:
        supervisor.start(qemu.serve(theirs), name="qemu")
        await monitor.connect(ours, timeout_s=5)
        if failure is None:
            await monitor.remove_device("d", timeout_s=5)
        else:
            with pytest.raises(VmmError, match=failure):
                await monitor.remove_device("d", timeout_s=0.2)
        assert qemu.asked == 1
        await monitor.disconnect(timeout_s=5)
