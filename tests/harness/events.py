"""What containerd tells its clients: ``ctr events``, parsed line by line.

A reader thread fills a list under a condition; the test thread waits on it with a deadline.
"""

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from harness.daemon import Containerd
from harness.deadline import DeadlineError

# 2026-01-02 03:04:05.678 +0000 UTC namespace /topic {json}
_LINE = re.compile(r"^.+? UTC (?P<namespace>\S+) (?P<topic>/\S+) (?P<body>\{.*\})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event."""

    topic: str
    body: dict[str, object]
    seen_at: float
    """When it arrived here (monotonic clock)."""

    @property
    def container_id(self) -> str:
        """The container it is about."""
        return str(self.body.get("container_id", ""))

    @property
    def process_id(self) -> str:
        """The exec it is about, or the container's own id for its first process."""
        return str(self.body.get("exec_id") or self.body.get("id") or self.container_id)

    @property
    def exit_status(self) -> int:
        """The exit status it reports; 0 is left out of the JSON."""
        status = self.body.get("exit_status", 0)
        assert isinstance(status, int)
        return status


class EventWatcher:
    """Follows the events of one namespace from ``__enter__`` on."""

    def __init__(self, containerd: Containerd) -> None:
        self._containerd = containerd
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Subscribe, and return when the subscription is known to work."""
        self._process = self._containerd.popen("events", stderr=subprocess.DEVNULL)
        self._thread = threading.Thread(target=self._read, name="ctr-events", daemon=True)
        self._thread.start()
        self._synchronise()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the subscription."""
        assert self._process is not None
        assert self._thread is not None
        self._process.kill()
        self._process.wait(10)
        self._thread.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def of(self, container_id: str) -> list[Event]:
        """Return the task events of one container, in order of arrival."""
        with self._changed:
            return [
                event
                for event in self._events
                if event.topic.startswith("/tasks/") and event.container_id == container_id
            ]

    def topics(self, container_id: str) -> list[str]:
        """Return the topics of one container's task events without ``/tasks/``, in order."""
        return [event.topic.removeprefix("/tasks/") for event in self.of(container_id)]

    def wait(
        self, topic: str, container_id: str, *, process_id: str | None = None, timeout_s: float = 30
    ) -> Event:
        """Return the first event of a topic for a container (and exec), waiting for it.

        Raises:
            DeadlineError: it did not come in time.
        """

        def matches(event: Event) -> bool:
            return (
                event.topic == topic
                and event.container_id == container_id
                and (process_id is None or event.process_id == process_id)
            )

        return self._wait(matches, what=f"{topic} of {container_id}", timeout_s=timeout_s)

    def _wait(self, matches: Callable[[Event], bool], *, what: str, timeout_s: float) -> Event:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for event in self._events:
                    if matches(event):
                        return event
                left = deadline - time.monotonic()
                if left <= 0:
                    seen = [(event.topic, event.body) for event in self._events[-10:]]
                    msg = f"no event {what} in {timeout_s:g} s; the last ones: {seen}"
                    raise DeadlineError(msg)
                self._changed.wait(left)

    def _synchronise(self) -> None:
        # The subscription is not acknowledged: change a label until the change is reported.
        for attempt in range(50):
            mark = f"mark-{id(self):x}-{attempt}"
            self._containerd.ctr("namespaces", "label", self._containerd.namespace, f"sync={mark}")

            def matches(event: Event, mark: str = mark) -> bool:
                labels = event.body.get("labels")
                return isinstance(labels, dict) and labels.get("sync") == mark

            try:
                self._wait(matches, what=mark, timeout_s=0.2)
            except DeadlineError:
                continue
            return
        msg = f"ctr events reports nothing\n{self._containerd.log_tail()}"
        raise DeadlineError(msg)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            found = _LINE.match(raw.decode(errors="replace").rstrip())
            if found is None or found["namespace"] != self._containerd.namespace:
                continue
            event = Event(
                topic=found["topic"], body=json.loads(found["body"]), seen_at=time.monotonic()
            )
            with self._changed:
                self._events.append(event)
                self._changed.notify_all()
