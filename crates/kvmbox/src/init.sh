#!/bin/busybox sh
# Process 1 of the box: mounts the usual, loads KVM, runs the command with its output on one virtio port, and reports the
# exit status on the other.
busybox=/bin/busybox
# pivot_root(2), which jails call, does not work on the kernel's first root mount: its content becomes an ordinary one.
if [ -z "$moved" ]; then
  $busybox mkdir -p /mnt
  $busybox mount --bind / /mnt
  cd /mnt
  $busybox mount --move . /
  moved=yes exec $busybox chroot . /init
fi
$busybox mkdir -p /proc /sys /dev /tmp /run /root
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs devtmpfs /dev
$busybox mkdir -p /dev/shm /dev/pts
$busybox mount -t tmpfs tmpfs /dev/shm
$busybox mount -t tmpfs tmpfs /tmp
$busybox mount -t devpts devpts /dev/pts
$busybox --install -s /bin
export PATH=/bin HOME=/root

port() { # the device of the virtio port of that name
  for p in /sys/class/virtio-ports/*; do
    [ "$(cat "$p/name")" = "$1" ] && echo "/dev/${p##*/}" && return
  done
}
output=$(port kapsel.output)
status=$(port kapsel.status)

while read -r module; do
  xzcat "/lib/modules/$module" >/tmp/module && insmod /tmp/module || echo "kvmbox: cannot load $module"
done </lib/modules/order
rm /tmp/module
ip link set lo up

sh /kvmbox/command </dev/null >"$output" 2>&1
echo $? >"$status"
poweroff -f
