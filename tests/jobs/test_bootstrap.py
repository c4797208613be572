"""From nothing to a promoted first model, on one machine's stores; the cluster tests do it on a cluster's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest

from jobs import bootstrap as module
from jobs import ingest as ingest_module
from jobs.bootstrap import bootstrap
from jobs.database import connect
from jobs.history import History
from jobs.registry import PRODUCTION, Registry
from jobs.snapshots import Snapshots, instant
from tests.jobs.conftest import settings_for

NOW = datetime(2026, 11, 21, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    ("today", "ends"),
    [
        pytest.param(date(2026, 11, 21), [date(2026, 8, 31), date(2026, 9, 30), date(2026, 10, 31)], id="in-a-month"),
        pytest.param(date(2024, 2, 29), [date(2023, 12, 31), date(2024, 1, 31), date(2024, 2, 29)], id="its-last-day"),
        pytest.param(date(2024, 3, 1), [date(2023, 12, 31), date(2024, 1, 31), date(2024, 2, 29)], id="its-first-day"),
    ],
)
def test_simulated_months_are_the_last_complete_ones(today: date, ends: list[date]) -> None:
    assert module._month_ends(today, 3) == ends


def test_from_nothing_and_again(tmp_path: Path) -> None:
    """The second run finds everything and changes nothing."""
    settings = settings_for(tmp_path / "home", simulate_users=3000, simulate_months=2)

    first = bootstrap(settings, as_of=NOW, now=NOW)

    assert (first.result, first.simulated) == ("serving", True)
    assert Registry(settings).aliases() == {PRODUCTION: 1}
    assert Snapshots(settings.snapshots).days() == [date(2026, 9, 30), date(2026, 10, 31)]
    assert first.example_user in Snapshots(settings.snapshots).read("subscriptions", date(2026, 10, 31)).index

    again = bootstrap(settings, as_of=NOW + timedelta(days=1), now=NOW)

    assert (again.served_tag, again.simulated) == (first.served_tag, True)
    assert len(History(connect(settings.database)).rows()) == 1


def test_without_data_it_says_where_it_looked(tmp_path: Path) -> None:
    """Success, because a release whose data comes later is no failed release."""
    (tmp_path / "incoming").mkdir()
    settings = settings_for(tmp_path / "home", snapshots_source=str(tmp_path / "incoming"))

    result = bootstrap(settings, as_of=NOW, now=NOW)

    assert result.result == "no_data"
    assert str(tmp_path / "incoming") in result.reason
    assert Registry(settings).aliases() == {}


def test_a_store_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STORES_WITHIN", 0.0)
    settings = settings_for(tmp_path / "home", mlflow_url="http://127.0.0.1:9")

    with pytest.raises(TimeoutError, match=r"waited too long for MLflow to answer: .*refused"):
        bootstrap(settings, as_of=NOW, now=NOW)


def test_labels_that_are_not_known_yet_are_waited_for(tmp_path: Path, simulated: Path) -> None:
    """A new customer's first weeks: no failure, and drift trains the first model when the day has come."""
    settings = settings_for(tmp_path / "home", snapshots_source=str(simulated))

    result = bootstrap(settings, as_of=instant(date(2024, 2, 15)), now=NOW)

    assert result.result == "waiting_for_labels"
    assert "labels of 2024-01-31 are known on 2024-03-01" in result.reason


def test_killed_between_two_months_it_makes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(tmp_path / "home", simulate_users=3000, simulate_months=3)
    with monkeypatch.context() as patch:
        patch.setattr(module, "ingest", _once(ingest_module.ingest))
        with pytest.raises(KeyboardInterrupt):
            module._take_data(settings, as_of=NOW, now=NOW)
    assert len(Snapshots(settings.snapshots).days()) == 1

    assert module._take_data(settings, as_of=NOW + timedelta(days=40), now=NOW + timedelta(days=40))

    assert Snapshots(settings.snapshots).days() == [date(2026, 8, 31), date(2026, 9, 30), date(2026, 10, 31)]


def _once(call: Callable[..., object]) -> Callable[..., object]:
    calls: list[object] = []

    def killed(*arguments: object, **named: object) -> object:
        if calls:
            raise KeyboardInterrupt
        calls.append(call(*arguments, **named))
        return calls[0]

    return killed


def test_real_users_do_not_join_made_up_ones(tmp_path: Path, simulated: Path) -> None:
    """A model of people who do not exist would serve on, and the newer made-up month hide the older real one."""
    home = tmp_path / "home"
    module._take_data(settings_for(home, simulate_users=1000, simulate_months=2), as_of=NOW, now=NOW)
    settings = settings_for(home, snapshots_source=str(simulated))

    with pytest.raises(ingest_module.SimulatedData, match=r"tried out with made-up users .* Begin anew"):
        bootstrap(settings, as_of=NOW, now=NOW)

    assert Snapshots(settings.snapshots).days() == [date(2026, 9, 30), date(2026, 10, 31)]
