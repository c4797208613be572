"""What the node changes on the machine, and how that is taken back."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.cluster.node import pins
from tests.cluster.node.system import NodeError, run, wait_until

# What Kubernetes and its tools write to, beside our own folders.
FOLDERS = tuple(
    Path(folder)
    for folder in (
        "/etc/kubernetes",
        "/var/lib/etcd",
        "/var/lib/kubelet",
        "/var/lib/cni",
        "/var/log/pods",
        "/var/log/containers",
        "/run/containerd",
        "/usr/libexec/kubernetes",
    )
)
# The first three are what pods need; the kubelet sets the others.
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/bridge/bridge-nf-call-iptables": "1",
    "net/bridge/bridge-nf-call-ip6tables": "1",
    "vm/overcommit_memory": "",
    "vm/panic_on_oom": "",
    "kernel/panic": "",
    "kernel/panic_on_oops": "",
}
_CGROUPS = Path("/sys/fs/cgroup")
_BEFORE = pins.STATE / "before.json"
_TOOLS = ("iptables", "ip6tables")
_CHAIN = re.compile(r"^:((?:KUBE|CNI)-\S+)", re.MULTILINE)


def prepare() -> None:
    """Take note of the machine as it is, then make folders, kernel settings and the bridge."""
    if found := [str(folder) for folder in (*FOLDERS[:3], *_pod_cgroups()) if folder.exists()]:
        raise NodeError(f"another Kubernetes seems to be on this machine: found {', '.join(found)}; expected none")
    with contextlib.suppress(NodeError, FileNotFoundError):  # built into many kernels, and then there is no module
        run(["modprobe", "-a", "br_netfilter", "overlay"], timeout=30)
    pins.STATE.mkdir(parents=True, mode=0o755)
    pins.RUN.mkdir(parents=True, exist_ok=True)
    before = {
        "folders": [str(folder) for folder in FOLDERS if folder.exists()],
        "sysctls": {name: _sysctl(name).read_text().strip() for name in SYSCTLS if _sysctl(name).exists()},
        "chains": {tool: sorted(_CHAIN.findall(_rules(tool))) for tool in _TOOLS},  # podman has CNI's too
    }
    _BEFORE.write_text(json.dumps(before, indent=1))
    for name, value in SYSCTLS.items():
        if value and _sysctl(name).exists():
            _sysctl(name).write_text(value)
    run(["ip", "link", "add", pins.BRIDGE, "type", "bridge"], timeout=10)
    run(["ip", "addr", "add", f"{pins.ADDRESS}/24", "dev", pins.BRIDGE], timeout=10)
    run(["ip", "link", "set", pins.BRIDGE, "up"], timeout=10)


def snapshotter() -> str:
    """overlayfs where the state's file system can carry it, else native, which copies every layer."""
    trial = pins.STATE / "overlay-trial"
    for name in ("lower", "upper", "work", "merged"):
        (trial / name).mkdir(parents=True)
    options = f"lowerdir={trial}/lower,upperdir={trial}/upper,workdir={trial}/work"
    try:
        run(["mount", "-t", "overlay", "overlay", "-o", options, trial / "merged"], timeout=10)
        run(["umount", trial / "merged"], timeout=10)
        return "overlayfs"
    except NodeError:
        return "native"
    finally:
        shutil.rmtree(trial)


def restore() -> None:
    """Remove what `prepare`, Kubernetes and the pods left. Nothing there: nothing happens."""
    _kill_pods()
    before = json.loads(_BEFORE.read_text()) if _BEFORE.exists() else {}
    for tool in _TOOLS:
        _remove_rules(tool, keep=before.get("chains", {}).get(tool, []))
    if Path(f"/sys/class/net/{pins.BRIDGE}").exists():
        run(["ip", "link", "delete", pins.BRIDGE], timeout=10)
    ours = [pins.RUN, pins.STATE]
    if before:
        ours[:0] = [folder for folder in FOLDERS if str(folder) not in before["folders"]]
        for name, value in before["sysctls"].items():
            if _sysctl(name).read_text().strip() != value:
                _sysctl(name).write_text(value)
    _unmount(ours)
    for folder in ours:
        if folder.exists():
            shutil.rmtree(folder)
    for cgroup in _pod_cgroups():
        for group, _, _ in os.walk(cgroup, topdown=False):
            Path(group).rmdir()


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name


def _pod_cgroups() -> list[Path]:
    """The pods' control groups: one in version 2, one per controller in version 1."""
    return sorted([*_CGROUPS.glob("kubepods"), *_CGROUPS.glob("*/kubepods")])


def _kill_pods() -> None:
    """End what still runs in pods, and containerd's shims of them."""

    def left() -> str:
        pids = {
            int(pid)
            for cgroup in _pod_cgroups()
            for file in cgroup.rglob("cgroup.procs")
            for pid in file.read_text().split()
            if pid != "0"
        }
        pids |= _shims()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return " ".join(str(pid) for pid in sorted(pids))

    wait_until("the end of the pods' processes", left, timeout=20)


def _shims() -> set[int]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = file.read_text().split("\0")
            if "containerd-shim" in words[0] and str(pins.CONTAINERD_SOCKET) in words:
                found.add(int(file.parent.name))
    return found


def _rules(tool: str) -> str:
    if not shutil.which(f"{tool}-save"):
        return ""
    return subprocess.run([f"{tool}-save"], check=False, capture_output=True, text=True, timeout=30).stdout


def _remove_rules(tool: str, *, keep: list[str]) -> None:
    """Take Kubernetes' and CNI's chains out of each table, and the rules that lead to them."""
    changes: list[str] = []
    for table in re.findall(r"^\*.*?^COMMIT$", _rules(tool), re.MULTILINE | re.DOTALL):
        chains = set(_CHAIN.findall(table)) - set(keep)
        leading = []
        for rule in re.findall(r"^-A (.*)$", table, re.MULTILINE):
            goes_to = re.search(r" -[jg] (\S+)", rule)
            if goes_to and goes_to[1] in chains and rule.split()[0] not in chains:
                leading.append(f"-D {rule}")
        if chains:
            emptied = [f"-F {chain}" for chain in sorted(chains)]
            removed = [f"-X {chain}" for chain in sorted(chains)]
            changes += [table.splitlines()[0], *leading, *emptied, *removed, "COMMIT"]
    if changes:
        run([f"{tool}-restore", "--noflush"], stdin="\n".join(changes) + "\n", timeout=30)


def _unmount(folders: list[Path]) -> None:
    for _ in range(3):  # a mount on a mount shows when the upper one is gone
        points = [
            Path(line.split()[1].replace("\\040", " ")) for line in Path("/proc/self/mounts").read_text().splitlines()
        ]
        below = [point for point in points if any(point.is_relative_to(folder) for folder in folders)]
        if not below:
            return
        for point in reversed(below):
            subprocess.run(["umount", str(point)], check=False, capture_output=True, timeout=30)
        time.sleep(0.2)
    for point in reversed(below):
        run(["umount", "-l", point], timeout=30)
