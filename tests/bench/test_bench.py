"""That the benchmark of serving runs, in its smallest size. How fast anything is, is not asked here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.bench import load, serving


@pytest.mark.bench
def test_every_build_answers_and_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if load.wrk() is None:
        pytest.skip("no wrk here: apt-get install wrk")
    if not (shutil.which("redis-server") or shutil.which("valkey-server")):
        pytest.skip("no redis-server here: apt-get install redis-server")

    assert serving.main(["--seconds", "1", "--output", str(tmp_path)]) == 0

    result = json.loads((tmp_path / "latest.json").read_text())
    assert set(result["ratios"]) == set(serving.TARGETS)
    assert all(value > 0 for value in result["ratios"].values())
    assert not any(result["errors"].values())
    assert {"non_2xx", "connect", "read", "write", "timeout", "wrong_score", "not_logged"} == set(result["errors"])
    assert result["ready_s"] > 0
    assert result["rss_mb"] > result["pss_mb"] > 0
    assert {(row["build"], row["concurrency"]) for row in result["rows"]} == {
        (build, concurrency) for build in serving.TITLES for concurrency in serving.CONCURRENCY
    }
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert "errors: non_2xx 0" in capsys.readouterr().out
