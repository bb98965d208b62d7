import os
from collections.abc import Iterator

import pytest

from harness.pods import Node, Pod


@pytest.fixture
def node() -> Iterator[Node]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Node.made() as node:
        yield node


@pytest.fixture
def pod(node: Node) -> Pod:
    return node.pod(mtu=1450)
