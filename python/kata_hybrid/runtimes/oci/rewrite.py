"""Turn the host's OCI spec into the one the guest runs.

Paths become guest paths; what only has a meaning on the host (namespace paths, device rules, CPU
pinning, host hooks) is left out. Follows what Kata's runtimes send, so either agent understands it.
"""

from collections.abc import Mapping
from typing import Final

from kata_hybrid.runtimes.oci.devices import guest_devices
from kata_hybrid.runtimes.oci.kind import container_kind
from kata_hybrid.runtimes.oci.spec import Spec, SpecMount
from kata_hybrid.runtimes.oci.values import as_list, as_object
from kata_hybrid.types import JsonObject

# The agent shares the pod's network by giving it none of its own, makes the pid namespace itself,
# and has no message for time offsets.
_DROPPED_NAMESPACES: Final = frozenset({"pid", "network", "time"})
# The pod's device rules, pids, block and network limits are the host's; CPU numbers are too.
_DROPPED_RESOURCES: Final = ("devices", "blockIO", "network")


def guest_spec(
    spec: Spec,
    *,
    root_path: str,
    mounts: tuple[SpecMount, ...],
    bundle: str,
    is_seccomp_disabled: bool,
    sysctls: Mapping[str, str] | None = None,
) -> JsonObject:
    """Rewrite ``spec`` for the guest.

    Args:
        spec: the bundle's.
        root_path: the root file system, a guest path.
        mounts: the spec's mounts with guest sources.
        bundle: the bundle folder, told to the agent in an annotation.
        is_seccomp_disabled: leave the seccomp profile out.
        sysctls: the pod's; those of the spec win.
    """
    # Copied as deep as it is changed: how deep the rest goes is the user's choice.
    guest = dict(spec.raw)
    guest["root"] = {**as_object(guest["root"], "root"), "path": root_path}
    guest["mounts"] = [mount.to_json() for mount in mounts]
    guest["hooks"] = _guest_hooks(guest.get("hooks"))
    guest["annotations"] = {
        **spec.annotations,
        "io.katacontainers.pkg.oci.container_type": container_kind(spec.annotations),
        "io.katacontainers.pkg.oci.bundle_path": bundle,
    }
    guest["process"] = process = dict(as_object(guest["process"], "process"))
    process.pop("apparmorProfile", None)
    process.pop("selinuxLabel", None)
    guest["linux"] = linux = dict(as_object(guest.get("linux") or {}, "linux"))
    linux.pop("mountLabel", None)
    if is_seccomp_disabled:
        linux.pop("seccomp", None)
    linux["namespaces"] = _guest_namespaces(linux.get("namespaces") or [])
    if sysctls:
        own = as_object(linux.get("sysctl") or {}, "linux.sysctl")
        linux["sysctl"] = {**sysctls, **own}
    devices, rules = guest_devices(linux, spec.block_nodes)
    if "devices" in linux:
        linux["devices"] = devices
    linux["resources"] = resources = guest_resources(linux.get("resources") or {})
    if rules:
        resources["devices"] = rules
    return guest


def guest_resources(resources: object) -> JsonObject:
    """Rewrite OCI LinuxResources for the guest.

    Raises:
        InvalidSpecError: it is not an object.
    """
    guest = dict(as_object(resources, "linux.resources"))
    for key in _DROPPED_RESOURCES:
        guest.pop(key, None)
    if guest.get("cpu"):
        cpu = dict(as_object(guest["cpu"], "linux.resources.cpu"))
        cpu.pop("cpus", None)
        cpu.pop("mems", None)
        guest["cpu"] = cpu
    return guest


def _guest_namespaces(value: object) -> list[JsonObject]:
    kinds = [
        as_object(item, f"linux.namespaces[{index}]").get("type")
        for index, item in enumerate(as_list(value, "linux.namespaces"))
    ]
    kept: list[JsonObject] = [{"type": kind} for kind in kinds if kind not in _DROPPED_NAMESPACES]
    # The agent appends its pid namespace to a list that must not be empty.
    return kept or [{"type": "mount"}]


def _guest_hooks(value: object) -> JsonObject:
    hooks = as_object(value or {}, "hooks")
    return {"startContainer": hooks["startContainer"]} if hooks.get("startContainer") else {}
