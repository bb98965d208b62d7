"""The committed messages are what ``proto/`` generates."""

import generate_protos


def test_generated_messages_are_up_to_date() -> None:
    assert generate_protos.check() == []
