"""QEMU's monitor: the connection, the few commands we give, and why the machine ended.

The connection is one end of a socket pair whose other end QEMU inherits: nobody else can open it
and there is no moment before it exists. ``qemu.qmp`` does the protocol.

Events are taken in the listener's filter, which stores what matters and lets nothing queue up: a
guest can cause events at any rate.
"""

import asyncio
import logging
import socket
from collections.abc import Mapping

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient, QMPError

from kata_hybrid.errors import VmmError
from kata_hybrid.types import VmExit

_EXIT_REASONS: Mapping[str, str] = {
    "guest-shutdown": "guest-shutdown",
    "guest-reset": "guest-reset",
    "subsystem-reset": "guest-reset",
    "guest-panic": "guest-panic",
    "host-signal": "killed",
    "host-qmp-quit": "killed",
    "host-ui": "killed",
    "host-error": "failed",
}
"""``ShutdownCause`` of QEMU's qapi/run-state.json, in our words."""


_ASKED_BEFORE = "already in the process of unplug"
"""What QEMU (qdev-monitor.c) says of a device that the guest has not let go so far."""


def _is_not_found(error: VmmError) -> bool:
    cause = error.__cause__
    return isinstance(cause, ExecuteError) and cause.error_class == "DeviceNotFound"


class ExitCauses:
    """What the monitor said of the machine's end."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._exit: VmExit | None = None
        self._has_panicked = False

    def note(self, event: Mapping[str, object]) -> None:
        """Take an event of the monitor into account."""
        data = event.get("data")
        fields: Mapping[str, object] = data if isinstance(data, dict) else {}
        match event.get("event"):
            case "GUEST_PANICKED" | "GUEST_CRASHLOADED":
                self._has_panicked = True
            case "SHUTDOWN":
                cause = str(fields.get("reason", ""))
                reason = _EXIT_REASONS.get(cause, "failed")
                self._exit = VmExit(reason=reason, detail=cause)

    def exit(self) -> VmExit | None:
        """Return the reason, or None if the monitor gave none."""
        if self._has_panicked:
            return VmExit(reason="guest-panic", detail="the guest reported a panic")
        return self._exit


class Monitor:
    """The connection to one QEMU."""

    def __init__(self, causes: ExitCauses) -> None:
        """Report events to ``causes``."""
        self._causes = causes
        self._client = QMPClient("kata-hybrid")
        # The end of the machine is an error to it; we report ends ourselves.
        self._client.logger.setLevel(logging.CRITICAL)
        self._client.register_listener(
            EventListener(
                names=("SHUTDOWN", "GUEST_PANICKED", "GUEST_CRASHLOADED", "DEVICE_DELETED"),
                event_filter=self._take_event,
            )
        )
        self._is_connected = False
        self._leaving: dict[str, asyncio.Future[None]] = {}

    def _take_event(self, event: Message) -> bool:
        if event.get("event") == "DEVICE_DELETED":
            data = event.get("data")
            device = data.get("device") if isinstance(data, dict) else None
            gone = self._leaving.get(str(device))
            if gone is not None and not gone.done():
                gone.set_result(None)
            return False
        self._causes.note(event)
        return False

    async def remove_device(self, device_id: str, *, timeout_s: float) -> None:
        """Ask the guest to let a device go, and wait until it has. One that is not there is gone.

        Raises:
            VmmError: it does not in time, and may be asked again; or QEMU is gone.
        """
        gone = asyncio.get_running_loop().create_future()
        self._leaving[device_id] = gone
        try:
            try:
                await self.execute("device_del", {"id": device_id}, timeout_s=timeout_s)
            except VmmError as error:
                if _is_not_found(error):
                    return
                if _ASKED_BEFORE not in str(error):
                    raise
            async with asyncio.timeout(timeout_s):
                await gone
        except TimeoutError as error:
            msg = f"qemu device_del {device_id}"
            raise VmmError(msg, f"the guest has not let it go in {timeout_s:g} s") from error
        finally:
            del self._leaving[device_id]

    async def connect(self, endpoint: socket.socket, *, timeout_s: float) -> None:
        """Greet and negotiate. Takes over ``endpoint``.

        Raises:
            VmmError: QEMU went away or did not answer in time.
        """
        endpoint.setblocking(False)  # noqa: FBT003 - the standard library's signature
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(endpoint)
        except TimeoutError as error:
            endpoint.close()
            msg = "connect to qemu"
            raise VmmError(msg, f"no greeting in {timeout_s:g} s") from error
        except ConnectError as error:
            endpoint.close()
            msg = "connect to qemu"
            raise VmmError(msg, "it closed the monitor") from error
        self._is_connected = True

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """Run one monitor command.

        Raises:
            VmmError: QEMU refused it, went away, or did not answer in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, dict(arguments or {}))
        except TimeoutError as error:
            msg = f"qemu {command}"
            raise VmmError(msg, f"no answer in {timeout_s:g} s") from error
        except ExecuteError as error:
            msg = f"qemu {command}"
            raise VmmError(msg, str(error)) from error
        except QMPError as error:
            msg = f"qemu {command}"
            raise VmmError(msg, "the monitor is gone") from error

    async def disconnect(self, *, timeout_s: float) -> None:
        """Take the last events and close. Idempotent; never raises for a monitor that is gone."""
        if not self._is_connected:
            return
        self._is_connected = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.disconnect()
        except (QMPError, EOFError, OSError, TimeoutError):
            return
