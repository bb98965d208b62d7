"""What programs expect of a file system, checked inside the guest on a folder of the host.

    folder_checks.py FOLDER    prints "CHECK ok NAME" or "CHECK failed NAME" and a traceback

Standard library only. The names of checks are those of the functions below; each gets an empty
folder.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
AT_FDCWD = -100
# What is never cached has no page that two could map; from 6.6 on the kernel keeps one for it.
CANNOT_SHARE_MAPPINGS = os.environ.get("CACHE") == "never" and [
    int(number) for number in os.uname().release.split(".")[:2]
] < [6, 6]
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """What is done here fails with this error."""
    try:
        yield
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(f"no {errno.errorcode[number]}")


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def in_child(work: Callable[[], None]) -> int:
    """Do something in another process; give its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def renameat2(source: str, target: str, flags: int) -> None:
    if _LIBC.renameat2(AT_FDCWD, source.encode(), AT_FDCWD, target.encode(), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def rename() -> None:
    write("a", b"first")
    os.rename("a", "b")
    assert os.listdir(".") == ["b"]
    write("c", b"second")
    open_before = os.open("b", os.O_RDONLY)
    os.rename("c", "b")
    assert read("b") == b"second"
    assert os.pread(open_before, 10, 0) == b"first"
    os.close(open_before)
    os.makedirs("d/deep")
    os.rename("b", "d/deep/b")
    os.rename("d", "e")
    assert read("e/deep/b") == b"second"
    os.mkdir("f")
    os.rename("f", "e/f")
    with fails(errno.EINVAL):
        os.rename("e", "e/deep/e")
    with fails(errno.ENOTEMPTY):
        os.rename("e/f", "e/deep")
    write("g", b"g")
    with fails(errno.ENOTDIR):
        os.rename("e", "g")
    with fails(errno.EISDIR):
        os.rename("g", "e")


def rename_flags() -> None:
    write("a", b"a")
    write("b", b"b")
    with fails(errno.EEXIST):
        renameat2("a", "b", RENAME_NOREPLACE)
    renameat2("a", "b", RENAME_EXCHANGE)
    assert (read("a"), read("b")) == (b"b", b"a")
    os.mkdir("d")
    renameat2("a", "d", RENAME_EXCHANGE)
    assert os.path.isdir("a")
    assert read("d") == b"b"


def hard_links() -> None:
    write("a", b"same")
    os.link("a", "b")
    os.mkdir("d")
    os.link("b", "d/c")
    one, two = os.stat("a"), os.stat("d/c")
    assert (one.st_ino, one.st_nlink) == (two.st_ino, 3)
    with open("b", "ab") as file:
        file.write(b", longer")
    assert read("d/c") == b"same, longer"
    os.unlink("a")
    os.unlink("b")
    assert read("d/c") == b"same, longer"
    assert os.stat("d/c").st_nlink == 1
    with fails(errno.EPERM):
        os.link("d", "e")


def symbolic_links() -> None:
    write("a", b"content")
    os.symlink("a", "link")
    assert os.readlink("link") == "a"
    assert read("link") == b"content"
    assert stat.S_ISLNK(os.lstat("link").st_mode)
    os.symlink("nowhere", "dangling")
    with fails(errno.ENOENT):
        os.stat("dangling")
    os.symlink("loop", "loop")
    with fails(errno.ELOOP):
        read("loop")
    os.unlink("link")
    assert read("a") == b"content"
    target = "x" * 4000
    os.symlink(target, "long")
    assert os.readlink("long") == target


def extended_attributes() -> None:
    write("a", b"")
    os.setxattr("a", "user.one", b"1")
    os.setxattr("a", "user.two", bytes(range(256)) * 8)
    assert set(os.listxattr("a")) >= {"user.one", "user.two"}
    assert os.getxattr("a", "user.two") == bytes(range(256)) * 8
    with fails(errno.EEXIST):
        os.setxattr("a", "user.one", b"2", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr("a", "user.three", b"3", os.XATTR_REPLACE)
    os.setxattr("a", "user.one", b"longer than before")
    assert os.getxattr("a", "user.one") == b"longer than before"
    os.removexattr("a", "user.one")
    with fails(errno.ENODATA):
        os.getxattr("a", "user.one")
    os.mkdir("d")
    os.setxattr("d", "user.of.folder", b"")
    assert os.getxattr("d", "user.of.folder") == b""


def mapped_shared() -> None:
    write("a", bytes(3 * mmap.PAGESIZE))
    if CANNOT_SHARE_MAPPINGS:
        with open("a", "r+b") as file, fails(errno.ENODEV):
            mmap.mmap(file.fileno(), 0)
        return
    with open("a", "r+b") as file, mmap.mmap(file.fileno(), 0) as one:
        with open("a", "r+b") as again, mmap.mmap(again.fileno(), 0) as two:
            one[mmap.PAGESIZE - 2 : mmap.PAGESIZE + 2] = b"over"
            assert two[mmap.PAGESIZE - 2 : mmap.PAGESIZE + 2] == b"over"
            one.flush()
        assert os.pread(file.fileno(), 4, mmap.PAGESIZE - 2) == b"over"
        os.pwrite(file.fileno(), b"written", 2 * mmap.PAGESIZE)
        assert one[2 * mmap.PAGESIZE : 2 * mmap.PAGESIZE + 7] == b"written"

        def change() -> None:
            one[0:5] = b"child"
            one.flush()

        assert in_child(change) == 0
        assert one[0:5] == b"child"
    assert read("a")[:5] == b"child"


def mapped_private() -> None:
    write("a", b"original" + bytes(mmap.PAGESIZE))
    with (
        open("a", "r+b") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as private,
    ):
        private[0:8] = b"changed!"
        assert private[0:8] == b"changed!"
        assert os.pread(file.fileno(), 8, 0) == b"original"
    assert read("a")[:8] == b"original"


def locks_of_files() -> None:
    write("a", b"")
    with open("a", "rb") as one, open("a", "rb") as two:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH)
        with fails(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with fails(errno.EAGAIN):
            fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)


def locks_of_ranges() -> None:
    write("a", bytes(100))
    with open("a", "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)

        def contend() -> None:
            with open("a", "r+b") as other:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 30)
                with fails(errno.EAGAIN):
                    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 19)

        assert in_child(contend) == 0
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 20)

        def take() -> None:
            with open("a", "r+b") as other:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

        assert in_child(take) == 0


def appending() -> None:
    records = 60

    def append(letter: bytes) -> None:
        target = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in range(records):
            assert os.write(target, letter * 20 + b"%03d\n" % number) == 24
        os.close(target)

    children = []
    for letter in (b"a", b"b", b"c"):
        child = os.fork()
        if child == 0:
            append(letter)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    lines = read("log").splitlines()
    assert len(lines) == 3 * records
    for letter in (b"a", b"b", b"c"):
        own = [line for line in lines if line.startswith(letter)]
        assert own == [letter * 20 + b"%03d" % number for number in range(records)]
    # The position that a write names does not count.
    target = os.open("log", os.O_WRONLY | os.O_APPEND)
    os.lseek(target, 0, os.SEEK_SET)
    os.write(target, b"end")
    os.close(target)
    assert read("log").endswith(b"059\nend")


def truncating() -> None:
    write("a", b"0123456789")
    os.truncate("a", 4)
    assert read("a") == b"0123"
    os.truncate("a", 8)
    assert read("a") == b"0123" + bytes(4)
    with open("a", "r+b") as file:
        file.seek(6)
        file.write(b"67")
        file.flush()
        os.ftruncate(file.fileno(), 7)
        assert os.pread(file.fileno(), 20, 0) == b"0123\0\0" + b"6"
        os.ftruncate(file.fileno(), 5 << 30)
        assert os.pread(file.fileno(), 2, (5 << 30) - 2) == bytes(2)
    assert os.stat("a").st_size == 5 << 30
    with open("a", "wb"):
        pass
    assert os.stat("a").st_size == 0


def holes() -> None:
    with open("a", "w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
        assert os.stat("a").st_size == 1 << 20
        assert os.stat("a").st_blocks >= 2048
        os.pwrite(file.fileno(), b"x" * (64 << 10), 0)
        os.fsync(file.fileno())
        punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        size = ctypes.c_int64
        if _LIBC.fallocate(file.fileno(), punch, size(0), size(1 << 20)) != 0:
            raise OSError(ctypes.get_errno(), "punch a hole")
        assert os.stat("a").st_blocks < 100
        assert os.pread(file.fileno(), 4096, 4096) == bytes(4096)
        os.pwrite(file.fileno(), b"data", 512 << 10)
        os.fsync(file.fileno())
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 512 << 10
        assert os.lseek(file.fileno(), 512 << 10, os.SEEK_HOLE) == (512 << 10) + 4096


def copying() -> None:
    content = os.urandom(300_000)
    write("a", content)
    with open("a", "rb") as source, open("b", "wb") as target:
        copied = 0
        while count := os.copy_file_range(source.fileno(), target.fileno(), 1 << 20):
            copied += count
    assert copied == len(content)
    assert hashlib.sha256(read("b")).digest() == hashlib.sha256(content).digest()


def owners_and_modes() -> None:
    write("a", b"secret")
    os.chmod("a", 0o640)
    os.chown("a", 1234, 5678)
    found = os.stat("a")
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o640)
    os.mkdir("d")
    os.chmod("d", 0o1777)
    os.chmod(".", 0o755)

    def as_stranger() -> None:
        os.setgroups([])
        os.setgid(77)
        os.setuid(77)
        with fails(errno.EACCES):
            read("a")
        os.umask(0o027)
        write("d/mine", b"mine")
        os.mkdir("d/folder")
        mine = os.stat("d/mine")
        assert (mine.st_uid, mine.st_gid, stat.S_IMODE(mine.st_mode)) == (77, 77, 0o640)
        assert stat.S_IMODE(os.stat("d/folder").st_mode) == 0o750
        with fails(errno.EPERM):
            os.chown("d/mine", 0, 0)
        with fails(errno.EACCES):
            write("new", b"")

    assert in_child(as_stranger) == 0
    os.mkdir("group")
    os.chown("group", 0, 99)
    os.chmod("group", 0o2777)
    write("group/file", b"")
    assert os.stat("group/file").st_gid == 99

    def as_another() -> None:
        os.setgroups([])
        os.setuid(78)
        with fails(errno.EPERM):
            os.unlink("d/mine")

    assert in_child(as_another) == 0
    # Writing to a program takes its privilege away.
    write("program", b"x")
    os.chmod("program", 0o6755)
    os.chmod("program", 0o6777)

    def write_as_stranger() -> None:
        os.setgroups([])
        os.setuid(77)
        with open("program", "r+b") as file:
            file.write(b"y")

    assert in_child(write_as_stranger) == 0
    assert stat.S_IMODE(os.stat("program").st_mode) == 0o777


def times() -> None:
    write("a", b"")
    os.utime("a", ns=(1_000_000_001, 2_000_000_000_000_000_002))
    found = os.stat("a")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_000_000_000_002)
    before = found.st_ctime_ns
    # The host's clock for files ticks a few hundred times a second.
    time.sleep(0.02)
    os.chmod("a", 0o600)
    assert os.stat("a").st_ctime_ns > before
    os.symlink("a", "link")
    os.utime("link", ns=(5, 6), follow_symlinks=False)
    assert os.lstat("link").st_mtime_ns == 6
    assert os.stat("a").st_mtime_ns == 2_000_000_000_000_000_002


def unlinked_but_open() -> None:
    with open("a", "w+b") as file:
        file.write(b"before")
        file.flush()
        os.unlink("a")
        assert os.listdir(".") == []
        file.write(b", after")
        file.flush()
        assert os.pread(file.fileno(), 100, 0) == b"before, after"
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 3)
        assert os.fstat(file.fileno()).st_size == 3
    os.mkdir("d")
    folder = os.open("d", os.O_RDONLY)
    os.rmdir("d")
    assert os.listdir(folder) == []
    with fails(errno.ENOENT):
        os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=folder)
    os.close(folder)


def special_files() -> None:
    os.mkfifo("pipe", 0o600)
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)

    def say() -> None:
        write("pipe", b"through")

    child = os.fork()
    if child == 0:
        say()
        os._exit(0)
    assert read("pipe") == b"through"
    os.waitpid(child, 0)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")
    assert stat.S_ISSOCK(os.stat("socket").st_mode)


def names() -> None:
    for name in (b"x" * 255, b"\xff\xfe not utf-8", b" ", b"-", b"new\nline", "ünï".encode()):
        write(os.fsdecode(name), name)
    assert set(os.listdir(b".")) >= {b"x" * 255, b"\xff\xfe not utf-8", b"new\nline"}
    for name in os.listdir(b"."):
        assert read(os.fsdecode(name)) == name
    with fails(errno.ENAMETOOLONG):
        write("x" * 256, b"")


def errors() -> None:
    write("a", b"")
    os.mkdir("d")
    write("d/b", b"")
    with fails(errno.ENOTEMPTY):
        os.rmdir("d")
    with fails(errno.EISDIR):
        os.unlink("d")
    with fails(errno.ENOTDIR):
        os.rmdir("a")
    with fails(errno.ENOTDIR):
        os.stat("a/b")
    with fails(errno.EEXIST):
        os.mkdir("a")
    with fails(errno.EEXIST):
        os.open("a", os.O_CREAT | os.O_EXCL)
    with fails(errno.ENOENT):
        os.stat("missing/b")
    with fails(errno.EISDIR):
        open("d", "wb").close()
    space = os.statvfs(".")
    assert space.f_blocks >= space.f_bfree >= space.f_bavail
    assert space.f_namemax == 255


def many_files() -> None:
    count = int(os.environ.get("MANY_FILES", "2000"))
    wanted = {f"file-{number}" for number in range(count)}
    for name in wanted:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644))
    listed = os.listdir(".")
    assert len(listed) == count
    assert set(listed) == wanted
    # Removing while reading: each entry comes once.
    removed = 0
    with os.scandir(".") as entries:
        for entry in entries:
            os.unlink(entry.name)
            removed += 1
    assert removed == count
    assert os.listdir(".") == []


CHECKS: tuple[Callable[[], None], ...] = (
    rename,
    rename_flags,
    hard_links,
    symbolic_links,
    extended_attributes,
    mapped_shared,
    mapped_private,
    locks_of_files,
    locks_of_ranges,
    appending,
    truncating,
    holes,
    copying,
    owners_and_modes,
    times,
    unlinked_but_open,
    special_files,
    names,
    errors,
    many_files,
)


def main(folder: str) -> None:
    for check in CHECKS:
        place = os.path.join(folder, check.__name__)
        os.mkdir(place)
        os.chdir(place)
        try:
            check()
        except Exception:
            text = traceback.format_exc().replace("\n", "\n  ")
            print(f"CHECK failed {check.__name__}\n  {text}", flush=True)
        else:
            print(f"CHECK ok {check.__name__}", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1])
