#!/bin/sh
# The first program of the lab (scripts/lab.py): make the machine one that tests can work in, then run
# the command. Started by virtme-ng's init as root, in the checkout. Runs to the end in under a second.
set -eu
checkout=$1
shift

# virtme-ng's channels to the caller: udev would name them, and a boot without udev is much shorter.
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    ln -sf "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
exec </dev/null >/dev/virtio-ports/virtme.stdout 2>/dev/virtio-ports/virtme.stderr

fail() {
    echo "lab: $1" >&2
    exit 125
}

for module in kvm_amd vhost_vsock vhost_net tun overlay; do
    modprobe "$module" || fail "module $module does not load"
done
[ -c /dev/net/tun ] || { mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200; }
ip link set lo up

# A real file system at /tmp: containerd can't put an overlay on virtme-ng's. The checkout may be below it.
fresh=/run/lab-tmp
mkdir -p $fresh
mount -t tmpfs -o mode=1777 lab-tmp $fresh
case $checkout in
/tmp/*)
    mkdir -p "$fresh${checkout#/tmp}"
    mount --rbind "$checkout" "$fresh${checkout#/tmp}"
    ;;
esac
mount --move $fresh /tmp
cd "$checkout"

# Every controller for children of the root, as systemd would have it.
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || fail "no cgroup controller $controller"
done

exec "$@"
