"""The ``-info`` action: what this runtime is and can do, for containerd 2.0 and later.

containerd reads the features to decide whether user namespaces and recursive read-only mounts may
be asked for; neither is offered. Options on standard input are handed back unread, and the present
directory is not touched.
"""

from kata_hybrid import __version__
from kata_hybrid.shim import address, bootstrap
from kata_hybrid.shim.failure import ShimError

NAME = "io.containerd.kata-hybrid.v2"
FEATURES_TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
# JSON of the OCI features document. "user" is not among the namespaces, and idmap is off: ids are
# not mapped into the guest.
FEATURES = b"""{
"ociVersionMin":"1.0.0","ociVersionMax":"1.2.0",
"hooks":["prestart","createRuntime","createContainer","startContainer","poststart","poststop"],
"mountOptions":["bind","rbind","ro","rw","nosuid","suid","nodev","dev","noexec","exec","noatime",\
"atime","nodiratime","relatime","strictatime","private","rprivate","shared","rshared","slave",\
"rslave"],
"linux":{"namespaces":["cgroup","ipc","mount","network","pid","uts"],\
"cgroup":{"v1":true,"v2":true,"systemd":false,"rdma":false},\
"seccomp":{"enabled":true},"apparmor":{"enabled":false},"selinux":{"enabled":false},\
"intelRdt":{"enabled":false},"mountExtensions":{"idmap":{"enabled":false}}}
}"""


def runtime_info() -> bytes:
    """Return the serialized RuntimeInfo.

    Raises:
        ShimError: standard input is absurdly long.
    """
    options = _read_options()
    return bootstrap.encode_runtime_info(
        name=NAME,
        version=__version__,
        revision="",
        options=options,
        features=(FEATURES_TYPE_URL, FEATURES),
        annotations={},
    )


def _read_options() -> bytes:
    """Return the Any on standard input, or nothing when it is closed or holds something else."""
    try:
        data = address.read_all(0, what="standard input", limit=bootstrap.MAX_STDIN_BYTES)
        bootstrap.decode_any(data)
    except ShimError:
        raise
    except (OSError, ValueError):
        return b""
    return data
