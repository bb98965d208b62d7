"""Keys of Kata's that this project does not implement: what a file that has them is told.

Kata's own files are full of them. A value that asks for what happens here anyway is taken in
silence; another is told in one line of the log and ignored; one whose loss would leave a guest less
protected than its owner believes, or that could not run, is an error. Names as in Kata's
``configuration.toml``, of both of its runtimes.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Table = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ForeignKey:
    """What to do about a key."""

    is_harmless: Callable[[object], bool]
    """Whether a value asks for what happens anyway."""
    refusal: str = ""
    """Why a harmful value is an error; empty: it is told and ignored."""


def _any(value: object) -> bool:
    del value
    return True


def _off(value: object) -> bool:
    """False, 0, an empty text or list: how Kata spells "not"."""
    return not value


def _disabled(value: object) -> bool:
    """A table whose switch is off."""
    return isinstance(value, dict) and not any(
        value.get(switch) for switch in ("enable", "mem_agent_enable", "enable_template")
    )


def _absent_folder(value: object) -> bool:
    return isinstance(value, str) and not os.path.isdir(value)  # noqa: PTH112 - may be empty


def _no_guest_pull(value: object) -> bool:
    return "force_guest_pull" not in (value if isinstance(value, list | str) else ())


def _on(value: object) -> bool:
    return value is True


def _one_of(*values: object) -> Callable[[object], bool]:
    return lambda value: value in values


IGNORED = ForeignKey(_off)
"""Told unless it is off."""
TUNING = ForeignKey(_any)
"""How another monitor or another design works: whatever it says, the guest sees no difference."""
_WEAKER = "the guest would be less protected than the file says"


def _refused(reason: str) -> ForeignKey:
    return ForeignKey(_off, reason)


_HYPERVISOR: Mapping[str, ForeignKey] = {
    # Programs.
    "ctlpath": IGNORED,
    "valid_ctlpaths": TUNING,
    "jailer_path": _refused(_WEAKER),
    "valid_jailer_paths": TUNING,
    "disable_nesting_checks": TUNING,
    "enable_iothreads": TUNING,
    "indep_iothreads": TUNING,
    "prefetch_list_path": IGNORED,
    # Disks.
    "disable_block_device_use": TUNING,
    "block_device_driver": TUNING,
    "block_device_cache_set": TUNING,
    "block_device_cache_noflush": IGNORED,
    "block_device_logical_sector_size": IGNORED,
    "block_device_physical_sector_size": IGNORED,
    "queue_size": TUNING,
    "num_queues": TUNING,
    "disable_image_nvdimm": TUNING,
    "memory_offset": IGNORED,
    "enable_vhost_user_store": IGNORED,
    "vhost_user_store_path": TUNING,
    "valid_vhost_user_store_paths": TUNING,
    "vhost_user_reconnect_timeout_sec": TUNING,
    # Boot.
    "image": _refused("machines boot from an initrd: set initrd and leave image out"),
    "rootfs_type": TUNING,
    "vm_rootfs_driver": TUNING,
    "kernel_verity_params": _refused(_WEAKER),
    "measurement_algo": TUNING,
    "firmware": IGNORED,
    "firmware_volume": IGNORED,
    "guest_extension_images": _refused(_WEAKER),
    # Processors and memory.
    "disable_nested_virtualization": IGNORED,
    "enable_numa": IGNORED,
    "numa_mapping": TUNING,
    "memory_slots": TUNING,
    "enable_mem_prealloc": IGNORED,
    "hugepage_type": ForeignKey(_one_of("hugetlbfs", "")),
    "enable_virtio_mem": IGNORED,
    "enable_guest_swap": IGNORED,
    "guest_swap_path": TUNING,
    "guest_swap_size_percent": TUNING,
    "guest_swap_create_threshold_secs": TUNING,
    # Finding faults.
    "log_level": TUNING,
    "hypervisor_loglevel": TUNING,
    "guest_memory_dump_path": IGNORED,
    "guest_memory_dump_paging": TUNING,
    "extra_monitor_socket": IGNORED,
    "dbg_monitor_socket": IGNORED,
    "use_legacy_serial": TUNING,
    # The machine.
    "default_bridges": TUNING,
    "cold_plug_vfio": ForeignKey(_one_of("no-port", "")),
    "hot_plug_vfio": ForeignKey(_one_of("no-port", "")),
    "hotplug_vfio_on_root_bus": IGNORED,
    "pcie_root_port": TUNING,
    "pcie_switch_port": TUNING,
    "enable_iommu": IGNORED,
    "enable_iommu_platform": IGNORED,
    "pflashes": IGNORED,
    "default_gpus": IGNORED,
    "default_gpu_model": TUNING,
    # Network.
    "disable_vhost_net": TUNING,
    "network_queues": ForeignKey(_one_of(0, 1)),
    "rx_rate_limiter_max_rate": IGNORED,
    "tx_rate_limiter_max_rate": IGNORED,
    "net_rate_limiter_bw_max_rate": IGNORED,
    "net_rate_limiter_bw_one_time_burst": TUNING,
    "net_rate_limiter_ops_max_rate": IGNORED,
    "net_rate_limiter_ops_one_time_burst": TUNING,
    # Protection.
    "rootless": _refused(_WEAKER),
    "rootless_user": TUNING,
    "disable_seccomp": IGNORED,
    "seccomp_sandbox": _refused(_WEAKER),
    "seccompsandbox": _refused(_WEAKER),
    "confidential_guest": _refused(_WEAKER),
    "sev_snp_guest": _refused(_WEAKER),
    "snp_id_block": _refused(_WEAKER),
    "snp_id_auth": _refused(_WEAKER),
    "snp_guest_policy": TUNING,
    "tdx_quote_generation_service_socket_port": TUNING,
    "guest_hook_path": IGNORED,
    "initdata": _refused(_WEAKER),
    "selinux_label": _refused(_WEAKER),
    "disable_selinux": TUNING,
    "disable_guest_selinux": ForeignKey(_on, _WEAKER),
    # Shared folders.
    "virtio_fs_cache_size": IGNORED,
    "virtio_fs_queue_size": TUNING,
    "virtio_fs_is_dax": IGNORED,
    "msize_9p": TUNING,
    # Templates.
    "boot_to_be_template": IGNORED,
    "boot_from_template": IGNORED,
    "memory_path": TUNING,
    "device_state_path": TUNING,
    "factory": ForeignKey(_disabled),
}

FOREIGN: Mapping[Table, Mapping[str, ForeignKey]] = {
    ("hypervisor", "builtin"): {
        **_HYPERVISOR,
        "path": IGNORED,
        "valid_hypervisor_paths": TUNING,
        "machine_type": IGNORED,
        "machine_accelerators": IGNORED,
        "cpu_features": IGNORED,
        "entropy_source": TUNING,
        "valid_entropy_sources": TUNING,
        "virtio_fs_daemon": TUNING,
        "valid_virtio_fs_daemon_paths": TUNING,
        "virtio_fs_extra_args": TUNING,
    },
    ("hypervisor", "qemu"): {
        **_HYPERVISOR,
        "enable_hugepages": IGNORED,
        "reclaim_guest_freed_memory": IGNORED,
        "block_device_aio": TUNING,
        "block_device_cache_direct": TUNING,
        "disk_rate_limiter_bw_max_rate": IGNORED,
        "disk_rate_limiter_bw_one_time_burst": TUNING,
        "disk_rate_limiter_ops_max_rate": IGNORED,
        "disk_rate_limiter_ops_one_time_burst": TUNING,
    },
    ("agent", "kata"): {
        "log_level": TUNING,
        "enable_tracing": IGNORED,
        "visible_cdi_devices": IGNORED,
        "passfd_listener_port": TUNING,
        "dial_timeout": TUNING,
        "dial_timeout_ms": TUNING,
        "cdh_api_timeout": TUNING,
        "cdh_api_timeout_ms": TUNING,
        "kernel_modules": IGNORED,
        "launch_process_timeout": IGNORED,
        "policy": _refused(_WEAKER),
        "mem_agent": ForeignKey(_disabled),
    },
    ("runtime",): {
        "experimental": ForeignKey(_no_guest_pull, _WEAKER),
        "experimental_force_guest_pull": _refused(_WEAKER),
        "disable_new_netns": IGNORED,
        "sandbox_bind_mounts": IGNORED,
        "enable_vcpus_pinning": IGNORED,
        "enable_tracing": IGNORED,
        "jaeger_endpoint": TUNING,
        "jaeger_user": TUNING,
        "jaeger_password": TUNING,
        "enable_pprof": IGNORED,
        "disable_guest_empty_dir": TUNING,
        "vfio_mode": TUNING,
        "keep_abnormal": IGNORED,
        "dan_conf": ForeignKey(_absent_folder),
        "shared_mounts": IGNORED,
        "use_passfd_io": TUNING,
        "passfd_listener_port": TUNING,
        "pod_resource_api_sock": IGNORED,
        "guest_selinux_label": _refused(_WEAKER),
        "kubelet_root_dir": TUNING,
    },
    ("factory",): {
        "enable_template": IGNORED,
        "template_path": TUNING,
        "vm_cache_number": IGNORED,
        "vm_cache_endpoint": TUNING,
    },
}

FOREIGN_MONITORS = frozenset(
    {"clh", "cloud-hypervisor", "firecracker", "remote", "openvmm", "stratovirt"}
)
"""``[hypervisor.…]`` tables that are not read; to choose one of them is an error."""

MOVED: Mapping[tuple[Table, str], tuple[Table, str]] = {
    (("runtime",), "create_container_timeout"): (("agent", "kata"), "create_container_timeout"),
}
"""Keys that Kata's two runtimes have in different tables, and where they are here."""
