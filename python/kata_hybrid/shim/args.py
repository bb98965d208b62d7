"""The command line containerd gives, in Go's flag syntax.

``-flag value``, ``-flag=value`` and the same with two dashes; a boolean takes a value only after
``=``. The first word that is no flag is the action. An unknown flag is kept for the log, not
refused: a newer containerd may know more than we do.
"""

from kata_hybrid.shim.failure import ShimError

_TEXT_FLAGS = {
    "namespace": "namespace",
    "id": "id",
    "address": "address",
    "publish-binary": "publish_binary",
    "bundle": "bundle",
    "socket": "socket",
    "debug-socket": "debug_socket",
}
_BOOLEAN_FLAGS = {
    "debug": "is_debug",
    "v": "is_version",
    "version": "is_version",
    "info": "is_info",
}
# strconv.ParseBool
_TRUE = ("1", "t", "T", "true", "TRUE", "True")
_FALSE = ("0", "f", "F", "false", "FALSE", "False")
_MAX_ID_CHARACTERS = 76


class Arguments:
    """A parsed command line."""

    __slots__ = (
        "action",
        "address",
        "bundle",
        "debug_socket",
        "id",
        "is_debug",
        "is_info",
        "is_version",
        "namespace",
        "publish_binary",
        "socket",
        "unknown",
    )

    def __init__(self) -> None:
        """Hold every default."""
        self.action = ""
        self.namespace = ""
        self.id = ""
        self.address = ""
        self.publish_binary = ""
        self.bundle = ""
        self.socket = ""
        self.debug_socket = ""
        self.is_debug = False
        self.is_version = False
        self.is_info = False
        self.unknown: list[str] = []

    def require_identity(self) -> None:
        """Check what every action needs.

        Raises:
            ShimError: no namespace, or an id that containerd would not give.
        """
        if not self.namespace:
            raise ShimError("shim namespace cannot be empty: -namespace is missing")
        check_id(self.id, what="-id")


def parse(argv: list[str]) -> Arguments:
    """Parse the words after the program's name.

    Raises:
        ShimError: a flag lacks its value, or has one that is no boolean.
    """
    arguments = Arguments()
    words = iter(argv)
    for word in words:
        if len(word) < 2 or word[0] != "-":  # noqa: PLR2004 - "-" alone is a word
            arguments.action = word
            break
        if word == "--":
            arguments.action = next(words, "")
            break
        name, has_value, value = word[2 if word[1] == "-" else 1 :].partition("=")
        if name in _TEXT_FLAGS:
            if not has_value:
                found = next(words, None)
                if found is None:
                    raise ShimError(f"flag needs an argument: -{name}")
                value = found
            setattr(arguments, _TEXT_FLAGS[name], value)
        elif name in _BOOLEAN_FLAGS:
            setattr(arguments, _BOOLEAN_FLAGS[name], _boolean(name, value if has_value else "true"))
        else:
            arguments.unknown.append(word)
    return arguments


def check_id(value: str, *, what: str) -> None:
    """Refuse an id that containerd would refuse: it becomes part of paths and messages.

    Raises:
        ShimError: too long, or a character other than letters, digits and inner ``_ . -``.
    """
    inner = value.replace("_", "0").replace(".", "0").replace("-", "0")
    is_valid = (
        0 < len(value) <= _MAX_ID_CHARACTERS
        and value.isascii()
        and inner.isalnum()
        and value[0].isalnum()
        and value[-1].isalnum()
    )
    if not is_valid:
        shown = value if len(value) <= _MAX_ID_CHARACTERS else value[:_MAX_ID_CHARACTERS] + "..."
        raise ShimError(
            f"{what} {shown!r} is invalid: 1 to {_MAX_ID_CHARACTERS} letters and digits, "
            "with _ . - between them"
        )


def _boolean(name: str, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ShimError(f"invalid boolean value {value!r} for -{name}")
