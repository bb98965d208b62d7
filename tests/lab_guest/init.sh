#!/bin/busybox sh
# /init of the test guest. Loads the initrd's modules, makes the root what "guest_root=" on the kernel's
# command line says ("host": the share "host-root"; else the disk of that serial number, read-only),
# and becomes the program that runs the host's commands.
export PATH=/bin:/usr/bin:/usr/sbin:/sbin HOME=/tmp LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1

fail() {
    echo "test guest: cannot $1"
    busybox poweroff -f
}

busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do
    busybox insmod "$module" || fail "load $module"
done </etc/kata-hybrid/modules
busybox ip link set lo up

# The kernel makes its unknown parameters init's environment.
case ${guest_root-} in
"")
    export GUEST_PROGRAM=/sbin/init
    exec /sbin/init serve /bin/busybox sh -c
    ;;
host)
    busybox mount -t virtiofs -o ro host-root /mnt || fail "mount the host's root"
    ;;
*)
    for disk in /sys/block/*/serial; do
        [ "$(busybox cat "$disk")" = "$guest_root" ] || continue
        disk=${disk%/serial}
        busybox mount -t ext4 -o ro "/dev/${disk##*/}" /mnt || fail "mount the disk $guest_root"
    done
    ;;
esac
busybox mount -t tmpfs tmpfs /mnt/tmp
busybox mount -t tmpfs tmpfs /mnt/run
for folder in proc sys dev; do
    busybox mount -o bind "/$folder" "/mnt/$folder" || fail "keep $folder"
done
# A file that is bound needs a place; the link into the initrd stays good after the change of root.
: >/mnt/run/guest-program
busybox mount -o bind /sbin/init /mnt/run/guest-program || fail "keep the program"
export GUEST_PROGRAM=/run/guest-program
exec busybox chroot /mnt "$GUEST_PROGRAM" serve /bin/sh -c
