"""Which sandbox a container belongs to, from the annotations in its bundle's ``config.json``.

containerd calls ``start`` for every container; those of one pod share the shim of the pod's
sandbox. Both ``start`` and ``delete`` must find the same one, also when the bundle is half gone.
"""

# ruff: noqa: PLC0415 - imports wait until they are needed: start-up time is this folder's subject

from kata_hybrid.shim.address import read_file
from kata_hybrid.shim.args import check_id
from kata_hybrid.shim.failure import ShimError

# Container type key, sandbox id key, value for a sandbox: CRI of containerd, CRI-O, dockershim.
_FRONT_ENDS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID", "sandbox"),
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id", "podsandbox"),
)
_RUNC_GROUP = "io.containerd.runc.v2.group"


class Group:
    """The sandbox a container belongs to."""

    __slots__ = ("id", "is_member")

    def __init__(self, group_id: str, *, is_member: bool) -> None:
        """Name the sandbox; a member never starts one."""
        self.id = group_id
        self.is_member = is_member


def find_group(bundle: str, *, container_id: str) -> Group:
    """Read the bundle in ``bundle``; without ``config.json`` the id is a sandbox's own.

    Raises:
        ShimError: the file is malformed or names no sandbox.
        OSError: it cannot be read.
    """
    data = read_file(f"{bundle}/config.json")
    if data is None:
        return Group(container_id, is_member=False)
    return group_of(read_annotations(data), container_id=container_id)


def group_of(annotations: dict[str, str], *, container_id: str) -> Group:
    """Decide by the annotations of a container.

    Raises:
        ShimError: they contradict themselves.
    """
    for type_key, sandbox_key, sandbox_value in _FRONT_ENDS:
        kind = annotations.get(type_key)
        if kind is None:
            continue
        sandbox_id = annotations.get(sandbox_key, "")
        if sandbox_id:
            check_id(sandbox_id, what=sandbox_key)
        if kind == sandbox_value:
            return Group(sandbox_id or container_id, is_member=False)
        if kind != "container":
            raise ShimError(f"annotation {type_key} is {kind!r}: unknown container type")
        if not sandbox_id:
            raise ShimError(f"annotation {type_key} is {kind!r} but {sandbox_key} is missing")
        return Group(sandbox_id, is_member=True)
    group_id = annotations.get(_RUNC_GROUP, "")
    if group_id:
        check_id(group_id, what=_RUNC_GROUP)
    return Group(group_id or container_id, is_member=False)


def read_annotations(data: bytes) -> dict[str, str]:
    """Return the annotations of an OCI spec.

    Raises:
        ShimError: it is no JSON object, or the annotations are no texts.
    """
    try:
        spec = _parse_json(data.decode())
    except (ValueError, RecursionError) as exc:
        raise ShimError(f"config.json is malformed: {exc}") from exc
    annotations = spec.get("annotations") if isinstance(spec, dict) else None
    if annotations is None and isinstance(spec, dict):
        return {}
    if not isinstance(annotations, dict):
        raise ShimError("config.json is malformed: annotations must be an object")
    for key, value in annotations.items():
        if not isinstance(value, str):
            raise ShimError(f"config.json is malformed: annotation {key!r} is no text")
    return annotations


class _ScannerContext:
    """What the interpreter's JSON scanner asks of a decoder (``json.decoder.JSONDecoder``)."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def _parse_json(text: str) -> object:
    """Parse JSON without the ``json`` package, whose regular expressions take 5 ms to import.

    Raises:
        ValueError: malformed, as ``json.loads`` says it.
    """
    try:
        from _json import make_scanner

        value, end = make_scanner(_ScannerContext())(  # type: ignore[arg-type]
            text, len(text) - len(text.lstrip(" \t\r\n"))
        )
        if not text[end:].strip(" \t\r\n"):
            return value
    except (ImportError, AttributeError, TypeError, StopIteration, ValueError, SystemError):
        # Not this interpreter's scanner, or malformed (for which the scanner wants the package's
        # exception, and fails without it): the real thing will tell.
        pass
    import json

    return json.loads(text)
