"""What the command line costs: CPU and wall time of the commands that run often, and of the demo's parts.

`make bench` runs it. Figures are medians of several runs in processes of their own; CPU is user plus system.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from jobs.settings import load_settings
from jobs.supervisor import as_environment

RUNS = 7
RESULTS = Path(__file__).parent / "results"


def cost(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of one run."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.monotonic() - began


def trained_home(home: Path) -> dict[str, str]:
    """A home in which a model was promoted and nothing is left to do; its environment."""
    from datetime import date

    from jobs.ingest import ingest
    from jobs.promote import promote
    from jobs.retrain import retrain
    from jobs.simulate import simulate
    from jobs.snapshots import instant

    settings = load_settings(home=home, candidates=("logistic_regression",), bootstrap_samples=300)
    simulate(home / "simulated", users=3000, months=1, start=date(2024, 1, 31), seed=1)
    ingest(settings, home / "simulated" / "2024-01-31", as_of=date(2024, 1, 31), now=datetime.now(UTC))
    assert retrain(settings, as_of=instant(date(2024, 3, 1))).gate == "passed"
    promote(settings)
    assert promote(settings).result == "idle"
    return {**os.environ, **as_environment(settings)}


def main() -> None:
    """Measure, print a table, write results/commands.json."""
    churn = [sys.executable, "-m", "jobs.cli"]
    with tempfile.TemporaryDirectory() as folder:
        environment = trained_home(Path(folder) / "home")
        commands = {
            "python (the floor)": [sys.executable, "-c", "pass"],
            "import jobs.cli": [sys.executable, "-c", "import jobs.cli"],
            "churn --help": [*churn, "--help"],
            "churn promote, nothing to do": [*churn, "promote"],
            "churn history": [*churn, "history"],
        }
        for command in commands.values():  # compiled and in the page cache
            cost(command, environment)
        runs = {name: [cost(command, environment) for _ in range(RUNS)] for name, command in commands.items()}
    rows = {
        name: {"cpu_s": statistics.median(c for c, _ in found), "wall_s": statistics.median(w for _, w in found)}
        for name, found in runs.items()
    }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}")
    for name, row in rows.items():
        print(f"{name:<30} cpu {row['cpu_s']:.3f} s   wall {row['wall_s']:.3f} s")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "commands.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
