"""Build the node's binaries into the cache, skipping those that are there."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from tests.cluster.node import pins
from tests.cluster.node.system import NodeError, run, say


def build() -> Path:
    """Everything `up` needs, built; the answer is the folder of the binaries."""
    install_packages()
    target = pins.built()
    (target / "bin").mkdir(parents=True, exist_ok=True)
    go = shutil.which("go") or "/usr/local/go/bin/go"
    for one in pins.BUILDS:
        if all((target / "bin" / name).exists() for name in one.binaries):
            continue
        if not Path(go).exists():
            raise NodeError(f"go is not on the PATH; expected Go 1.26 or newer to build {one.name}")
        start = time.monotonic()
        _build_one(go, one, target / "bin")
        say(f"{' '.join(one.binaries)}: {time.monotonic() - start:.0f} s")
        if not (pins.cache() / "current").exists():  # Helm, the first, is of use to the chart's tests by itself
            _point_current_at(target)
    _copy_crds(go, target / "crds")
    _point_current_at(target)
    return target / "bin"


def install_packages() -> None:
    """Debian's part of the node, installed when a file of it is missing."""
    missing = sorted({package for file, package in pins.DEBIAN_PACKAGES.items() if not Path(file).exists()})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NodeError(f"missing Debian packages, and this is not root on Debian: {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *missing]):
        run(["apt-get", *command], timeout=600, env=environment)


def _build_one(go: str, one: pins.Build, target: Path) -> None:
    linker = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in one.variables.items())])
    flags = ["-trimpath", "-buildvcs=false", "-ldflags", linker]
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        environment = {**os.environ, "CGO_ENABLED": "0", "GOBIN": made, "GOFLAGS": ""}
        if one.folder:
            command = [go, "build", *flags, "-o", f"{made}/{one.name}", *one.packages]
            folder = pins.HERE / "go" / one.folder
        else:
            command = [go, "install", *flags, *(f"{package}@{one.version}" for package in one.packages)]
            folder = Path(made)
        nice = ["nice", "-n", "5"]  # somebody works on this machine
        done = subprocess.run(
            [*nice, *command], check=False, cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise NodeError(f"{' '.join(command)} in {folder} failed:\n{done.stderr[-3000:]}")
        files = sorted(Path(made).iterdir())
        if len(files) == 1:  # go install names a binary after its folder: helm 4 too is called helm
            files[0].rename(target / one.name)
            return
        for name in one.binaries:
            (Path(made) / name).rename(target / name)


def _copy_crds(go: str, target: Path) -> None:
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        for module, patterns in pins.CRDS.items():
            # outside of any module, so that no go.mod is touched
            found = json.loads(run([go, "mod", "download", "-json", module], timeout=300, cwd=Path(made)))
            for pattern in patterns:
                for file in sorted(Path(found["Dir"]).glob(pattern)):
                    (Path(made) / file.name).write_bytes(file.read_bytes())
        target.mkdir()
        for file in Path(made).glob("*.yaml"):
            file.rename(target / file.name)


def _point_current_at(target: Path) -> None:
    current = pins.cache() / "current"
    if current.is_symlink() and current.readlink() == Path(target.name):
        return
    fresh = pins.cache() / f"current.{os.getpid()}"
    fresh.symlink_to(target.name)
    fresh.replace(current)
