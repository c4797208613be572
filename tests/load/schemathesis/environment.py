"""schemathesis in a virtual environment of its own, made once for each content of requirements.txt.

requirements.txt is made from requirements.in, here in this folder:

    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links requirements.in -o requirements.txt
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
INSTALL_SECONDS = 300.0


def schemathesis() -> Path:
    """The command, installed if it is not there yet."""
    home = Path(os.environ.get("CHURN_CACHE") or Path.home() / ".cache" / "churn") / "schemathesis"
    made_for = (REQUIREMENTS.read_bytes(), sys.version.encode(), sys.base_prefix.encode())
    environment = home / hashlib.sha256(b"\0".join(made_for)).hexdigest()[:12]
    if not environment.exists():
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=home) as scratch:
            _install(Path(scratch) / "venv")
            with contextlib.suppress(OSError):  # somebody else was faster
                (Path(scratch) / "venv").rename(environment)
    return environment / "bin" / "schemathesis"


def _install(environment: Path) -> None:
    uv = Path(sys.executable).parent / "uv"
    python = environment / "bin" / "python"
    for command in (
        ["venv", "--quiet", "--relocatable", "--python", sys.executable, environment],  # it will be renamed
        ["pip", "install", "--quiet", "--python", python, "--require-hashes", "--requirement", REQUIREMENTS],
    ):
        done = subprocess.run(
            [str(word) for word in (uv, *command)], check=False, capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
        assert done.returncode == 0, f"uv {command[0]} ended with {done.returncode}: {done.stderr[-3000:]}"
