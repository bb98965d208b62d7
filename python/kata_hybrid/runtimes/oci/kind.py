"""Is this container a pod's sandbox, one of a pod's containers, or on its own?

Decided by annotations that CRI implementations put into the spec. Imports nothing: the ``start``
action asks this too, before anything else is loaded.
"""

SINGLE = "single_container"
SANDBOX = "pod_sandbox"
CONTAINER = "pod_container"

CRI_KIND = "io.kubernetes.cri.container-type"
CRI_SANDBOX = "sandbox"
_KINDS = {
    CRI_KIND: {CRI_SANDBOX: SANDBOX, "container": CONTAINER},
    "io.kubernetes.cri-o.ContainerType": {"sandbox": SANDBOX, "container": CONTAINER},
    "io.kubernetes.docker.type": {"podsandbox": SANDBOX, "container": CONTAINER},
}
_SANDBOX_IDS = (
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.sandbox.id",
)


def container_kind(annotations: dict[str, str]) -> str:
    """Return SINGLE, SANDBOX or CONTAINER."""
    for key, kinds in _KINDS.items():
        kind = kinds.get(annotations.get(key, ""))
        if kind is not None:
            return kind
    return SINGLE


def sandbox_id(container_id: str, annotations: dict[str, str]) -> str:
    """Return the id of the sandbox the container belongs to: its own unless it joins a pod."""
    if container_kind(annotations) == CONTAINER:
        for key in _SANDBOX_IDS:
            if annotations.get(key):
                return annotations[key]
    return container_id
