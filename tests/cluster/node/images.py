"""Images of one static binary each, and the way into the node for images that buildah built."""

import hashlib
import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.node import pins
from tests.cluster.node.system import NodeError, run, say

LABEL = "churn.test/buildah-id"  # on an image in the node: which image of buildah's it is
# Not wget, nc and ping: a static glibc crashes when it looks up an address.
_APPLETS = (
    *(
        "awk",
        "cat",
        "chmod",
        "chown",
        "cp",
        "date",
        "dd",
        "df",
        "du",
        "echo",
        "env",
        "false",
        "grep",
        "head",
        "httpd",
        "id",
    ),
    *("ln", "ls", "mkdir", "mktemp", "mv", "nslookup", "printf", "ps", "rm", "rmdir", "sed", "seq", "sh", "sleep"),
    *("sort", "stat", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true", "wc", "xargs"),
)


@dataclass(frozen=True)
class Image:
    """An image from scratch: a binary in /usr/local/bin, and links to it."""

    name: str
    binary: Path
    entrypoint: bool = False
    links: tuple[str, ...] = ()


def node_images(binaries: Path) -> list[Image]:
    """What the node's own pods run."""
    control_plane = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
    return [
        *(Image(f"registry.k8s.io/{name}:{pins.KUBERNETES}", binaries / name) for name in control_plane),
        Image(pins.ETCD_IMAGE, binaries / "etcd"),
        Image(pins.PAUSE_IMAGE, binaries / "pause", entrypoint=True),
        Image(pins.COREDNS_IMAGE, binaries / "coredns", entrypoint=True),
        Image(pins.LOCAL_PATH_IMAGE, binaries / "local-path-provisioner"),
        Image(pins.TRAEFIK_IMAGE, binaries / "traefik", entrypoint=True),
        Image(pins.BUSYBOX_IMAGE, Path("/bin/busybox"), links=_APPLETS),
    ]


def import_images(images: list[Image], ctr: list[str]) -> None:
    """Put the images into the node, as one archive in docker's format."""
    with tempfile.NamedTemporaryFile(dir=pins.STATE, suffix=".tar") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            manifest = [_add_image(archive, image) for image in images]
            _add_bytes(archive, "manifest.json", json.dumps(manifest).encode())
        file.flush()
        run([*ctr, "images", "import", "--local=true", file.name], timeout=180)


def load(names: list[str], ctr: list[str]) -> None:
    """Move images from buildah's storage into the node, skipping those it has."""
    there = _labels(ctr)
    for name in names:
        known = run(["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", name], timeout=60)
        identity = known.strip()
        if there.get(_full_name(name)) == identity:
            say(f"{name}: already in the node")
            continue
        with tempfile.TemporaryDirectory(dir=pins.STATE) as folder:
            file = f"{folder}/image.tar"
            run(["buildah", "push", "--quiet", name, f"docker-archive:{file}:{name}"], timeout=600)
            run([*ctr, "images", "import", "--local=true", file], timeout=600)
        run([*ctr, "images", "label", _full_name(name), f"{LABEL}={identity}"], timeout=60)
        say(f"{name}: loaded")


def _labels(ctr: list[str]) -> dict[str, str]:
    """Image name in the node: buildah's id of it."""
    found = {}
    for line in run([*ctr, "images", "ls"], timeout=60).splitlines()[1:]:
        words = line.split()
        label = next((word for word in words[-1].split(",") if word.startswith(f"{LABEL}=")), "")
        found[words[0]] = label.partition("=")[2]
    return found


def _full_name(name: str) -> str:
    """The name as containerd and Kubernetes understand it: docker.io/library and latest are implied."""
    if ":" not in name.rpartition("/")[2]:
        name += ":latest"
    first, slash, _ = name.partition("/")
    if not slash:
        return f"docker.io/library/{name}"
    return name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"


def _add_image(archive: tarfile.TarFile, image: Image) -> dict[str, object]:
    if not image.binary.exists():
        raise NodeError(f"{image.binary} is missing; `build` makes it")
    layer = _layer(image)
    digest = hashlib.sha256(layer).hexdigest()
    path = f"/usr/local/bin/{image.binary.name}"
    run_as = {"Env": ["PATH=/usr/local/bin"], **({"Entrypoint": [path]} if image.entrypoint else {})}
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": run_as,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    encoded = json.dumps(config).encode()
    config_name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    _add_bytes(archive, f"{digest}/layer.tar", layer)
    _add_bytes(archive, config_name, encoded)
    return {"Config": config_name, "RepoTags": [image.name], "Layers": [f"{digest}/layer.tar"]}


def _layer(image: Image) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as layer:
        for folder, mode in {
            "usr": 0o755,
            "usr/local": 0o755,
            "usr/local/bin": 0o755,
            "tmp": 0o1777,
            "bin": 0o755,
        }.items():
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            layer.addfile(entry)
        _add_bytes(layer, f"usr/local/bin/{image.binary.name}", image.binary.read_bytes(), mode=0o755)
        for link in (f"{folder}/{name}" for name in image.links for folder in ("usr/local/bin", "bin")):
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"/usr/local/bin/{image.binary.name}"
            layer.addfile(entry)
    return made.getvalue()


def _add_bytes(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
