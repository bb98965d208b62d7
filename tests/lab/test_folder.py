"""Folders of the host in a real guest: what programs expect, what the host sees, what is not."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from lab_guest.in_guest.folder_checks import CHECKS
from lab_guest.machine import GuestError, Machine
from lab_guest.streams import random_bytes

pytestmark = pytest.mark.timeout(300)

FOLDER_CHECKS = "python3 -I -S /run/checks/folder_checks.py"
CACHES = ("never", "auto", "always")
HUNDRED_THOUSAND = 100_000
MANY_FILES = {"never": 100, "auto": 5000, "always": 100}
# A second that names and attributes may be kept, and one for an emulated guest.
KEPT_S = 2.0


class Results:
    """What the checks said, by the folder's cache mode; run once for each."""

    def __init__(self) -> None:
        self._results: dict[str, dict[str, str]] = {}

    def of(self, guest: Machine, folder: Path, cache: str) -> dict[str, str]:
        if cache not in self._results:
            (folder / cache).mkdir()
            output = guest.run(
                f"MANY_FILES={MANY_FILES[cache]} CACHE={cache}"
                f" {FOLDER_CHECKS} /run/{cache}/{cache}",
                timeout_s=200,
            )
            self._results[cache] = {
                line.split()[1]: part.strip()
                for part in ("\n" + output).split("\nCHECK ")[1:]
                if (line := part.partition("\n")[0])
            }
        return self._results[cache]


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_programs_find_a_file_system(
    guest: Machine, folder: Path, results: Results, cache: str, check: str
) -> None:
    said = results.of(guest, folder, cache)
    assert said[check] == f"ok {check}", said[check]


@pytest.mark.timeout(600)
def test_a_hundred_thousand_files_are_known_at_once(guest: Machine, folder: Path) -> None:
    many = folder / "many"
    many.mkdir()
    for number in range(HUNDRED_THOUSAND):
        os.close(os.open(many / f"file-{number}", os.O_CREAT | os.O_WRONLY, 0o640))
    # Each is looked up, and stays known as long as the guest has memory for it.
    found = guest.run("find /run/auto/many -type f -perm 640 | wc -l", timeout_s=400)
    assert int(found) == HUNDRED_THOUSAND
    guest.run("echo more >/run/auto/many/file-1 && rm /run/auto/many/file-2")
    assert (many / "file-1").read_text() == "more\n"
    assert not (many / "file-2").exists()
    shutil.rmtree(many)


def test_large_files_are_the_same_on_both_sides(guest: Machine, folder: Path) -> None:
    content = random_bytes(64 << 20, seed=1)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "from-host").write_bytes(content)
    said = guest.run(
        "sha256sum </run/always/from-host; cp /run/always/from-host /run/auto/from-guest;"
        " sync /run/auto/from-guest",
        timeout_s=200,
    )
    assert said.split()[0] == digest
    assert hashlib.sha256((folder / "from-guest").read_bytes()).hexdigest() == digest
    for name in ("from-host", "from-guest"):
        (folder / name).unlink()


def test_a_write_through_a_map_reaches_the_host(guest: Machine, folder: Path) -> None:
    (folder / "mapped").write_bytes(bytes(8192))
    guest.run(
        """python3 -I -S -c '
import mmap
with open("/run/auto/mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
    mapped[4090:4102] = b"over the edge"[:12]
    mapped.flush()
'"""
    )
    assert (folder / "mapped").read_bytes()[4090:4102] == b"over the edg"


@pytest.mark.parametrize("cache", ["never", "auto"])
def test_the_guest_sees_what_the_host_changes(guest: Machine, folder: Path, cache: str) -> None:
    place = folder / f"changes-{cache}"
    place.mkdir()
    (place / "file").write_text("before")
    (place / "gone").write_text("x")
    look = f"cd /run/{cache}/{place.name} && echo * && cat file && stat -c ' %s' file"
    assert guest.run(look) == "file gone\nbefore 6"
    (place / "file").write_text("after all")
    (place / "gone").unlink()
    (place / "new").write_text("new")
    (place / "folder").mkdir()
    if cache == "auto":
        time.sleep(KEPT_S)
    assert guest.run(look) == "file folder new\nafter all 9"


def test_the_host_sees_owners_modes_and_links(guest: Machine, folder: Path) -> None:
    guest.run(
        "cd /run/auto && echo x >owned && chown 12:34 owned && chmod 4751 owned &&"
        " ln owned linked && ln -s owned symbolic"
    )
    status = (folder / "linked").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (12, 34, 0o4751)
    assert status.st_nlink == 2
    assert (folder / "symbolic").readlink() == Path("owned")


@pytest.mark.parametrize("cache", CACHES)
def test_no_link_leads_out_of_the_folder(
    guest: Machine, folder: Path, run_dir: Path, cache: str
) -> None:
    secret = run_dir / "secret"
    secret.write_text("only the host's")
    place = folder / f"escape-{cache}"
    place.mkdir()
    (place / "absolute").symlink_to(secret)
    up = os.path.relpath(secret, place.resolve())
    (place / "relative").symlink_to(up)
    (place / "parent").symlink_to("../../../../../..")
    (place / "root").symlink_to("/")
    here = f"/run/{cache}/{place.name}"
    for name in ("absolute", "relative", f"root/{secret}", f"parent/{secret}"):
        with pytest.raises(GuestError, match="No such file"):
            guest.run(f"cat {here}/{name}")
    # The guest's own root is what such links lead to.
    assert guest.run(f"cat {here}/root/proc/sys/kernel/osrelease").endswith("cloud-amd64")
    assert guest.run(f"cd -P {here}/../.. && pwd") == "/run"
    assert guest.run(f"cd {here} && ls ../..").split() != [str(run_dir)]


def test_a_folder_that_becomes_a_link_is_not_followed(
    guest: Machine, folder: Path, run_dir: Path
) -> None:
    outside = run_dir / "outside"
    outside.mkdir()
    (outside / "file").write_text("only the host's")
    (folder / "turned").mkdir()
    (folder / "turned" / "file").write_text("shared")
    assert guest.run("cat /run/never/turned/file") == "shared"
    holding = guest.begin(
        "cd /run/never/turned && touch inside"
        " && until test -e ../turn; do sleep 0.1; done && cat file"
    )
    guest.run("until test -e /run/never/turned/inside; do sleep 0.1; done")
    (folder / "turned").rename(folder / "moved")
    (folder / "turned").symlink_to(outside)
    with pytest.raises(GuestError, match="No such file"):
        guest.run("cat /run/never/turned/file")
    guest.run("touch /run/never/turn")
    assert holding.wait(timeout_s=30) == "shared"


def test_a_read_only_folder_refuses_changes(guest: Machine) -> None:
    for command in (
        "touch /run/checks/new",
        "rm /run/checks/folder_checks.py",
        "chmod 0 /run/checks/folder_checks.py",
        "mkdir /run/checks/new",
    ):
        with pytest.raises(GuestError, match="Read-only file system"):
            guest.run(command)
