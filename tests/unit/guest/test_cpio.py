import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_hybrid.errors import InvalidArgumentError
from kata_hybrid.guest.cpio import (
    CpioEntry,
    character_device,
    directory,
    read_archive,
    regular_file,
    symbolic_link,
    write_archive,
)

NAMES = st.text("abcXYZ019._- ", min_size=1, max_size=12).filter(
    lambda name: name.strip(".") != "" and name != "TRAILER!!!"
)
FILES = st.dictionaries(NAMES, st.binary(max_size=300), max_size=8)


@given(FILES)
def test_what_is_written_is_read_back(files: dict[str, bytes]) -> None:
    archive = write_archive(regular_file(name, data=data) for name, data in files.items())
    assert {entry.path: entry.data for entry in read_archive(archive)} == files


@given(FILES)
def test_order_of_entries_does_not_matter(files: dict[str, bytes]) -> None:
    forward = [regular_file(name, data=data) for name, data in files.items()]
    assert write_archive(forward) == write_archive(reversed(forward))


@given(st.binary(max_size=600))
def test_damaged_archives_are_refused_not_crashed_on(junk: bytes) -> None:
    archive = write_archive([regular_file("a", data=b"x" * 40)])
    for damaged in (junk, archive[: len(junk)], archive[:50] + junk):
        try:
            list(read_archive(damaged))
        except InvalidArgumentError:
            continue


def test_parents_come_before_their_children() -> None:
    archive = write_archive([regular_file("a/b/c", data=b""), regular_file("a-b", data=b"")])
    paths = [entry.path for entry in read_archive(archive)]
    assert paths.index("a") < paths.index("a/b") < paths.index("a/b/c")


@pytest.mark.parametrize("path", ["/etc", "../etc", "a/../b", "a//b", "", ".", "a/"])
def test_paths_that_are_not_inside_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgumentError):
        write_archive([directory(path)])


def test_a_path_that_comes_twice_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="twice"):
        write_archive([directory("a"), regular_file("a", data=b"")])


def test_kinds_and_modes_survive() -> None:
    entries = [
        character_device("console", major=5, minor=1),
        symbolic_link("link", target="/sbin/init"),
        directory("tmp", mode=0o1777),
    ]
    found = {entry.path: entry for entry in read_archive(write_archive(entries))}
    assert found["console"] == CpioEntry(path="console", mode=stat.S_IFCHR | 0o600, device=(5, 1))
    assert found["link"].data == b"/sbin/init"
    assert found["tmp"].mode == stat.S_IFDIR | 0o1777


def test_the_cpio_program_agrees(tmp_path: Path) -> None:
    archive = write_archive(
        [regular_file("etc/one", data=b"first"), symbolic_link("two", target="etc/one")]
    )
    try:
        subprocess.run(
            ["cpio", "--extract", "--quiet", "--make-directories"],
            input=archive,
            cwd=tmp_path,
            check=True,
        )
    except FileNotFoundError:
        pytest.skip("the cpio program is not installed")
    assert (tmp_path / "etc/one").read_bytes() == b"first"
    assert (tmp_path / "two").read_text() == "first"
