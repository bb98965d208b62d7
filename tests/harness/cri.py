"""Pods as the kubelet runs them: ``crictl`` on a containerd whose node has a network of its own.

The node is a network namespace (``pods.Node`` without its pods): the CNI plugins make their bridge
in it, containerd and ``crictl`` run in it. Nothing of the host's network is touched.
"""

import contextlib
import functools
import itertools
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.daemon import (
    Containerd,
    ContainerdInstall,
    CriSettings,
    DaemonError,
    Output,
    private_containerd,
)
from harness.deadline import wait_until

SUBNET = "10.123.0.0/24"
GATEWAY = "10.123.0.1"
SUBNET6 = "fd12:3456::/64"
_PLUGINS = tuple(Path("/usr/lib/cni") / name for name in ("bridge", "host-local", "loopback"))
_BOOT_TIMEOUT_S = 90.0
_TIMEOUT_S = 60.0

PodConfig = dict[str, Any]


def missing_programs(crictl: Path) -> str:
    """Say which programs are not there, or return an empty string."""
    programs = [
        crictl,
        *_PLUGINS,
        *(Path(shutil.which(each) or each) for each in ("ip", "nsenter")),
    ]
    return ", ".join(os.fspath(path) for path in programs if not os.access(path, os.X_OK))


@contextlib.contextmanager
def node_namespace(program: Path) -> Iterator[Path]:
    """Make the network namespace that stands for the node's; ``program`` is what runs in it.

    Skips a test where it, or the right to, is missing.
    """
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    if missing := missing_programs(program):
        pytest.skip(f"no {missing}: run make setup")
    name = f"kh-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=10)
        yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=10)


def write_network(home: Path, *, maps_ports: bool = False) -> None:
    """Describe the pods' network below the daemon's folder: a bridge, IPv4 and IPv6.

    ``maps_ports``: ports of the node may stand for a pod's.
    """
    ipam = {
        "type": "host-local",
        "dataDir": os.fspath(home / "ipam"),
        "ranges": [[{"subnet": SUBNET}], [{"subnet": SUBNET6}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    bridge = {
        "type": "bridge",
        "bridge": "pods",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": ipam,
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    plugins = [bridge, portmap] if maps_ports else [bridge]
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}
    folder = home / "cni"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "10-pods.conflist").write_text(json.dumps(network))


@contextlib.contextmanager
def pod_cgroup(path: str) -> Iterator[str]:
    """Make a pod's cgroup in every hierarchy, as the kubelet does, and remove it in the end."""
    root = Path("/sys/fs/cgroup")
    is_v2 = (root / "cgroup.controllers").exists()
    # On v1 some are links to where two controllers are together.
    found = [each for each in root.iterdir() if each.is_dir() and not each.is_symlink()]
    hierarchies = [root] if is_v2 else found
    made = [hierarchy / path.lstrip("/") for hierarchy in hierarchies]
    for folder in made:
        for parent in (folder.parent, folder):
            parent.mkdir(exist_ok=True)
            if is_v2:
                controllers = (parent / "cgroup.controllers").read_text().split()
                wanted = " ".join(f"+{each}" for each in controllers)
                (parent / "cgroup.subtree_control").write_text(wanted)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if not is_v2 and (parent / name).exists():
                    (parent / name).write_text((parent.parent / name).read_text())
    try:
        yield path
    finally:
        for folder in made:
            folder.rmdir()


@contextlib.contextmanager
def cri_containerd(
    install: ContainerdInstall,
    *,
    settings: CriSettings,
    shim_dir: Path | None,
    configuration: Path,
    archive: Path,
    maps_ports: bool = False,
) -> Iterator[Containerd]:
    """Run a daemon with its Kubernetes part; skips a test where containerd is missing."""
    if missing := install.missing():
        pytest.skip(f"no {missing}: run make setup")
    with private_containerd(
        install,
        namespace="k8s.io",
        shim_dir=shim_dir,
        archive=archive,
        # The variable would win over the option.
        environment={} if settings.configuration else {"KATA_CONF_FILE": os.fspath(configuration)},
        cri=settings,
        prepare=functools.partial(write_network, maps_ports=maps_ports),
    ) as daemon:
        yield daemon


class Pod:
    """A pod that runs."""

    def __init__(self, cri: "Cri", config: PodConfig, pod_id: str) -> None:
        self.id = pod_id
        self._cri = cri
        self._config = config
        self._numbers = itertools.count(1)

    def create(self, *command: str, name: str = "", **fields: Any) -> str:
        """Create a container and return its id; ``fields`` go into its configuration."""
        name = name or f"c{next(self._numbers)}"
        config = {
            "metadata": {"name": name},
            "image": {"image": self._cri.image},
            "command": list(command),
            "log_path": f"{name}.log",
            "linux": {},
            **fields,
        }
        files = [
            self._cri.write(f"{self.id[:12]}-{what}.json", text)
            for what, text in (("container", config), ("pod", self._config))
        ]
        return self._cri.run("create", self.id, *files).text.split()[-1]

    def start(self, *command: str, name: str = "", **fields: Any) -> str:
        """Create a container, start it and return its id."""
        container_id = self.create(*command, name=name, **fields)
        self._cri.run("start", container_id)
        return container_id

    def status(self) -> dict[str, Any]:
        """What the CRI says of it."""
        status: dict[str, Any] = json.loads(self._cri.run("inspectp", self.id).text)
        return status

    @property
    def addresses(self) -> list[str]:
        """Its addresses, IPv4 first."""
        network = self.status()["status"]["network"]
        return [network["ip"], *(each["ip"] for each in network.get("additionalIps", ()))]

    def is_ready(self) -> bool:
        """Whether its sandbox runs."""
        return bool(self.status()["status"]["state"] == "SANDBOX_READY")


class Cri:
    """A containerd's Kubernetes part, by way of ``crictl``."""

    def __init__(self, containerd: Containerd, *, crictl: Path, image: str) -> None:
        self.containerd = containerd
        self.image = image
        self._crictl = crictl
        self._files = containerd.home / "crictl"
        self._files.mkdir(exist_ok=True)
        endpoint = f"unix://{containerd.address}"
        settings = {
            "runtime-endpoint": endpoint,
            "image-endpoint": endpoint,
            "timeout": int(_BOOT_TIMEOUT_S),
        }
        # Any YAML reader reads JSON.
        self._settings = self.write("crictl.yaml", settings)

    def write(self, name: str, content: object) -> str:
        """Write a file for ``crictl`` and return its path."""
        path = self._files / name
        path.write_text(json.dumps(content))
        return os.fspath(path)

    def argv(self, *arguments: str) -> list[str]:
        """Return the whole command line."""
        return self.containerd.on_node(
            os.fspath(self._crictl), "--config", self._settings, *arguments
        )

    def attempt(self, *arguments: str, stdin: bytes = b"") -> Output:
        """Run ``crictl`` and return what came of it, whatever its exit status."""
        done = subprocess.run(
            self.argv(*arguments),
            env=self.containerd.environment,
            input=stdin,
            capture_output=True,
            timeout=_BOOT_TIMEOUT_S + _TIMEOUT_S,
            check=False,
        )
        return Output(status=done.returncode, stdout=done.stdout, stderr=done.stderr)

    @contextlib.contextmanager
    def attached(self, container_id: str) -> Iterator[subprocess.Popen[bytes]]:
        """Attach to a container; ``stdin`` and ``stdout`` are pipes to it."""
        with subprocess.Popen(
            self.argv("attach", "--stdin", container_id),
            env=self.containerd.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def forwarded(self, pod_id: str, port: int) -> Iterator[int]:
        """Forward a port of a pod, and give the node's that stands for it."""
        with subprocess.Popen(
            self.argv("port-forward", pod_id, f":{port}"),
            env=self.containerd.environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                # Such as: Forwarding from 127.0.0.1:39153 -> 8080
                line = process.stdout.readline()
                words = line.split()
                if words[:2] != ["Forwarding", "from"]:
                    message = f"crictl port-forward {pod_id} :{port}: {line!r}"
                    raise DaemonError(message)
                yield int(words[2].rpartition(":")[2])
            finally:
                process.kill()

    def wait_for_images(self, *names: str) -> None:
        """Wait until images that were imported are known: that is told by events."""

        def are_known() -> bool:
            images = json.loads(self.run("images", "--output", "json").text)["images"]
            known = {tag for image in images for tag in image["repoTags"]}
            return known.issuperset(names)

        wait_until(are_known, what=f"images {', '.join(names)}", timeout_s=_TIMEOUT_S)

    def used_cpu_ns(self, container_id: str) -> int:
        """Return how long a container used a processor."""
        listed = json.loads(self.run("stats", "--output", "json", container_id).text)
        (numbers,) = listed["stats"]
        return int(numbers["cpu"]["usageCoreNanoSeconds"]["value"])

    def used_memory_of_pod(self, pod_id: str) -> int:
        """Return how many bytes the cgroup of a pod has."""
        listed = json.loads(self.run("statsp", "--output", "json", pod_id).text)
        (numbers,) = listed["stats"]
        return int(numbers["linux"]["memory"]["workingSetBytes"]["value"])

    def restart(self) -> None:
        """Stop containerd and start it again, until its Kubernetes part answers."""
        self.containerd.restart()
        wait_until(lambda: self.attempt("version").status == 0, what="CRI", timeout_s=_TIMEOUT_S)

    def run(self, *arguments: str, stdin: bytes = b"") -> Output:
        """Run ``crictl``, which has to succeed.

        Raises:
            DaemonError: it ended with another status than 0.
        """
        output = self.attempt(*arguments, stdin=stdin)
        if output.status != 0:
            command = " ".join(arguments)
            message = f"crictl {command}: exit status {output.status}: {output.error}{output.text}"
            raise DaemonError(f"{message}\n{self.containerd.log_tail()}")
        return output

    @contextlib.contextmanager
    def pod(self, **fields: Any) -> Iterator[Pod]:
        """Run a pod and remove it in the end; ``fields`` go into its configuration."""
        name = f"pod-{secrets.token_hex(3)}"
        config = {
            "metadata": {"name": name, "namespace": "default", "uid": name, "attempt": 0},
            "hostname": name,
            "log_directory": os.fspath(self.containerd.home / "logs" / name),
            "linux": {},
            **fields,
        }
        made = self.run("runp", self.write(f"{name}.json", config)).text.split()[-1]
        try:
            yield Pod(self, config, made)
        finally:
            self.attempt("rmp", "--force", made)

    def exec(self, container_id: str, *command: str) -> str:
        """Run a command in a container and return its output, without the last newline."""
        return self.run("exec", "--sync", container_id, *command).text

    def state(self, container_id: str) -> str:
        """Return a container's state, in CRI's words."""
        status = json.loads(self.run("inspect", container_id).text)["status"]
        return str(status["state"])

    def exit_status(self, container_id: str) -> tuple[int, str]:
        """Return the exit status of a container, and the reason that CRI gives."""
        status = json.loads(self.run("inspect", container_id).text)["status"]
        return int(status["exitCode"]), str(status["reason"])
