"""Make the sources below a folder what `pip install` would have made of them: metadata, console scripts, bytecode.

    python install.py /app [REVISION]

Not by pip, because that fetches a build backend, and because the files are to arrive byte for byte: the tag of a bento
is a digest of bentos/churn/*.py. A `.pth` file in the virtual environment names the folder, so that it comes last on
sys.path and a bento's own `bentos` is found before this one.
"""

from __future__ import annotations

import compileall
import re
import stat
import sys
import tomllib
from pathlib import Path

SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def install(folder: Path, revision: str) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    # PEP 440's local version: what runs of an image say of themselves where no checkout is
    local = ".".join(re.findall(r"[a-z0-9]+", revision.lower().replace("+", ".dirty")))
    version = f"{project['version']}+{local}" if local else project["version"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n")
    (folder / "bin").mkdir()
    for name, target in project.get("scripts", {}).items():
        module, function = target.split(":")
        if not (folder / module.split(".")[0]).is_dir():
            continue  # an image with a part of the packages
        script = folder / "bin" / name
        script.write_text(SCRIPT.format(python=sys.executable, module=module, function=function))
        script.chmod(0o755)
    for path in [folder, *folder.rglob("*")]:  # a checkout made under umask 077 is to run under any UID
        path.chmod(path.stat().st_mode | stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.is_dir() else 0))
    # Checked by time stamp, so that a source file that `skaffold dev` puts into a running container counts.
    if not compileall.compile_dir(folder, quiet=1):
        sys.exit("not all sources compile")


if __name__ == "__main__":
    install(Path(sys.argv[1]), (sys.argv[2:] or [""])[0])
