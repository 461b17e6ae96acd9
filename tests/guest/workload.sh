#!/bin/busybox sh
# The guest's first process, on the root disk: works on the file system until the host says "stop" on the serial line,
# then prints what the files should hold, unmounts and powers off.
PATH=/bin
export PATH
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev
busybox mount -o remount,rw,noatime /
cd /data || busybox poweroff -f

# What the host says.
(
    while read -r word; do
        [ "$word" = stop ] && : > /dev/stop
    done < /dev/ttyS0
) &

echo "GUEST works"
round=0
while [ ! -e /dev/stop ]; do
    round=$((round + 1))
    dir=round-$round
    mkdir "$dir"
    tar xf /payload.tar -C "$dir"
    # Files that grow, shrink, are renamed, and are made durable one by one.
    for i in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of="$dir/new-$i" bs=4096 count=$((i * 7)) conv=fsync 2>/dev/null
        [ -e /dev/stop ] && break
    done
    [ -e "$dir/new-3" ] && mv "$dir/new-3" "$dir/renamed"
    [ -e "$dir/new-5" ] && truncate -s 5000 "$dir/new-5"
    rm -f "$dir"/payload/*7 "$dir"/payload/*3
    (cd "$dir" && find . -type f ! -name SUMS | sort | xargs sha256sum > SUMS)
    sync
    # Rounds of before are read back from the disk, not from memory.
    echo 3 > /proc/sys/vm/drop_caches
    for old in round-*; do
        (cd "$old" && sha256sum -s -c SUMS) || echo "GUEST BAD $old"
    done
    [ $round -gt 4 ] && rm -rf "round-$((round - 4))"
    [ $((round % 3)) = 0 ] && fstrim / 2>/dev/null
    echo "GUEST round $round"
done

find . -type f | sort | xargs sha256sum > /manifest
sync
echo 3 > /proc/sys/vm/drop_caches
sha256sum -s -c /manifest || echo "GUEST BAD manifest"
echo "GUEST files $(wc -l < /manifest)"
echo "GUEST manifest $(sha256sum < /manifest | cut -c1-64)"
cd /
sync
mount -o remount,ro / && echo "GUEST clean"
poweroff -f
