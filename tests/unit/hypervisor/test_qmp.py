import pytest

from kata_hybrid.hypervisor.qmp import ExitCauses
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
