#!/bin/sh
# What runs first in the lab (scripts/lab.py): make the machine one that tests can work in, then become
# the command. virtme-ng's init starts it as root, with the command's environment already set.
#
#   lab_inside.sh CHECKOUT KEPT COMMAND...
#
# KEPT: directories below /tmp, one a line, that stay visible.
set -eu
checkout=$1
kept=$2
shift 2

# virtme-ng's channels to the caller. udev would make these names; a boot without it is seconds shorter.
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
    ln -sf "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
if [ -z "${LAB_CONSOLE-}" ]; then
    exec </dev/null >/dev/virtio-ports/virtme.stdout 2>/dev/virtio-ports/virtme.stderr
fi

fail() {
    echo "lab: $1" >&2
    exit 125
}

for module in kvm_amd vhost_vsock vhost_net tun overlay loop; do
    modprobe "$module" || fail "module $module does not load"
done
if [ ! -c /dev/net/tun ]; then
    mkdir -p /dev/net
    mknod -m 0666 /dev/net/tun c 10 200
fi
ip link set lo up

# Changes to the checkout and to the home directory end with the lab, but for build/, which is shared.
private() {
    layers=/run/lab/$(echo "$1" | tr / -)
    mkdir -p "$layers/upper" "$layers/work"
    mount -t overlay -o "xino=off,lowerdir=$1,upperdir=$layers/upper,workdir=$layers/work" lab "$1"
}
private "$checkout"
private "$HOME"
mount -t virtiofs lab-build "$checkout/build"

# An ordinary file system at /tmp: containerd's snapshots can't be layers on virtme-ng's overlay.
mkdir -p /run/lab/tmp
mount -t tmpfs -o mode=1777 lab-tmp /run/lab/tmp
echo "$kept" | while read -r directory; do
    if [ -n "$directory" ]; then
        mkdir -p "/run/lab/tmp/${directory#/tmp/}"
        mount --rbind "$directory" "/run/lab/tmp/${directory#/tmp/}"
    fi
done
mount --move /run/lab/tmp /tmp
cd "$checkout"

# A sign of life for lab.py, which ends a lab without it. Not a child of the command's; bash, which can
# wait without another process.
mkfifo /run/lab/never
(setsid bash -c 'while echo; do read -r -t 2 <>/run/lab/never; done >>"$LAB_PULSE"' &)

# Every controller for the root's children, as an init system would have it.
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || fail "no cgroup controller $controller"
done

exec "$@"
