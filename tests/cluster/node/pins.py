"""What the node is made of: versions, addresses, and where its files are."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent

KUBERNETES = "v1.36.3"
ETCD = "v3.6.8"
CONTAINERD = "v2.4.2"
COREDNS = "v1.15.0"
TRAEFIK = "v3.6.15"  # 3.7 does not resolve as a module
LOCAL_PATH = "v0.0.30"
HELM_3 = "v3.21.4"
HELM_4 = "v4.3.1"
GATEWAY_API = "v1.4.0"  # the version Traefik was built with
PROMETHEUS_OPERATOR = "v0.85.0"

# The names kubeadm asks for; see cmd/kubeadm/app/constants in Kubernetes.
ETCD_IMAGE = "registry.k8s.io/etcd:3.6.8-0"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"
COREDNS_IMAGE = "registry.k8s.io/coredns/coredns:v1.14.2"
TRAEFIK_IMAGE = f"churn.test/traefik:{TRAEFIK}"
LOCAL_PATH_IMAGE = f"churn.test/local-path-provisioner:{LOCAL_PATH}"
BUSYBOX_IMAGE = "churn.test/busybox:1"

NODE_NAME = "churn-node"
BRIDGE = "churn0"
ADDRESS = "10.244.0.1"  # the bridge's: API server, ingress, and how pods reach this machine
POD_SUBNET = "10.244.0.0/24"
SERVICE_SUBNET = "10.96.0.0/16"
STORAGE_CLASS = "local-path"
INGRESS_ADDRESS = f"http://{ADDRESS}"

STATE = Path("/var/lib/churn-node")
RUN = Path("/run/churn-node")  # sockets, whose paths must be short
LOGS = STATE / "logs"
KUBECONFIG = STATE / "kubeconfig"
CONTAINERD_SOCKET = RUN / "containerd.sock"

DEBIAN_PACKAGES = {  # a file each package brings: the package
    "/usr/sbin/runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/bin/buildah": "buildah",
    "/usr/sbin/iptables": "iptables",
    "/usr/sbin/conntrack": "conntrack",
    "/usr/sbin/ip": "iproute2",
    "/usr/bin/mount": "mount",
    "/bin/busybox": "busybox-static",
}


@dataclass(frozen=True)
class Build:
    """One call of the Go tool, and the binaries that come of it."""

    packages: tuple[str, ...]
    binaries: tuple[str, ...]
    folder: str = ""  # of our go.mod below go/; without it, the package's own module decides the versions
    version: str = ""
    variables: dict[str, str] = field(default_factory=dict)  # set by the linker

    @property
    def name(self) -> str:
        return self.binaries[0]


def _kubernetes(component: str) -> Build:
    # Without these the cluster reports v0.0.0, and charts that ask for a Kubernetes version refuse it.
    _, minor, _ = KUBERNETES.split(".")
    variables = {
        f"k8s.io/{package}.{key}": value
        for package in ("component-base/version", "client-go/pkg/version")
        for key, value in {"gitVersion": KUBERNETES, "gitMajor": "1", "gitMinor": minor}.items()
    }
    return Build((f"k8s.io/kubernetes/cmd/{component}",), (component,), folder="kubernetes", variables=variables)


_CONTAINERD = ("containerd", "ctr", "containerd-shim-runc-v2")

BUILDS = (
    Build(
        ("helm.sh/helm/v3/cmd/helm",),
        ("helm",),
        version=HELM_3,
        variables={
            "helm.sh/helm/v3/internal/version.version": HELM_3,
            # what `helm template` takes the cluster's version to be
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor": "1",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor": KUBERNETES.split(".")[1],
        },
    ),
    _kubernetes("kubectl"),
    _kubernetes("kubeadm"),
    _kubernetes("kube-apiserver"),
    _kubernetes("kube-controller-manager"),
    _kubernetes("kube-scheduler"),
    _kubernetes("kubelet"),
    _kubernetes("kube-proxy"),
    Build(("go.etcd.io/etcd/server/v3",), ("etcd",), folder="kubernetes"),
    Build(
        tuple(f"github.com/containerd/containerd/v2/cmd/{name}" for name in _CONTAINERD),
        _CONTAINERD,
        version=CONTAINERD,
        variables={"github.com/containerd/containerd/v2/version.Version": CONTAINERD},
    ),
    Build(("churn.test/pause",), ("pause",), folder="pause"),
    Build(("github.com/coredns/coredns",), ("coredns",), version=COREDNS),
    Build(("github.com/rancher/local-path-provisioner",), ("local-path-provisioner",), version=LOCAL_PATH),
    Build(
        ("github.com/traefik/traefik/v3/cmd/traefik",),
        ("traefik",),
        folder="traefik",
        variables={"github.com/traefik/traefik/v3/pkg/version.Version": TRAEFIK.removeprefix("v")},
    ),
    Build(
        ("helm.sh/helm/v4/cmd/helm",),
        ("helm4",),
        version=HELM_4,
        variables={"helm.sh/helm/v4/internal/version.version": HELM_4},
    ),
)

# Custom resources the chart can render: files inside Go modules, copied when the binaries are built.
CRDS = {
    f"sigs.k8s.io/gateway-api@{GATEWAY_API}": ("config/crd/standard/gateway.*.yaml",),
    f"github.com/prometheus-operator/prometheus-operator@{PROMETHEUS_OPERATOR}": (
        "example/prometheus-operator-crd/*_podmonitors.yaml",
        "example/prometheus-operator-crd/*_prometheusrules.yaml",
        "example/prometheus-operator-crd/*_servicemonitors.yaml",
    ),
}


def cache() -> Path:
    """The folder of everything built, the same for all pins."""
    home = os.environ.get("CHURN_CACHE") or Path.home() / ".cache" / "churn"
    return Path(home) / "node"


def built() -> Path:
    """The folder of what these pins give; another pin is another folder."""
    pins = hashlib.sha256(repr((BUILDS, CRDS)).encode())
    for file in sorted((HERE / "go").rglob("*")):
        if file.is_file():
            pins.update(file.read_bytes())
    return cache() / pins.hexdigest()[:12]
