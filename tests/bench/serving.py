"""How fast `/predict` is, beside what is usual, beside FastAPI with the same parts, and beside the floor.

    python -m tests.bench.serving [--seconds N] [--output DIR]

Real Redis and PostgreSQL, simulated users materialized by Feast, a forest trained and packaged as the jobs do it.
In each round every build is started, loaded with 1, 8 and 64 connections, and stopped; the next round begins with
another build. Figures are medians of the rounds, all of one run; ratios are medians of each round's. Prints
tables, and writes latest.json, serving.md and serving.png; ends with 1 if anything went wrong, be it one answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import load, parts
from tests.bench.stage import Stage, stage

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parents[2]
CONCURRENCY = (1, 8, 64)
FIRST = 100  # requests after the start, one by one
CHECKED = 20  # users whose scores are compared with scikit-learn's, in each build and round
TOLERANCE = 1e-6

TITLES = {
    "typical": "BentoML sync + Feast SDK + scikit-learn",
    "fastapi": "FastAPI async, our parts and log",
    "ours": "ours: BentoML's worker, log on",
    "floor": "floor: bare ASGI, HMGET, ONNX",
}

LOGGED = ("fastapi", "ours")  # their predictions end up in PostgreSQL

# what each ratio should be; `below` is the better side
TARGETS: dict[str, tuple[str, float]] = {
    "c8_rps_over_typical": ("at least", 25),
    "c8_rps_over_floor": ("at least", 0.4),
    "c1_p50_over_floor": ("at most", 1.6),
    "c1_p99_over_p50": ("at most", 3),
    "c64_p99_over_p50": ("at most", 10),
    "cpu_over_fastapi": ("at most", 1),
    "score_over_onnx": ("at most", 2),
    "score_speedup_over_sklearn": ("at least", 80),
    "read_over_hmget": ("at most", 1.6),
    "read_speedup_over_sdk": ("at least", 5),
}
MORE_TARGETS: dict[str, tuple[str, float]] = {
    "ready_s": ("at most", 2.5),
    "rss_mb": ("at most", 200),
    "first_over_p50": ("at most", 3),
    "read_100_speedup_over_sdk": ("at least", 5),
    "score_difference": ("at most", 1e-6),
}


@dataclass(frozen=True)
class Size:
    """How much is done."""

    seconds: int = 3  # of each load
    rounds: int = 3
    users: int = 7000
    trees: int | None = None  # as many as the candidate has
    rows: int = 100_000  # whose scores are compared
    calls: int = 2000  # of each part alone
    hurry: bool = False  # do at once what disturbs each other: it all runs, but the figures mean nothing


SMOKE = Size(seconds=1, rounds=1, users=400, trees=20, rows=2000, calls=100, hurry=True)


def builds(scene: Stage) -> dict[str, tuple[list[str], dict[str, str], Path | None]]:
    """Command, further environment and working directory of each build.

    FastAPI runs on the code inside the bento, so that it is the same code.
    """
    from jobs.supervisor import serve_command

    ours = [part.replace("3000", "{port}") for part in serve_command(scene.bento, 3000)]
    typical = [sys.executable, "-m", "bentoml", "serve", "tests.bench.builds.typical:Typical", "--host", "127.0.0.1"]
    path = {"PYTHONPATH": str(REPOSITORY)}
    return {
        "typical": ([*typical, "--port", "{port}"], path, REPOSITORY),
        "fastapi": (load.uvicorn("tests.bench.builds.fastapi_fast:app"), path, scene.bento / "src"),
        "ours": (ours, {}, None),
        "floor": (load.uvicorn("tests.bench.builds.floor:app"), path, None),
    }


def measure(scene: Stage, size: Size, say: Any = lambda text: None) -> list[dict[str, Any]]:
    """One row for each build, round and concurrency; a build's start and memory are in all of its rows."""
    every = builds(scene)
    names = list(every)

    def start(name: str) -> AbstractContextManager[load.Process]:
        command, environment, cwd = every[name]
        return load.serve(command, {**scene.environment, **environment}, cwd)

    rows = []
    for turn in range(size.rounds):
        order = [*names[turn % len(names) :], *names[: turn % len(names)]]
        with ExitStack() as ahead:
            if size.hurry:
                order.append(order.pop(0))
                early = ahead.enter_context(start(order[-1]))
            for name in order:
                say(f"round {turn + 1} of {size.rounds}: {TITLES[name]}")
                with nullcontext(early) if size.hurry and name == order[-1] else start(name) as service:
                    own = _measure(scene, service, size)
                if name in LOGGED:
                    own[-1] |= _logged(scene.database_url, CHECKED + FIRST + sum(row["requests"] for row in own))
                    own[-1]["errors"]["not_logged"] = max(0, own[-1]["answered"] - own[-1]["logged"])
                rows += [{"build": name, "round": turn + 1, **row} for row in own]
    return rows


def _measure(scene: Stage, service: load.Process, size: Size) -> list[dict[str, Any]]:
    about: dict[str, Any] = {"ready_s": service.wait_ready()}
    about["first_ms"], about["next_ms"] = service.first_answers(scene.users[-FIRST:])
    redis, postgres = scene.stores
    expected = scene.pipeline.predict_proba(scene.frame.iloc[:CHECKED])[:, 1]
    found = service.scores(scene.users[:CHECKED])

    def loaded(concurrency: int) -> dict[str, Any]:
        alone = concurrency == 1 and not size.hurry  # the database is another machine in earnest: it gets a core
        with load.on_one_core(service.process.pid, redis, apart=[postgres]) if alone else nullcontext():
            row = service.load(scene.folder / "users.txt", concurrency, size.seconds, scene.stores)
        return {"concurrency": concurrency, **about, **row}

    with ThreadPoolExecutor(len(CONCURRENCY) if size.hurry else 1) as pool:
        rows = list(pool.map(loaded, CONCURRENCY))
    rows[0]["errors"]["wrong_score"] = int((abs(found - expected) > TOLERANCE).sum())
    rss, pss = service.memory()
    return [{**row, "rss_mb": rss, "pss_mb": pss} for row in rows]


def _logged(database_url: str, answered: int) -> dict[str, int]:
    """Answers given, and rows in table `predictions` after the build has ended; the table is emptied."""
    import psycopg

    with psycopg.connect("postgresql://" + database_url.split("://", 1)[1], autocommit=True) as connection:
        ((logged,),) = connection.execute("SELECT count(*) FROM predictions").fetchall()
        connection.execute("TRUNCATE predictions")
    return {"answered": answered, "logged": logged}  # wrk leaves with requests under way: logged, not answered


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The medians of the rounds, and the sum of the errors, by build and concurrency."""
    found = []
    for build in TITLES:
        for concurrency in CONCURRENCY:
            same = [row for row in rows if (row["build"], row["concurrency"]) == (build, concurrency)]
            numbers = [k for k, v in same[0].items() if isinstance(v, float)]
            medians = {key: statistics.median(row[key] for row in same) for key in numbers}
            errors = sum(sum(row["errors"].values()) for row in same)
            requests = sum(row["requests"] for row in same)
            found.append(
                {"build": build, "concurrency": concurrency, **medians, "requests": requests, "errors": errors}
            )
    return found


def ratios_of(rows: Sequence[dict[str, Any]], score: dict[str, float], read: dict[str, float]) -> dict[str, float]:
    """The ten ratios that say how far we are: of each round, for the machine may change its pace, then the median."""
    rounds = []
    for turn in sorted({row["round"] for row in rows}):
        at = {(row["build"], row["concurrency"]): row for row in rows if row["round"] == turn}
        ours = {concurrency: at["ours", concurrency] for concurrency in CONCURRENCY}
        rounds.append(
            {
                "c8_rps_over_typical": ours[8]["rps"] / at["typical", 8]["rps"],
                "c8_rps_over_floor": ours[8]["rps"] / at["floor", 8]["rps"],
                "c1_p50_over_floor": ours[1]["p50_ms"] / at["floor", 1]["p50_ms"],
                "c1_p99_over_p50": ours[1]["p99_ms"] / ours[1]["p50_ms"],
                "c64_p99_over_p50": ours[64]["p99_ms"] / ours[64]["p50_ms"],
                "cpu_over_fastapi": ours[8]["cpu_us"] / at["fastapi", 8]["cpu_us"],
            }
        )
    return {
        **{name: statistics.median(found[name] for found in rounds) for name in rounds[0]},
        "score_over_onnx": score["ours_us"] / score["onnx_us"],
        "score_speedup_over_sklearn": score["sklearn_us"] / score["ours_us"],
        "read_over_hmget": read["ours_1_us"] / read["hmget_1_us"],
        "read_speedup_over_sdk": read["sdk_1_us"] / read["ours_1_us"],
    }


def errors_of(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Every kind of error, added up over all loads."""
    total: dict[str, int] = {}
    for row in rows:
        for kind, count in row["errors"].items():
            total[kind] = total.get(kind, 0) + count
    return total


def machine() -> dict[str, Any]:
    """Where this ran, and how busy it was before."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("bentoml", "fastapi", "feast", "onnxruntime", "uvicorn")},
    }


def run(size: Size, say: Any = lambda text: None) -> dict[str, Any]:
    """Measure everything; the document that becomes latest.json."""
    import uvloop

    logging.captureWarnings(True)  # the libraries' own; nobody reads them here
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "machine": machine(), "size": vars(size)}
    with tempfile.TemporaryDirectory(prefix="churn-bench-") as folder, ExitStack() as held:
        say("starting the stores, filling them, training and packaging a forest")
        scene = held.enter_context(stage(Path(folder), users=size.users, trees=size.trees))
        rows = measure(scene, size, say)
        say("scoring alone")
        score = parts.scoring(scene, calls=size.calls, rows=size.rows)
        say("reading features alone")
        with load.on_one_core(scene.stores[0]):
            read = uvloop.run(parts.reading(scene, calls=size.calls))
    summary = summarize(rows)
    ours = next(row for row in summary if row["build"] == "ours")
    return {
        **about,
        "ratios": ratios_of(rows, score, read),
        "errors": errors_of(rows),
        "ready_s": ours["ready_s"],
        "rss_mb": ours["rss_mb"],
        "pss_mb": ours["pss_mb"],
        "first_over_p50": ours["first_ms"] / ours["next_ms"],
        "read_100_speedup_over_sdk": read["sdk_100_us"] / read["ours_100_us"],
        "score_difference": score["difference"],
        "scoring": score,
        "reading": read,
        "summary": summary,
        "rows": rows,
    }


# --- what people see --------------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console, *, markdown: bool = False) -> None:
    """The tables, for a terminal or for a page."""
    where = result["machine"]
    console.print(
        f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, {result['date']}, "
        f"load before {where['load_before']:.2f}.\n"
        "Client: wrk with 1 thread on the same machine. Others: cores that other programs kept busy meanwhile.",
        highlight=False,
    )
    for table in (_requests(result["summary"]), _starts(result["summary"]), _parts(result), _ratios(result)):
        if markdown:
            console.print(f"\n{table.title}\n")
            table.title, table.box = None, box.MARKDOWN
        console.print(table)
    errors = ", ".join(f"{kind} {count}" for kind, count in result["errors"].items())
    console.print(f"errors: {errors}", style="red" if any(result["errors"].values()) else "", highlight=False)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _requests(summary: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "POST /predict by user_id", "build", "conns", "req/s", "p50 ms", "p99 ms", "CPU µs/req", "errors", "others"
    )
    for row in summary:
        table.add_row(
            TITLES[row["build"]] if row["concurrency"] == CONCURRENCY[0] else "",
            str(row["concurrency"]),
            f"{row['rps']:,.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['cpu_us']:,.0f}",
            str(row["errors"]),
            f"{row['other_cores']:.2f}",
            end_section=row["concurrency"] == CONCURRENCY[-1],
        )
    return table


def _starts(summary: Sequence[dict[str, Any]]) -> Table:
    table = _table("start and memory", "build", "ready s", "first ms", "then ms", "RSS MB", "PSS MB")
    for row in summary:
        if row["concurrency"] == CONCURRENCY[0]:
            keys = ("ready_s", "first_ms", "next_ms")
            table.add_row(
                TITLES[row["build"]],
                *(f"{row[key]:.2f}" for key in keys),
                f"{row['rss_mb']:.0f}",
                f"{row['pss_mb']:.0f}",
            )
    return table


def _parts(result: dict[str, Any]) -> Table:
    score, read = result["scoring"], result["reading"]
    table = _table("parts alone, µs", "what", "ours", "bare", "library")
    table.add_row(
        "score 1 row (ONNX Runtime, scikit-learn)",
        *(f"{score[key]:,.1f}" for key in ("ours_us", "onnx_us", "sklearn_us")),
    )
    for size, users in ((1, "1 user"), (100, "100 users")):
        table.add_row(
            f"read {users} (HMGET, Feast SDK)",
            *(f"{read[f'{key}_{size}_us']:,.1f}" for key in ("ours", "hmget", "sdk")),
        )
    return table


def _ratios(result: dict[str, Any]) -> Table:
    table = _table("ratios", "what", "found", "target", "")
    found = {**result["ratios"], **{key: result[key] for key in MORE_TARGETS}}
    for name, (side, target) in {**TARGETS, **MORE_TARGETS}.items():
        met = found[name] >= target if side == "at least" else found[name] <= target
        table.add_row(name, f"{found[name]:.3g}", f"{side} {target:g}", "met" if met else "[red]missed[/]")
    return table


def plot(result: dict[str, Any], path: Path) -> None:
    """Requests a second, latencies and CPU of the builds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    colors = dict(zip(TITLES, ("tab:gray", "tab:orange", "tab:blue", "tab:green"), strict=True))
    width = 0.8 / len(TITLES)
    for number, build in enumerate(TITLES):
        rows = [row for row in result["summary"] if row["build"] == build]
        places = [at + (number - (len(TITLES) - 1) / 2) * width for at in range(len(rows))]
        style: dict[str, Any] = {"width": width, "color": colors[build]}
        bars = axes[0].bar(places, [row["rps"] for row in rows], label=TITLES[build], **style)
        axes[0].bar_label(bars, [f"{row['rps']:,.0f}" for row in rows], fontsize=7)
        axes[1].bar(places, [row["p50_ms"] for row in rows], **style)
        axes[1].scatter(places, [row["p99_ms"] for row in rows], color=colors[build], marker="_", s=120)
        bars = axes[2].bar(places, [row["cpu_us"] for row in rows], **style)
        axes[2].bar_label(bars, [f"{row['cpu_us']:,.0f}" for row in rows], fontsize=7)
    titles = ("requests a second", "ms: p50 (bar), p99 (mark)", "CPU of the service, µs a request")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, yscale="log", xlabel="connections")
        axis.set_xticks(range(len(CONCURRENCY)), [str(concurrency) for concurrency in CONCURRENCY])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(TITLES), frameon=False)
    where = result["machine"]
    figure.suptitle(f"POST /predict by user_id; {where['cpu']}, {where['cores']} cores, {result['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if there was no error."""
    parser = argparse.ArgumentParser(prog="tests.bench.serving", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=int, default=Size.seconds, help="of each load; 1: only to see that it runs")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for latest.json, serving.md and serving.png"
    )
    chosen = parser.parse_args(arguments)
    if chosen.seconds < 1:
        parser.error("--seconds: expected at least 1")
    if load.wrk() is None:
        print("no wrk here: apt-get install wrk", file=sys.stderr)
        return 0
    size = SMOKE if chosen.seconds == 1 else Size(seconds=chosen.seconds)
    console = Console(width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True)
    with errors.status("") as status:
        result = run(size, lambda text: status.update(text) if errors.is_terminal else errors.print(text))
    show(result, console)
    chosen.output.mkdir(parents=True, exist_ok=True)
    (chosen.output / "latest.json").write_text(json.dumps(result, indent=1))
    with (chosen.output / "serving.md").open("w") as page:
        show(result, Console(file=page, width=160), markdown=True)
    plot(result, chosen.output / "serving.png")
    return 1 if any(result["errors"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
