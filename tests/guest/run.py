#!/usr/bin/env python3
"""A real guest on a disk that moves: boots Linux from an export of `blockmirror daemon`, mirrors the disk to another image and
pivots while the guest works on its file system, lets it shut down, and looks at what the target holds.

    tests/guest/run.py --fetch /var/tmp/guest        # once: a kernel and busybox, from Debian's archive
    cargo build --bin blockmirror
    tests/guest/run.py --assets /var/tmp/guest [--mode auto] [--accel kvm]

Needs qemu-system-x86_64 (in PATH, or named by QEMU_SYSTEM), qemu-img, e2fsprogs, and no root. Ends with 0 if, in each mode,

- the guest found nothing on its disk but what it had written, before, during and after the pivot, and shut down cleanly;
- `qemu-img check` finds neither damage nor leaks in the target, and `fsck -fn` no fault in its file system;
- every file of the guest's list is on the target with the checksum that the guest gave it, and no other file is.
"""

import argparse
import atexit
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODULES = ["virtio_pci", "virtio_blk"]
MIB = 1 << 20
DISK = 768 * MIB
# Nothing takes longer than this, emulated on a busy machine.
PATIENCE = 600


def sh(*words, **more):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **more)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def start(words, **more):
    """Starts a process that does not outlive this one."""
    process = subprocess.Popen([str(word) for word in words], **more)
    atexit.register(process.kill)
    return process


# -- what the guest is made of ------------------------------------------------------------------------------------------


def fetch(into):
    """Gets a kernel and busybox from Debian's archive and unpacks them, without installing anything."""
    into.mkdir(parents=True, exist_ok=True)
    depends = sh("apt-cache", "depends", "linux-image-cloud-amd64")
    kernel = re.search(r"Depends: (linux-image-\S+)", depends).group(1)
    sh("apt-get", "download", "-q", kernel, "busybox-static", cwd=into)
    for package in into.glob("*.deb"):
        sh("dpkg", "-x", package, into)


def module_files(assets):
    """The modules that the guest needs before it has a disk, each after those it depends on."""
    files = {path.name.split(".")[0]: path for path in assets.glob("lib/modules/*/kernel/**/*.ko*")}
    ordered = []

    def add(name):
        if name not in files:
            return  # Built in.
        if files[name] in ordered:
            return
        depends = re.search(rb"depends=([\w,-]*)\0", files[name].read_bytes())
        for other in depends.group(1).decode().split(",") if depends else []:
            add(other.replace("-", "_"))
        ordered.append(files[name])

    for module in MODULES:
        add(module)
    return ordered


def cpio(entries):
    """An archive in the kernel's `newc` format of (name, mode, content)."""
    out = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = [number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(assets):
    """Loads the modules of the disk and goes over to it."""
    modules = module_files(assets)
    names = [path.name for path in modules]
    script = "\n".join(
        [
            "#!/bin/busybox sh",
            "/bin/busybox mount -t devtmpfs devtmpfs /dev",
            *(f"/bin/busybox insmod /{name}" for name in names),
            "while [ ! -e /dev/vda ]; do /bin/busybox sleep 0.1; done",
            "/bin/busybox mount -t ext4 -o ro /dev/vda /root || echo GUEST BAD root",
            "exec /bin/busybox switch_root /root /work",
            "",
        ]
    )
    entries = [(name, 0o040755, b"") for name in ["bin", "dev", "root"]]
    entries += [("bin/busybox", 0o100755, (assets / "bin/busybox").read_bytes())]
    entries += [(path.name, 0o100644, path.read_bytes()) for path in modules]
    entries += [("init", 0o100755, script.encode())]
    return cpio(entries)


def root_disk(assets, image):
    """A file system with the guest's work on it, raw."""
    with tempfile.TemporaryDirectory(dir=image.parent) as name:
        tree = Path(name)
        for folder in ["bin", "dev", "proc", "sys", "data", "payload"]:
            (tree / folder).mkdir()
        shutil.copy(assets / "bin/busybox", tree / "bin/busybox")
        for applet in sh(assets / "bin/busybox", "--list").split():
            if applet != "busybox":
                (tree / "bin" / applet).symlink_to("busybox")
        shutil.copy(HERE / "workload.sh", tree / "work")
        (tree / "work").chmod(0o755)
        dice = random.Random(1)
        for number in range(200):
            content = dice.randbytes(dice.choice([100, 3000, 5000, 40000, 90000]))
            (tree / "payload" / f"{number:03}").write_bytes(content)
        with tarfile.open(tree / "payload.tar", "w") as tar:
            tar.add(tree / "payload", "payload")
        shutil.rmtree(tree / "payload")
        # What is not touched has to be copied as well.
        (tree / "ballast").write_bytes(dice.randbytes(160 * MIB))
        with open(image, "wb") as file:
            file.truncate(DISK)
        sh("mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, image)


# -- the daemon and the guest -------------------------------------------------------------------------------------------


class Daemon:
    """`blockmirror daemon` with a monitor."""

    def __init__(self, program, folder, words):
        path = folder / "qmp"
        self.log = open(folder / "daemon.log", "w")
        chardev = f"socket,id=c,path={path},server=on,wait=off"
        command = [program, "daemon", *words, "--chardev", chardev, "--monitor", "chardev=c"]
        self.process = start(command, stdout=self.log, stderr=self.log)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        wait(lambda: connected(self.socket, path) or self.process.poll() is not None, "the daemon")
        self.lines = self.socket.makefile("r")
        self.events = []
        self.lines.readline()
        self.run("qmp_capabilities")

    def run(self, command, **arguments):
        request = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.socket.sendall(json.dumps(request).encode())
        while True:
            answer = json.loads(self.lines.readline())
            if "event" in answer:
                self.events.append(answer)
            elif "return" in answer:
                return answer["return"]
            else:
                sys.exit(f"{command}: {answer['error']['desc']}")

    def wait_for(self, event):
        while True:
            next_one = self.events.pop(0) if self.events else json.loads(self.lines.readline())
            if next_one["event"] == event:
                return next_one["data"]
            if next_one["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_CANCELLED"):
                sys.exit(f"waiting for {event}: {next_one}")

    def quit(self):
        self.run("quit")
        if self.process.wait(60) != 0:
            sys.exit(f"the daemon ended with {self.process.returncode}")


class Guest:
    """A virtual machine whose serial line is read as it comes."""

    def __init__(self, qemu, accel, folder, kernel, disk, loud):
        self.loud = loud
        command = [
            *(qemu, "-accel", accel, "-cpu", "max", "-m", "512", "-smp", "1", "-nodefaults", "-no-reboot"),
            *("-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", folder / "initramfs"),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-drive", f"if=virtio,format=raw,cache=none,discard=unmap,file={disk}"),
        ]
        self.said = []
        self.process = start(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.said.append(line.decode(errors="replace").strip())
            if self.loud:
                print("  " + self.said[-1], flush=True)

    def words(self, start):
        """What it said of itself that begins so."""
        start = f"GUEST {start}"
        return [line[line.index(start) + len(start) :].strip() for line in self.said if start in line]

    def rounds(self):
        return len(self.words("round"))

    def reach(self, rounds):
        wait(lambda: self.rounds() >= rounds or self.process.poll() is not None, f"round {rounds}")
        if self.process.poll() is not None:
            sys.exit("the guest is gone:\n" + "\n".join(self.said[-40:]))

    def stop(self):
        self.process.stdin.write(b"stop\n")
        self.process.stdin.flush()
        code = self.process.wait(PATIENCE)
        self.reader.join()
        if code != 0 or not self.words("clean") or self.words("BAD"):
            sys.exit(f"the guest ended with {code}:\n" + "\n".join(self.said[-40:]))


def connected(sock, path):
    try:
        sock.connect(str(path))
        return True
    except OSError:
        return False


def wait(reached, what):
    end = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {PATIENCE} s")
        time.sleep(0.02)


# -- one run ------------------------------------------------------------------------------------------------------------


def run(args, mode, folder):
    kernel = next(args.assets.glob("boot/vmlinuz-*"))
    (folder / "initramfs").write_bytes(initramfs(args.assets))
    root_disk(args.assets, folder / "raw")
    sh("qemu-img", "convert", "-O", "qcow2", folder / "raw", folder / "source")
    os.unlink(folder / "raw")
    sh("qemu-img", "create", "-q", "-f", "qcow2", folder / "target", DISK)
    node = "driver=qcow2,node-name={0},discard=unmap,file.driver=file,file.filename={1}"
    words = ["--blockdev", node.format("source", folder / "source")]
    words += ["--blockdev", node.format("target", folder / "target")]
    words += ["--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"]
    words += ["--export", "nbd,id=e,node-name=source,name=disk,writable=on"]
    daemon = Daemon(args.blockmirror, folder, words)
    began = time.monotonic()
    guest = Guest(args.qemu, args.accel, folder, kernel, f"nbd+unix:///disk?socket={folder}/nbd", args.loud)
    guest.reach(1)
    booted = time.monotonic()
    daemon.run(
        "blockdev-mirror", job_id="m", device="source", target="target", sync="full", copy_mode=mode, speed=48 * MIB
    )
    daemon.wait_for("BLOCK_JOB_READY")
    ready, at_ready = time.monotonic(), guest.rounds()
    guest.reach(at_ready + 1)
    figures = daemon.run("query-block-jobs")[0]
    daemon.run("job-complete", id="m")
    end = daemon.wait_for("BLOCK_JOB_COMPLETED")
    if "error" in end:
        sys.exit(f"the mirror failed: {end}")
    pivoted, at_pivot = time.monotonic(), guest.rounds()
    if daemon.run("query-block-exports")[0]["node-name"] != "target":
        sys.exit("the export has not moved")
    daemon.run("blockdev-del", node_name="source")
    # Nothing of what the guest does now may need the source.
    os.truncate(folder / "source", 0)
    guest.reach(at_pivot + 2)
    guest.stop()
    daemon.quit()
    files = judge(folder, guest)
    print(
        f"{mode}: the guest worked after {booted - began:.1f} s; ready {ready - booted:.1f} s later, in round {at_ready}; "
        f"pivot in round {at_pivot}, {pivoted - began:.1f} s after the start; {guest.rounds()} rounds in all; "
        f"{figures['copied'] // MIB} MiB copied, {figures['dirtied'] // MIB} MiB dirtied meanwhile; "
        f"{files} files are as the guest left them, qemu-img check and fsck are clean",
        flush=True,
    )


def judge(folder, guest):
    """Looks at the target, as others see it; how many files it holds."""
    sh("qemu-img", "check", "-f", "qcow2", folder / "target")
    raw = folder / "raw"
    sh("qemu-img", "convert", "-f", "qcow2", "-O", "raw", folder / "target", raw)
    fsck = subprocess.run(["e2fsck", "-fn", str(raw)], capture_output=True, text=True)
    if fsck.returncode != 0:
        sys.exit(f"e2fsck -fn: {fsck.returncode}\n{fsck.stdout}{fsck.stderr}")
    out = folder / "files"
    out.mkdir()
    sh("debugfs", "-R", f"rdump /data {out}", raw)
    sh("debugfs", "-R", f"dump /manifest {out}/manifest", raw)
    manifest = (out / "manifest").read_bytes()
    if [hashlib.sha256(manifest).hexdigest()] != guest.words("manifest"):
        sys.exit("the guest's list on the target is not the one that it reported")
    expected = {}
    for line in manifest.decode().splitlines():
        digest, path = line.split(maxsplit=1)
        expected[path.removeprefix("./")] = digest
    if [str(len(expected))] != guest.words("files"):
        sys.exit(f"{len(expected)} files on the target's list, {guest.words('files')} on the guest's")
    data = out / "data"
    found = {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in data.rglob("*")
        if path.is_file()
    }
    if found != expected:
        wrong = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
        sys.exit(f"{len(wrong)} files differ on the target: {sorted(wrong)[:10]}")
    return len(found)


def main():
    # At its end it takes what it started along, and what it wrote.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch", type=Path, help="get a kernel and busybox into this folder, and end")
    parser.add_argument("--assets", type=Path, help="the folder that they are in")
    parser.add_argument("--mode", action="append", choices=["background", "write-blocking", "auto"])
    parser.add_argument("--accel", default="tcg")
    parser.add_argument("--loud", action="store_true", help="show what the guest says")
    parser.add_argument("--qemu", default=os.environ.get("QEMU_SYSTEM", "qemu-system-x86_64"))
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--blockmirror", type=Path, default=target / "debug/blockmirror")
    args = parser.parse_args()
    if args.fetch:
        return fetch(args.fetch)
    if not args.assets:
        parser.error("--assets: see --help")
    for mode in args.mode or ["background", "write-blocking", "auto"]:
        scratch = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(prefix="blockmirror-", dir=scratch) as folder:
            run(args, mode, Path(folder))


main()
