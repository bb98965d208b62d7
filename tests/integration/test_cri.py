"""Pods by way of containerd's Kubernetes part, each a machine: what a kubelet relies on."""

import contextlib
import hashlib
import os
import secrets
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from busybox_image import IMAGE_NAME, PAUSE_NAME
from go_build import CRICTL
from harness.containers import KATA_RUNTIME
from harness.cri import GATEWAY, Cri, cri_containerd, pod_cgroup
from harness.daemon import Containerd, ContainerdInstall, CriSettings
from harness.deadline import wait_until
from harness.leaks import find_processes
from harness.pods import Namespace

BUILD = Path(__file__).resolve().parents[2] / "build"
_FOREVER = ("sleep", "100000")
_PODS_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def containerd(
    install: ContainerdInstall,
    shim_dir: Path | None,
    configuration: Path,
    runtime: str,
    node: Path,
) -> Iterator[Containerd]:
    """A daemon with its Kubernetes part, instead of the session's without."""
    with cri_containerd(
        install,
        settings=CriSettings(runtime=runtime, pause_image=PAUSE_NAME, network=node),
        shim_dir=shim_dir,
        configuration=configuration,
        archive=BUILD / "images" / "busybox.tar",
    ) as daemon:
        Cri(daemon, crictl=CRICTL, image=IMAGE_NAME).wait_for_images(IMAGE_NAME, PAUSE_NAME)
        yield daemon


def test_a_pod_has_its_name_servers_and_addresses(cri: Cri) -> None:
    dns = {"servers": [GATEWAY], "searches": ["example.test"], "options": ["ndots:5"]}
    with cri.pod(hostname="a-pod", dns_config=dns) as pod:
        container = pod.start(*_FOREVER)
        assert cri.exec(container, "hostname") == "a-pod"
        resolv = cri.exec(container, "cat", "/etc/resolv.conf").split("\n")
        assert sorted(resolv) == [
            f"nameserver {GATEWAY}",
            "options ndots:5",
            "search example.test",
        ]
        inside = cri.exec(container, "ip", "-o", "address", "show", "dev", "eth0")
        assert len(pod.addresses) == 2
        for address in pod.addresses:
            assert f" {address}/" in inside
        assert cri.exec(container, "ping", "-c1", "-W5", GATEWAY)


def test_containers_of_a_pod_talk_over_localhost_and_share_one_machine(
    cri: Cri, runtime: str
) -> None:
    with cri.pod() as pod:
        server = pod.start("httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/etc")
        other = pod.start(*_FOREVER)
        fetch = ("exec", "--sync", other, "wget", "-q", "-O-", "http://127.0.0.1:8080/group")

        def is_served() -> bool:
            return "extra:x:2000:user" in cri.attempt(*fetch).text

        wait_until(is_served, what="an answer from next door", timeout_s=20)
        if runtime == KATA_RUNTIME:
            assert len(find_processes(cri.containerd, name="kata-hybrid")) == 1
            boots = {
                cri.exec(each, "cat", "/proc/sys/kernel/random/boot_id") for each in (server, other)
            }
            assert len(boots) == 1
            assert boots != {Path("/proc/sys/kernel/random/boot_id").read_text().strip()}


def received(client: socket.socket) -> bytes:
    """Return what comes until the end, or a reset."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(1 << 16):
            data += more
    return data


def test_a_port_is_forwarded_to_whoever_listens_in_the_pod(cri: Cri, node: Path) -> None:
    script = (
        "dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null;"
        "exec httpd -f -p 127.0.0.1:8080 -h /tmp"
    )
    digest = "wget -q -O- http://127.0.0.1:8080/data | sha256sum"
    connect = Namespace(node.name).connect
    with cri.pod() as pod:
        server = pod.start("sh", "-c", script)
        nothing = hashlib.sha256(b"").hexdigest()
        expected = nothing

        def is_served() -> bool:
            nonlocal expected
            expected = cri.exec(server, "sh", "-c", digest).split()[0]
            return expected != nothing

        wait_until(is_served, what="an answer in the pod", timeout_s=20)
        with cri.forwarded(pod.id, 8080) as port:
            for _ in range(3):
                with connect("127.0.0.1", port) as client:
                    client.sendall(b"GET /data HTTP/1.0\r\n\r\n")
                    head, _, data = received(client).partition(b"\r\n\r\n")
                    assert b" 200 " in head
                    assert hashlib.sha256(data).hexdigest() == expected
        with cri.forwarded(pod.id, 8081) as port, connect("127.0.0.1", port) as client:
            # Nobody listens there.
            assert received(client) == b""


def test_output_is_logged_and_commands_are_run_and_attached_to(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.start(
            "sh", "-c", "echo out; echo err >&2; while read a; do echo $a; done", stdin=True
        )

        def logged() -> tuple[bytes, bytes]:
            output = cri.run("logs", container)
            return output.stdout, output.stderr

        wait_until(lambda: logged() == (b"out\n", b"err\n"), what="lines in the log", timeout_s=20)
        failed = cri.attempt("exec", container, "sh", "-c", "echo streamed; exit 7")
        assert (failed.text, failed.status) == ("streamed", 1)
        assert "7" in failed.error
        assert cri.attempt("exec", "--sync", container, "false").status != 0
        with cri.attached(container) as attached:
            assert attached.stdin is not None
            assert attached.stdout is not None
            attached.stdin.write(b"typed\n")
            attached.stdin.flush()
            assert attached.stdout.readline() == b"typed\n"


def test_a_container_is_restarted_beside_another(cri: Cri) -> None:
    with cri.pod() as pod:
        steady = pod.start(*_FOREVER, name="steady")
        first = pod.start("sh", "-c", "exit 3", name="again")
        wait_until(lambda: cri.state(first) == "CONTAINER_EXITED", what="the exit", timeout_s=20)
        assert cri.exit_status(first) == (3, "Error")
        second = pod.start(*_FOREVER, metadata={"name": "again", "attempt": 1})
        cri.run("rm", first)
        cri.run("stop", "--timeout", "1", second)
        assert cri.exit_status(second) == (137, "Error")
        third = pod.start("true", metadata={"name": "again", "attempt": 2})
        wait_until(lambda: cri.state(third) == "CONTAINER_EXITED", what="the exit", timeout_s=20)
        assert cri.exit_status(third) == (0, "Completed")
        assert cri.exec(steady, "echo", "still here") == "still here"


def test_a_pod_goes_with_its_containers_running(cri: Cri) -> None:
    with cri.pod() as pod:
        for _ in range(3):
            pod.start(*_FOREVER)
        cri.run("stopp", pod.id)
        assert not pod.is_ready()
        cri.run("rmp", pod.id)
    assert cri.run("pods", "--quiet").text == ""
    assert cri.run("ps", "--all", "--quiet").text == ""


def test_a_container_that_takes_too_much_memory_is_told_to_be_killed_for_it(cri: Cri) -> None:
    limit = {"resources": {"memory_limit_in_bytes": 32 << 20}}
    with cri.pod() as pod:
        steady = pod.start(*_FOREVER)
        greedy = pod.start("dd", "if=/dev/zero", "of=/dev/null", "bs=256M", linux=limit)
        wait_until(lambda: cri.state(greedy) == "CONTAINER_EXITED", what="its end", timeout_s=60)
        assert cri.exit_status(greedy) == (137, "OOMKilled")
        assert cri.exec(steady, "echo", "still here") == "still here"


@pytest.mark.timeout(600)
def test_ten_pods_come_and_go_at_once(cri: Cri) -> None:
    def use(number: int) -> str:
        with contextlib.ExitStack() as pods:
            try:
                pod = pods.enter_context(cri.pod())
                container = pod.start(*_FOREVER)
            except BaseException:
                all_run.abort()
                raise
            all_run.wait(_PODS_TIMEOUT_S)
            assert len(pod.addresses) == 2
            return cri.exec(container, "echo", str(number))

    # An emulated processor boots three in the time that one has.
    count = 3 if os.environ.get("KATA_HYBRID_LAB") == "1" else 10
    all_run = threading.Barrier(count)
    with ThreadPoolExecutor(count) as threads:
        assert [*threads.map(use, range(count))] == [str(number) for number in range(count)]
    assert cri.run("pods", "--quiet").text == ""


def test_processes_are_the_containers_own_or_the_pods(cri: Cri) -> None:
    for pid, is_shared in ((1, False), (0, True)):
        context = {"security_context": {"namespace_options": {"pid": pid}}}
        with cri.pod(linux=context) as pod:
            container = pod.start(*_FOREVER, linux=context)
            listed = cri.exec(container, "ps", "-o", "pid,args")
            assert ("2147483647" in listed) is is_shared, listed
            first = cri.exec(container, "cat", "/proc/1/cmdline")
            assert ("100000" in first) is not is_shared, first


def test_sysctls_are_the_pods(cri: Cri) -> None:
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"}
    with cri.pod(linux={"sysctls": sysctls}) as pod:
        container = pod.start(*_FOREVER)
        for name, value in sysctls.items():
            path = f"/proc/sys/{name.replace('.', '/')}"
            assert cri.exec(container, "cat", path) == value


def test_security_settings_are_the_containers(cri: Cri) -> None:
    net_admin = 1 << 12
    with cri.pod(linux={"security_context": {"privileged": True}}) as pod:

        def started(**settings: object) -> tuple[str, dict[str, str]]:
            context = {"namespace_options": {"pid": 1}, **settings}
            container = pod.start(*_FOREVER, linux={"security_context": context})
            lines = cri.exec(container, "cat", "/proc/1/status").splitlines()
            return container, {
                key: value.strip() for key, _, value in (x.partition(":") for x in lines)
            }

        _, plain = started()
        assert int(plain["CapEff"], 16) & net_admin == 0
        assert plain["NoNewPrivs"] == "0"
        _, added = started(capabilities={"add_capabilities": ["NET_ADMIN"]})
        assert int(added["CapEff"], 16) == int(plain["CapEff"], 16) | net_admin
        _, dropped = started(capabilities={"drop_capabilities": ["ALL"]}, no_new_privs=True)
        assert int(dropped["CapEff"], 16) == 0
        assert dropped["NoNewPrivs"] == "1"
        _, privileged = started(privileged=True)
        assert int(privileged["CapEff"], 16) > int(added["CapEff"], 16)
        masked, _ = started(masked_paths=["/etc/group"], readonly_paths=["/tmp"])
        assert cri.exec(masked, "cat", "/etc/group") == ""
        assert "Read-only" in cri.attempt("exec", "--sync", masked, "touch", "/tmp/x").error


def test_a_pods_limits_size_its_machine(cri: Cri, runtime: str) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip(f"{runtime} has no machine")
    limits = {
        "cpu_period": 100_000,
        "cpu_quota": 150_000,
        "memory_limit_in_bytes": 300 << 20,
    }
    with cri.pod(linux={"resources": limits}) as pod:
        container = pod.start(*_FOREVER)
        assert int(cri.exec(container, "nproc")) == min(2, os.cpu_count() or 1)
        total_kib = int(cri.exec(container, "cat", "/proc/meminfo").split()[1])
        # 128 MiB more than the limit, of which the kernel keeps some to itself.
        assert 300 << 10 < total_kib < 428 << 10


def test_numbers_of_containers_are_those_of_the_guest(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.start("sh", "-c", "while :; do :; done")

        # That is more than starting it takes.
        wait_until(
            lambda: cri.used_cpu_ns(container) > 1_000_000_000, what="a second", timeout_s=60
        )


def test_numbers_of_a_pod_are_those_of_its_machine(cri: Cri, runtime: str) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip(f"{runtime} has no machine")
    # The kubelet makes the pod's cgroup; its machine's goes below.
    with (
        pod_cgroup(f"/{cri.containerd.namespace}/{secrets.token_hex(4)}") as parent,
        cri.pod(linux={"cgroup_parent": parent}) as pod,
    ):
        pod.start(*_FOREVER)
        # What the guest touched while it booted, at least.
        assert cri.used_memory_of_pod(pod.id) > 32 << 20


def test_a_pod_outlives_a_restart_of_containerd(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.start(*_FOREVER)
        cri.restart()
        assert pod.is_ready()
        assert cri.state(container) == "CONTAINER_RUNNING"
        assert cri.exec(container, "echo", "there") == "there"


def test_a_pod_whose_machine_is_lost_is_not_ready_and_can_be_removed(
    cri: Cri, runtime: str
) -> None:
    if runtime != KATA_RUNTIME:
        pytest.skip("needs a runtime with virtual machines")
    with cri.pod() as pod:
        container = pod.start(*_FOREVER)
        (shim,) = find_processes(cri.containerd, name="kata-hybrid")
        os.kill(shim.pid, signal.SIGKILL)
        wait_until(lambda: not pod.is_ready(), what="the loss", timeout_s=20)
        wait_until(
            lambda: cri.state(container) == "CONTAINER_EXITED", what="the exit", timeout_s=20
        )
        cri.run("stopp", pod.id)
        cri.run("rmp", pod.id)


def test_a_volume_in_memory_is_the_guests_and_outlives_its_containers(
    cri: Cri, tmp_path: Path, runtime: str
) -> None:
    volume = tmp_path / "kubernetes.io~empty-dir" / "cache"
    volume.mkdir(parents=True)
    mount = ("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", os.fspath(volume))
    subprocess.run(mount, check=True, timeout=10)
    try:
        mounts = [{"host_path": os.fspath(volume), "container_path": "/cache"}]
        with cri.pod() as pod:
            first = pod.start(*_FOREVER, mounts=mounts)
            second = pod.start(*_FOREVER, mounts=mounts)
            cri.exec(first, "sh", "-c", "echo hello >/cache/file")
            assert cri.exec(second, "cat", "/cache/file") == "hello"
            used = cri.exec(first, "df", "-Pk", "/cache").splitlines()[-1].split()
            assert (used[0], used[1]) == ("tmpfs", "8192")
            assert (
                cri.attempt(
                    *("exec", "--sync", first, "sh", "-c"),
                    "head -c 9000000 /dev/zero >/cache/large",
                ).status
                != 0
            )
            if runtime == KATA_RUNTIME:
                assert not [*volume.iterdir()]
            for each in (first, second):
                cri.run("rm", "--force", each)
            third = pod.start(*_FOREVER, mounts=mounts)
            assert cri.exec(third, "cat", "/cache/file") == "hello"
    finally:
        subprocess.run(["umount", os.fspath(volume)], check=True, timeout=10)


def test_configuration_that_changes_on_the_host_changes_in_the_guest(
    cri: Cri, tmp_path: Path
) -> None:
    """As the kubelet writes it: files behind a link to a folder, which is replaced as one."""
    folder = tmp_path / "kubernetes.io~configmap" / "settings"
    folder.mkdir(parents=True)

    def write(text: str) -> None:
        new = folder / f"..{secrets.token_hex(4)}"
        new.mkdir()
        (new / "key").write_text(text)
        link = folder / "..data_tmp"
        link.symlink_to(new.name)
        link.rename(folder / "..data")

    write("before")
    (folder / "key").symlink_to("..data/key")
    mounts = [
        {"host_path": os.fspath(folder), "container_path": "/settings", "readonly": True},
    ]
    with cri.pod() as pod:
        container = pod.start(*_FOREVER, mounts=mounts)
        assert cri.exec(container, "cat", "/settings/key") == "before"
        write("after")
        wait_until(
            lambda: cri.exec(container, "cat", "/settings/key") == "after",
            what="the change",
            timeout_s=5,
        )
        assert cri.attempt("exec", "--sync", container, "touch", "/settings/x").status != 0


def test_a_volume_on_disk_has_what_was_written_on_either_side(cri: Cri, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = secrets.token_bytes(1 << 20) * 64
    (tmp_path / "data" / "from-host").write_bytes(content)
    mounts = [{"host_path": os.fspath(tmp_path / "data"), "container_path": "/data"}]
    with cri.pod() as pod:
        container = pod.start(*_FOREVER, mounts=mounts)
        copy = "cp /data/from-host /data/from-guest && sha256sum </data/from-guest"
        told = cri.exec(container, "sh", "-c", copy).split()[0]
    assert told == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "data" / "from-guest").read_bytes() == content
