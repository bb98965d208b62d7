"""Values of a JSON document of the user's, each checked for its type and named by its field."""

from kata_hybrid.errors import InvalidSpecError
from kata_hybrid.types import JsonObject


def as_object(value: object, field: str) -> JsonObject:
    """Return ``value`` if it is a JSON object.

    Raises:
        InvalidSpecError: it is not.
    """
    if isinstance(value, dict):
        return value
    raise _wrong_type(field, "an object", value)


def as_list(value: object, field: str) -> list[object]:
    """Return ``value`` if it is a JSON array.

    Raises:
        InvalidSpecError: it is not.
    """
    if isinstance(value, list):
        return value
    raise _wrong_type(field, "an array", value)


def as_text(value: object, field: str) -> str:
    """Return ``value`` if it is a JSON string without NUL, which no path or argument may hold.

    Raises:
        InvalidSpecError: it is not.
    """
    if not isinstance(value, str):
        raise _wrong_type(field, "a string", value)
    if "\0" in value:
        message = f"{field} holds a NUL character"
        raise InvalidSpecError(message)
    return value


def as_flag(value: object, field: str) -> bool:
    """Return ``value`` if it is true or false.

    Raises:
        InvalidSpecError: it is not.
    """
    if isinstance(value, bool):
        return value
    raise _wrong_type(field, "true or false", value)


def _wrong_type(field: str, expected: str, value: object) -> InvalidSpecError:
    return InvalidSpecError(f"{field} must be {expected}, is {type(value).__name__}")
