"""Start the node, put images into it, and take it away again."""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template

import yaml

from tests.cluster.node import images, machine, pins, system
from tests.cluster.node.build import build
from tests.cluster.node.system import NodeError, run, say, wait_until

_UP = pins.STATE / "up"  # written when everything was Ready
_DAEMONS = ("kubelet", "kube-proxy", "containerd")  # in the order in which they are stopped
_KUBELET_FLAGS = Path("/var/lib/kubelet/kubeadm-flags.env")
_WORKLOADS = (
    ("kube-system", "deployment/coredns"),
    ("local-path-storage", "deployment/local-path-provisioner"),
    ("traefik", "daemonset/traefik"),
)


def up() -> None:
    """A node on which API server, DNS, ingress and storage are Ready; at once when it is there."""
    _expect_root()
    with _alone():
        if _is_up():
            say("the node is already up")
            return
        binaries = build()
        _down()
        try:
            _start(binaries)
        except NodeError as error:
            raise NodeError(f"{error}\nLogs are in {pins.LOGS}; `down` removes what was started.") from None


def down() -> None:
    """Nothing of the node is left: processes, mounts, network, folders."""
    _expect_root()
    with _alone():
        _down()


def load(names: list[str]) -> None:
    """Move images from buildah's storage into the node."""
    _expect_root()
    if not _is_up():
        raise NodeError("no node to load images into; `up` starts one")
    with _alone():
        images.load(names, _ctr(pins.cache() / "current" / "bin"))


def restart_kubelet() -> None:
    """End the kubelet and start it again; return when it is healthy."""
    _expect_root()
    system.restart("kubelet")
    _wait_for_kubelet()


def environment() -> str:
    """Lines for a shell's `eval`."""
    return "\n".join(
        (
            f"export KUBECONFIG={pins.KUBECONFIG}",
            f"export PATH={pins.cache() / 'current' / 'bin'}:$PATH",
            f"export INGRESS_ADDRESS={pins.INGRESS_ADDRESS}",
        )
    )


def _expect_root() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NodeError(
            f"the node needs root on Linux; this is user {os.geteuid()} on {sys.platform}. Use kind instead"
        )


@contextmanager
def _alone() -> Iterator[None]:
    """One of us at a time."""
    pins.cache().mkdir(parents=True, exist_ok=True)
    with (pins.cache() / "lock").open("w") as lock:

        def taken() -> str:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "another `python -m tests.cluster.node` at work"
            return ""

        wait_until("the node's lock", taken, timeout=3600)  # a cold build takes a quarter of an hour
        yield


def _is_up() -> bool:
    """Whether the node was Ready and still answers. A busy one may take its time: others may be using it."""
    if not _UP.exists() or not all(system.is_alive(name) for name in _DAEMONS):
        return False
    try:
        wait_until("the API server", _api_answer, timeout=30)
    except NodeError as error:
        say(str(error))
        return False
    return True


def _start(binaries: Path) -> None:
    machine.prepare()
    values = {name: str(value) for name, value in vars(pins).items() if name.isupper()}
    values["SNAPSHOTTER"] = machine.snapshotter()
    for name in (
        "containerd.toml",
        "cni.conflist",
        "kubeadm.yaml",
        "kube-proxy.yaml",
        "local-path.yaml",
        "traefik.yaml",
    ):
        folder = pins.STATE / "cni" if name == "cni.conflist" else pins.STATE
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(Template((pins.HERE / "manifests" / name).read_text()).substitute(values))
    _write_patches(pins.STATE / "patches")
    _write_resolv_conf(pins.STATE / "resolv.conf")
    _start_containerd(binaries)
    _start_control_plane(binaries)
    _start_kube_proxy(binaries)
    _install_addons(binaries)
    _UP.touch()


def _write_patches(folder: Path) -> None:
    """Leave the CPUs to the tests: kubeadm's own requests are three quarters of one."""
    folder.mkdir()
    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        small = {"name": name, "resources": {"requests": {"cpu": "10m"}}}
        (folder / f"{name}+strategic.yaml").write_text(yaml.safe_dump({"spec": {"containers": [small]}}))
    small = {"name": "coredns", "resources": {"requests": {"cpu": "10m"}}}
    one = {"spec": {"replicas": 1, "template": {"spec": {"containers": [small]}}}}
    (folder / "corednsdeployment+strategic.yaml").write_text(yaml.safe_dump(one))


def _write_resolv_conf(file: Path) -> None:
    """The machine's name servers, without those that a pod would look for on itself."""
    lines = Path("/etc/resolv.conf").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("nameserver 127.", "nameserver ::1"))]
    file.write_text("\n".join(kept) + "\n")


def _start_containerd(binaries: Path) -> None:
    environment = {**os.environ, "PATH": f"{binaries}:/usr/sbin:/usr/bin:/sbin:/bin"}
    system.start("containerd", [binaries / "containerd", "--config", pins.STATE / "containerd.toml"], env=environment)
    version = [*_ctr(binaries), "version"]
    wait_until("containerd", lambda: _failure(version), timeout=30)
    say("containerd runs; importing the node's images")
    images.import_images(images.node_images(binaries), _ctr(binaries))


def _start_control_plane(binaries: Path) -> None:
    """kubeadm writes the control plane's files and waits; the kubelet then runs what it wrote."""
    say("starting the control plane")
    log = pins.LOGS / "kubeadm.log"
    skipped = "preflight,addon/kube-proxy,show-join-command"
    configuration = f"--config={pins.STATE / 'kubeadm.yaml'}"
    command = [str(binaries / "kubeadm"), "init", configuration, f"--skip-phases={skipped}"]
    with log.open("wb") as output:
        kubeadm = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:

        def wants_kubelet() -> str:
            if kubeadm.poll():
                raise NodeError(f"kubeadm init ended with {kubeadm.returncode}: {log.read_text()[-3000:]}")
            needed = (_KUBELET_FLAGS, Path("/var/lib/kubelet/config.yaml"), Path("/etc/kubernetes/kubelet.conf"))
            return " ".join(f"no {file}" for file in needed if not file.exists())

        wait_until("kubeadm's configuration of the kubelet", wants_kubelet, timeout=60)
        flags = shlex.split(_KUBELET_FLAGS.read_text().strip().removeprefix("KUBELET_KUBEADM_ARGS="))
        flags = shlex.split(flags[0]) if flags else []
        files = ["--kubeconfig=/etc/kubernetes/kubelet.conf", "--config=/var/lib/kubelet/config.yaml"]
        system.start("kubelet", [binaries / "kubelet", *files, *flags])

        def runs() -> str:
            return "" if kubeadm.poll() is not None else log.read_text()[-500:]

        wait_until("kubeadm init", runs, timeout=240)
    finally:
        if kubeadm.poll() is None:
            kubeadm.kill()
            kubeadm.wait()
    if kubeadm.returncode:
        raise NodeError(f"kubeadm init ended with {kubeadm.returncode}: {log.read_text()[-3000:]}")
    shutil.copy("/etc/kubernetes/admin.conf", pins.KUBECONFIG)
    pins.KUBECONFIG.chmod(0o600)
    wait_until("the API server", _api_answer, timeout=60)


def _start_kube_proxy(binaries: Path) -> None:
    """On the machine rather than in a pod: its image would have to bring iptables and conntrack."""
    made = run(
        [
            binaries / "kubeadm",
            "kubeconfig",
            "user",
            "--client-name=system:kube-proxy",
            "--config",
            pins.STATE / "kubeadm.yaml",
        ],
        timeout=30,
    )
    file = pins.STATE / "kube-proxy.kubeconfig"
    file.write_text(made)
    file.chmod(0o600)
    system.start("kube-proxy", [binaries / "kube-proxy", "--config", pins.STATE / "kube-proxy.yaml"])


def _install_addons(binaries: Path) -> None:
    say("installing custom resources, storage and ingress")
    kubectl = _kubectl(binaries)
    apply = [*kubectl, "apply", "--server-side", "--force-conflicts"]
    run([*apply, "-f", binaries.parent / "crds"], timeout=120)
    run([*kubectl, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"], timeout=90)
    for name in ("local-path.yaml", "traefik.yaml"):
        run([*apply, "-f", pins.STATE / name], timeout=60)
    try:
        run([*kubectl, "wait", "--for=condition=Ready", "node", pins.NODE_NAME, "--timeout=120s"], timeout=150)
        for namespace, workload in _WORKLOADS:
            run([*kubectl, "-n", namespace, "rollout", "status", workload, "--timeout=120s"], timeout=150)
    except NodeError as error:
        pods = run([*kubectl, "get", "pods", "-A", "-o", "wide"], timeout=30)
        events = run([*kubectl, "get", "events", "-A", "--sort-by=.lastTimestamp"], timeout=30)
        raise NodeError(f"{error}\n{pods}\n{events[-3000:]}") from None


def _wait_for_kubelet() -> None:
    kubectl = _kubectl(pins.cache() / "current" / "bin")
    healthy = [*kubectl, "get", "--raw", f"/api/v1/nodes/{pins.NODE_NAME}/proxy/healthz", "--request-timeout=2s"]
    wait_until("the kubelet", lambda: _failure(healthy), timeout=60)


def _down() -> None:
    # The kubelet first, or it starts the pods again.
    system.stop("kubelet")
    kubeadm = pins.cache() / "current" / "bin" / "kubeadm"
    if system.is_alive("containerd") and Path("/etc/kubernetes").exists() and kubeadm.exists():
        command = [str(kubeadm), "reset", "--force", f"--cri-socket=unix://{pins.CONTAINERD_SOCKET}"]
        if failure := _failure(command, timeout=60):
            say(f"kubeadm reset: {failure}")  # what it leaves is removed below
    system.stop("kube-proxy")
    system.stop("containerd")
    if pins.STATE.exists():
        machine.restore()


def _api_answer() -> str:
    """ "" when the API server is ready, else what it or kubectl said."""
    return _failure([*_kubectl(pins.cache() / "current" / "bin"), "get", "--raw", "/readyz", "--request-timeout=2s"])


def _failure(command: Sequence[str | Path], *, timeout: float = 10) -> str:
    try:
        run(command, timeout=timeout)
    except (NodeError, FileNotFoundError) as error:
        return str(error) or "failed"
    return ""


def _kubectl(binaries: Path) -> list[str | Path]:
    return [binaries / "kubectl", f"--kubeconfig={pins.KUBECONFIG}", f"--cache-dir={pins.STATE / 'kubectl'}"]


def _ctr(binaries: Path) -> list[str]:
    return [str(binaries / "ctr"), f"--address={pins.CONTAINERD_SOCKET}", "--namespace=k8s.io"]
