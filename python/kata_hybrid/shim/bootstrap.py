"""The protobuf messages on the shim's standard streams, coded by hand.

``start`` and ``delete`` cannot afford the protobuf runtime. Fields and numbers: containerd's
``containerd.runtime.bootstrap.v1``, ``containerd.task.v2.DeleteResponse`` and
``containerd.types.RuntimeInfo``; tests compare with the generated messages.
"""

from kata_hybrid.shim.failure import ShimError

MAX_STDIN_BYTES = 10 << 20
"""What containerd's own library reads at most."""
PROTOCOL_EXTENSION = "kata-hybrid/protocol"
"""type_url of a bootstrap extension whose value is the protocol to speak: ``ttrpc`` or ``grpc``."""

# Fields of BootstrapParams.
_INSTANCE_ID = 1
_NAMESPACE = 2
_LOG_LEVEL = 3
_CONTAINERD_VERSION = 4
_TTRPC_ADDRESS = 5
_EXTENSIONS = 8

# Wire types.
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_SIGN_BIT = 1 << 63
_MAX_VARINT_BITS = 70


class StartInput:
    """What containerd wrote to the standard input of ``start``."""

    __slots__ = (
        "containerd_version",
        "has_params",
        "log_level",
        "options",
        "protocol",
        "ttrpc_address",
    )

    def __init__(self) -> None:
        """Hold what an empty input means: no options, an old containerd."""
        self.has_params = False
        self.log_level = 0
        self.containerd_version = ""
        self.ttrpc_address = ""
        self.options = b""
        """A serialized Any, or nothing."""
        self.protocol = ""

    @property
    def takes_bootstrap_result(self) -> bool:
        """The daemon is known to read a BootstrapResult: it says that it is 2.3 or later."""
        return self.has_params and parse_version(self.containerd_version) >= (2, 3)


def decode_start_input(data: bytes, *, instance_id: str, namespace: str) -> StartInput:
    """Tell BootstrapParams (containerd 2.3 and later) from a bare Any of runtime options.

    Either decodes as the other, so params are believed only if their id and namespace are those
    of the command line.

    Raises:
        ShimError: neither.
    """
    result = StartInput()
    if not data:
        return result
    try:
        fields = decode_fields(data)
        identity = {number: value for number, value in fields if number <= _NAMESPACE}
        if identity != {_INSTANCE_ID: instance_id.encode(), _NAMESPACE: namespace.encode()}:
            result.options = data
        else:
            result.has_params = True
            for number, value in fields:
                _take_param(result, number, value)
    except (ValueError, UnicodeDecodeError) as exc:
        raise ShimError(f"standard input is neither BootstrapParams nor options: {exc}") from exc
    return result


def _take_param(result: StartInput, number: int, value: int | bytes) -> None:
    """Take over one field of BootstrapParams."""
    if isinstance(value, int):
        if number == _LOG_LEVEL:
            result.log_level = value - (1 << 64) if value & _SIGN_BIT else value
    elif number == _CONTAINERD_VERSION:
        result.containerd_version = value.decode()
    elif number == _TTRPC_ADDRESS:
        result.ttrpc_address = value.decode()
    elif number == _EXTENSIONS:
        for type_url, content, raw in _extension(value):
            if type_url == PROTOCOL_EXTENSION:
                result.protocol = content.decode("ascii", "replace").lower()
            elif not result.options:
                result.options = raw


def parse_version(text: str) -> tuple[int, int]:
    """Return major and minor of ``v2.3.4`` and the like, or zeros."""
    parts = text.removeprefix("v").split(".")
    if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit():
        return int(parts[0]), int(parts[1])
    return 0, 0


def encode_bootstrap_result(version: int, *, address: str, protocol: str) -> bytes:
    """Encode the answer of ``start`` for containerd 2.3 and later."""
    return _number(1, version) + _text(2, address) + _text(3, protocol)


def encode_delete_response(*, pid: int, exit_status: int, exited_at_ns: int) -> bytes:
    """Encode the answer of ``delete``."""
    seconds, nanos = divmod(exited_at_ns, 1_000_000_000)
    timestamp = _number(1, seconds) + _number(2, nanos)
    return _number(1, pid) + _number(2, exit_status) + _bytes(3, timestamp)


def encode_request(service: str, *, method: str) -> bytes:
    """Encode a ttRPC request without a payload, as a whole frame of stream 1."""
    request = _text(1, service) + _text(2, method)
    return len(request).to_bytes(4, "big") + b"\0\0\0\1\1\0" + request


def encode_runtime_info(
    *,
    name: str,
    version: str,
    revision: str,
    options: bytes,
    features: tuple[str, bytes],
    annotations: dict[str, str],
) -> bytes:
    """Encode the answer of ``-info``; ``features`` is a type_url and its value."""
    parts = [
        _text(1, name),
        _bytes(2, _text(1, version) + _text(2, revision)),
        _bytes(3, options) if options else b"",
        _bytes(4, _text(1, features[0]) + _bytes(2, features[1])),
    ]
    parts += [_bytes(5, _text(1, key) + _text(2, value)) for key, value in annotations.items()]
    return b"".join(parts)


def decode_any(data: bytes) -> tuple[str, bytes]:
    """Return type_url and value of a serialized Any.

    Raises:
        ValueError: it is not one.
    """
    type_url, value = "", b""
    for number, content in decode_fields(data):
        if number == 1 and isinstance(content, bytes):
            type_url = content.decode()
        elif number == 2 and isinstance(content, bytes):  # noqa: PLR2004 - Any.value
            value = content
    return type_url, value


def decode_fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Split a message into its fields, in order. Fixed-width fields are skipped.

    Raises:
        ValueError: the message is malformed.
    """
    fields: list[tuple[int, int | bytes]] = []
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("field number 0")
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            fields.append((number, value))
            continue
        if kind == _BYTES:
            length, position = _read_varint(data, position)
        elif kind in {_FIXED64, _FIXED32}:
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if length > len(data) - position:
            raise ValueError("truncated field")
        if kind == _BYTES:
            fields.append((number, data[position : position + length]))
        position += length
    return fields


def _extension(data: bytes) -> list[tuple[str, bytes, bytes]]:
    """Return type_url, value and serialized form of the Any in an Extension."""
    return [
        (*decode_any(content), content)
        for number, content in decode_fields(data)
        if number == 1 and isinstance(content, bytes)
    ]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, _MAX_VARINT_BITS, 7):
        if position >= len(data):
            raise ValueError("truncated number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - continuation bit
            return value & ((1 << 64) - 1), position
    raise ValueError("number longer than ten bytes")


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits per byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode()) if value else b""
