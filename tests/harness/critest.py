"""``critest``, Kubernetes' own tests of the CRI, with images that are made here.

Its images come from public registries; those that it runs in containers are stood in for by
busybox under the same names, with what the tests look for in them.
"""

import json
import os
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from busybox_image import PAUSE_NAME, Image
from harness.daemon import Containerd

_E2E = "registry.k8s.io/e2e-test-images/"
_STAGING = "gcr.io/k8s-staging-cri-tools/"
_BUSYBOX = f"{_E2E}busybox:1.29-2"
_NGINX = f"{_E2E}nginx:1.14-2"
# The tests wait for its pid file, and look for its name among the arguments.
_SERVE = """
    mkdir -p /var/run /www
    echo 1 >/var/run/nginx.pid
    echo welcome >/www/index.html
    httpd -f -p 80 -h /www &
    echo httpd
    wait
"""
_WEB = ("/bin/sh", "-c", _SERVE, "nginx: master process")

IMAGES = {
    # Not sleep, for which the tests look among a pod's processes.
    PAUSE_NAME: Image(command=("/bin/tail", "-f", "/dev/null")),
    _BUSYBOX: Image(command=("/bin/sh",)),
    f"{_E2E}busybox:1.29-4": Image(command=("/bin/sh",)),
    _NGINX: Image(command=_WEB),
    f"{_E2E}httpd:2.4.39-4": Image(command=_WEB),
    f"{_STAGING}test-image-predefined-group:latest": Image(command=("/bin/sh",), user="1000"),
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
    "default-user:x:1000:1000:default-user:/:/bin/sh\n",
    "etc/group": "root:x:0:\nnobody:x:65534:\ngroup-defined-in-image:x:50000:default-user\n",
    # Two commands that Debian's busybox does without.
    "bin/pgrep": "#!/bin/sh\nps -o pid,comm | awk -v name=$1 '$2 ~ name {print $1}'\n",
    "bin/ipcs": "#!/bin/sh\ncat /proc/sysvipc/shm\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of each test."""

    passed: frozenset[str]
    failed: dict[str, str]
    """By the name, what it said."""


def run_critest(
    critest: Path, containerd: Containerd, *, skip: str, focus: str, timeout_s: float
) -> Report:
    """Run all tests whose names do not match ``skip``, and do match ``focus``.

    What they say goes to standard output as they go.
    """
    folder = containerd.home / "critest"
    folder.mkdir()
    images = {"defaultTestContainerImage": _BUSYBOX, "webServerTestImage": _NGINX}
    (folder / "images.yaml").write_text(json.dumps(images))
    endpoint = f"unix://{containerd.address}"
    words = {
        "runtime-endpoint": endpoint,
        "image-endpoint": endpoint,
        "test-images-file": os.fspath(folder / "images.yaml"),
        "ginkgo.junit-report": os.fspath(folder / "report.xml"),
        "ginkgo.no-color": "true",
        "ginkgo.succinct": "true",
        "ginkgo.skip": skip,
        "ginkgo.focus": focus,
    }
    subprocess.run(
        containerd.on_node(os.fspath(critest), *(f"--{key}={word}" for key, word in words.items())),
        env=containerd.environment,
        cwd=folder,
        timeout=timeout_s,
        check=False,
    )
    return _read(folder / "report.xml")


def _read(report: Path) -> Report:
    passed, failed = set(), {}
    # Written by the program above.
    for case in ET.parse(report).iter("testcase"):  # noqa: S314
        name = case.get("name", "")
        status = case.get("status")
        if status == "passed":
            passed.add(name)
        elif status != "skipped":
            problems = [*case.iter("failure"), *case.iter("error")]
            failed[name] = "; ".join(each.get("message", "") for each in problems) or str(status)
    return Report(passed=frozenset(passed), failed=failed)
