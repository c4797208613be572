"""Take out of a virtual environment what nothing reads at run time: a quarter of its size, and half of its files.

    python prune.py /venv

Bytecode stays beside the sources: without it imports take two to five times as long; without sources, tracebacks
have no lines. Generated code, which nobody reads in a traceback, keeps its bytecode only.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

# Folders of test suites, of any package but those that call a part of what they offer so.
TESTS = {"test", "tests", "e2e_test"}
NOT_TESTS = {"evidently"}
# Type stubs, what compilers and debuggers read, notebooks.
SUFFIXES = {".pyi", ".pyx", ".pxd", ".pxi", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".a", ".lib", ".map", ".ipynb"}
UNUSED = [
    "jupyterlab_plotly",  # notebooks
    "kubernetes/aio",  # a second client with the same models, for asyncio
    "onnxruntime/tools",  # conversion for phones
    "onnxruntime/transformers",  # optimizers for language models
    "onnxruntime/quantization",
    "plotly/package_data/datasets",
    "pyarrow/include",
    "pyarrow/src",
    "pyarrow/*flight*",  # a network protocol
    "statsmodels/datasets/*/*.csv",
]
GENERATED = ["kubernetes/client/models", "plotly/graph_objs", "plotly/validators"]


def prune(site: Path) -> int:
    """Remove it from a `site-packages`, and return how many bytes that were."""
    unwanted = [path for pattern in UNUSED for path in site.glob(pattern)]
    unwanted += [
        path for path in site.glob("*/**/") if path.name in TESTS and path.relative_to(site).parts[0] not in NOT_TESTS
    ]
    unwanted += [path for path in site.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
    for name in GENERATED:
        for bytecode in (site / name).rglob("__pycache__/*.pyc"):
            module = bytecode.name.split(".")[0]
            source = bytecode.parent.parent / f"{module}.py"
            bytecode.rename(source.with_suffix(".pyc"))  # where Python looks for it when there is no source
            unwanted.append(source)
    removed = 0
    for path in unwanted:
        if path.is_dir():
            removed += sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            removed += path.lstat().st_size
            path.unlink()
    return removed


if __name__ == "__main__":
    for folder in Path(sys.argv[1]).glob("lib/python3.*/site-packages"):
        print(f"pruned {prune(folder) / 1e6:.0f} MB")
