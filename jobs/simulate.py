"""Write monthly snapshots of users who do not exist, in the schema of real ones.

Each user lives in a slot. A slot has a contract, a lifetime and a phase, all fixed by the seed; when its
user's lifetime is over, a new user with new traits moves in. So the age of everyone is known for any month
without playing the months before it, the mix of ages and contracts stays the same for ever (no drift unless
asked for), and a month's bytes depend on seed, users and that month alone.

Who churns is drawn from a logistic relation with noise. Whoever is gone next month had the label true; of
those with the label true about one in six is gone, the others were won back, as in data where last month's
churners are still listed. The ranges follow a telco's: fiber, month-to-month, short tenure, failed payments,
tickets and stalls make leaving likelier.

Knowingly simple: no seasons, no price changes, and feature drift is a change of measurement: it moves
`rebuffer_events_7d` and nothing behind it.
"""

from __future__ import annotations

import calendar
import logging
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from feature_repo.columns import ENTITY, FEATURE_TABLES, TABLES, Column
from jobs.snapshots import LABELS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    Values = dict[str, np.ndarray[Any, Any]]

log = logging.getLogger(__name__)

Format = Literal["csv", "parquet"]

# What a random generator is for; with the seed and a month or a generation it gives each its own stream,
# so that asking for more months, or for late rows, changes no other number.
_SLOTS, _TRAITS, _MONTH, _LABELS, _LATE, _MISSING, _MALFORMED = range(7)

_CONTRACTS = ("Month-to-month", "One year", "Two year")
_SERVICES = ("DSL", "Fiber optic", "No")
_LETTERS = 26**5
_IDS = 10_000 * _LETTERS  # as many as 1234-ABCDE can name
_STRIDE = 7_919_000_009  # shares no factor with _IDS, so that ids look random and never repeat
_MORE_STALLS = 0.37  # of the users have one stall more after feature drift: a quarter of a standard deviation


def simulate(
    folder: Path,
    *,
    users: int,
    months: int,
    start: date,
    seed: int,
    feature_drift_month: int | None = None,
    concept_drift_month: int | None = None,
    late_share: float = 0.0,
    missing_share: float = 0.0,
    malformed: int = 0,
    format: Format = "csv",
    labels: bool = True,
) -> list[Path]:
    """Write `folder/<YYYY-MM-DD>/<table>.csv` for `months` months from `start`, and return those folders.

    Months are counted from 0; the second and later ones end with their calendar month. From
    `feature_drift_month` on players report more stalls, from `concept_drift_month` on other things make
    users leave. `late_share` of the usage rows are not in their month's file (the user's next row comes
    with the next month), `missing_share` of each feature column's cells are empty, and `malformed` cells of
    each month are wrong in ways that ingestion must refuse. The same arguments write the same bytes.
    """
    _check({"users": (users, 1), "months": (months, 1), "malformed": (malformed, 0), "seed": (seed, 0)})
    _check_shares(late_share=late_share, missing_share=missing_share)
    if format not in ("csv", "parquet"):
        raise ValueError(f"format is {format!r}; expected csv or parquet")
    if malformed > users:
        raise ValueError(f"malformed is {malformed}, more than the {users} users; expected at most one a user")
    slots = _slots(seed, users)
    written = []
    for month, day in enumerate(_days(start, months)):
        drifted = feature_drift_month is not None and month >= feature_drift_month
        changed = concept_drift_month is not None and month >= concept_drift_month
        values = _month(seed, month, day, slots, more_stalls=drifted, other_reasons=changed)
        tables = _tables(values)
        _lose_rows(tables, _generator(seed, _LATE, month), late_share)
        _lose_cells(tables, _generator(seed, _MISSING, month), missing_share)
        if not labels:
            del tables[LABELS]
        _spoil(tables, _generator(seed, _MALFORMED, month), malformed)
        written.append(_write(folder / day.isoformat(), tables, format))
        log.info("simulated %s users=%s churn=%.3f", day, users, float(values["churn_label"].mean()))
    return written


def _check(counts: dict[str, tuple[int, int]]) -> None:
    for name, (count, least) in counts.items():
        if count < least:
            raise ValueError(f"{name} is {count}; expected {least} or more")


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; expected a share from 0 to below 1, such as 0.02")


def _days(start: date, months: int) -> Iterator[date]:
    yield start
    for later in range(1, months):
        year, month = divmod(start.year * 12 + start.month - 1 + later, 12)
        yield date(year, month + 1, calendar.monthrange(year, month + 1)[1])


def _generator(seed: int, purpose: int, number: int = 0) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([seed, purpose, number])


# --- who is there, and what they do --------------------


def _slots(seed: int, users: int) -> Values:
    """Contract, lifetime in months and phase of each slot: what stays when a user goes."""
    import numpy as np

    rng = _generator(seed, _SLOTS)
    contract = rng.choice(3, users, p=(0.55, 0.21, 0.24))
    shortest, longest = np.array([(5, 40), (36, 84), (60, 90)])[contract].T
    lifetime = rng.integers(shortest, longest, endpoint=True)
    return {"contract": contract, "lifetime": lifetime, "phase": rng.integers(0, lifetime)}


def _traits(seed: int, generation: int, slots: Values) -> Values:
    """What stays with a user from joining to leaving, for all slots' users of one generation."""
    import numpy as np

    rng = _generator(seed, _TRAITS, generation)
    contract = slots["contract"]
    size = len(contract)
    by_contract = np.array([(0.31, 0.56, 0.13), (0.39, 0.36, 0.25), (0.37, 0.25, 0.38)])[contract]
    service = (rng.random(size)[:, None] > by_contract.cumsum(axis=1)[:, :2]).sum(axis=1)
    online = service < 2
    tv = online & (rng.random(size) < 0.49)
    movies = online & (rng.random(size) < np.where(tv, 0.75, 0.25))
    fee = np.array([50.0, 78.0, 20.5])[service] + 9.5 * tv + 9.5 * movies + rng.normal(0, 1, size) * (1 + 5 * online)
    family = rng.random(size) < np.array([0.37, 0.53, 0.70])[contract]
    number = generation * size + np.arange(size)
    return {
        "number": (number * _STRIDE + seed * 104_729 % _IDS) % _IDS,
        "service": service,
        "plan_stream_tv": tv,
        "plan_stream_movies": movies,
        "monthly_fee": np.round(np.clip(fee, 18.25, 118.75), 2),
        "paid_share": rng.normal(1, 0.03, size).clip(0.85, 1.15),
        "paperless_billing": rng.random(size) < np.array([0.53, 0.71, 0.29])[service],
        "user_gender": rng.random(size) < 0.505,
        "user_is_senior": rng.random(size) < np.array([0.12, 0.24, 0.04])[service],
        "has_family": family,
        "has_dependents": rng.random(size) < np.where(family, 0.5, 0.1),
        "signup_day": rng.integers(1, 28, size, endpoint=True),
        "watch_level": rng.normal(29.6, 5.5, size),
        "session_level": rng.normal(29.0, 4.0, size),
        "devices": rng.integers(1, 3, size, endpoint=True),
    }


def _month(seed: int, month: int, day: date, slots: Values, *, more_stalls: bool, other_reasons: bool) -> Values:
    """Every value of one month, one array a column."""
    import numpy as np

    contract, lifetime = slots["contract"], slots["lifetime"]
    size = len(contract)
    generation, age = np.divmod(slots["phase"] + month, lifetime)
    values: Values = {}
    for number in np.unique(generation):
        here = generation == number
        for name, drawn in _traits(seed, int(number), slots).items():
            values.setdefault(name, np.empty(size, drawn.dtype))[here] = drawn[here]

    rng = _generator(seed, _MONTH, month)
    fiber = values["service"] == 1
    everyone = np.zeros(size, dtype=int)
    values["contract"] = contract
    values["months_active"] = age
    values["total_paid"] = np.round(values["monthly_fee"] * age * values["paid_share"], 2)
    watched = values["watch_level"] + 3.8 * _normal(rng, size)
    values["watch_hours_30d"] = np.round(np.clip(watched, 0, 720), 3)
    session = values["session_level"] + 3 * _normal(rng, size)
    values["avg_session_mins_7d"] = np.round(np.clip(session, 1, 1440), 3)
    values["unique_devices_30d"] = values["devices"]
    values["skips_7d"] = _counts(rng, everyone, (5.0,))
    stalls = _counts(rng, fiber, (2.1, 2.5))
    values["failed_payments_90d"] = _counts(rng, contract, (0.22, 0.10, 0.06))
    values["support_tickets_90d"] = _counts(rng, fiber, (0.22, 0.40))
    values["ticket_avg_resolution_hrs_90d"] = np.round(np.clip(10 + 3.9 * _normal(rng, size), 1, 2160), 1)
    more = rng.random(size) < _MORE_STALLS
    values["rebuffer_events_7d"] = stalls + more if more_stalls else stalls

    reasons = _other_reasons if other_reasons else _reasons
    chance = 1 / (1 + np.exp(-reasons({**values, "stalls": stalls})))
    leaves = age == lifetime - 1
    values["churn_label"] = leaves | (_generator(seed, _LABELS, month).random(size) < chance)
    joined = day.year * 12 + day.month - 1 - age
    first = (np.asarray(joined) - 1970 * 12).astype("datetime64[M]").astype("datetime64[D]")
    values["signup_date"] = first + (values["signup_day"] - 1).astype("timedelta64[D]")
    return values


def _even(rng: np.random.Generator, size: int) -> Any:
    """Uniform draws, one from each of `size` equal parts: a small month is no odder than a large one."""
    return (rng.permutation(size) + rng.random(size)) / size


def _normal(rng: np.random.Generator, size: int) -> Any:
    from scipy.special import ndtri

    return ndtri(_even(rng, size))


def _counts(rng: np.random.Generator, group: np.ndarray[Any, Any], rates: tuple[float, ...]) -> Any:
    """Poisson counts whose rate depends on the group."""
    import numpy as np

    counts = np.empty(len(group), dtype=np.int64)
    for number, rate in enumerate(rates):
        here = group == number
        steps = np.arange(1, 40)
        cumulative = np.exp(-rate) * np.cumsum(np.r_[1.0, np.cumprod(rate / steps)])
        counts[here] = np.searchsorted(cumulative, _even(rng, int(here.sum())))
    return counts


def _reasons(v: Values) -> Any:
    """Log odds of leaving, as long as nothing changed."""
    import numpy as np

    return (
        -2.95
        + np.array([1.25, -0.3, -1.25])[v["contract"]]
        + np.array([0.0, 0.7, -0.7])[v["service"]]
        + 0.2 * v["paperless_billing"]
        - 0.020 * (v["months_active"] - 20)
        + 0.8 * v["failed_payments_90d"]
        + 0.6 * v["support_tickets_90d"]
        + 0.25 * (v["stalls"] - 2.3)
        - 0.03 * (v["watch_hours_30d"] - 29.6)
    )


def _other_reasons(v: Values) -> Any:
    """Log odds of leaving after concept drift: habits matter, and what mattered before says nothing."""
    return (
        -2.05
        + 0.65 * (v["skips_7d"] - 5.0)
        + 1.0 * (v["unique_devices_30d"] - 2)
        + 0.12 * (v["avg_session_mins_7d"] - 29.0)
        - 0.15 * (_reasons(v) + 2.25)  # makes up for those who leave whatever their reasons
    )


# --- tables and files --------------------


def _tables(values: Values) -> dict[str, pd.DataFrame]:
    """The month as the tables of a snapshot; the columns come from feature_repo.columns."""
    import numpy as np
    import pandas as pd

    online = values["service"] != _SERVICES.index("No")
    words: dict[str, Any] = {
        "contract_type": np.array(_CONTRACTS)[values["contract"]],
        "net_service": np.array(_SERVICES)[values["service"]],
        "user_gender": np.where(values["user_gender"], "Male", "Female"),
    }
    for name in ("plan_stream_tv", "plan_stream_movies"):
        words[name] = np.where(online, np.where(values[name], "True", "False"), "")
    ids = _user_ids(values["number"])
    return {
        name: pd.DataFrame({ENTITY: ids} | {c.name: words.get(c.name, values.get(c.name)) for c in table.columns})
        for name, table in TABLES.items()
    }


def _user_ids(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers as 1234-ABCDE."""
    import numpy as np

    digits, letters = np.divmod(numbers, _LETTERS)
    text = np.empty((len(numbers), 10), dtype=np.uint8)
    for place in range(3, -1, -1):
        digits, text[:, place] = digits // 10, digits % 10 + ord("0")
    text[:, 4] = ord("-")
    for place in range(9, 4, -1):
        letters, text[:, place] = letters // 26, letters % 26 + ord("A")
    return text.view("S10").ravel().astype("U10")


def _lose_rows(tables: dict[str, pd.DataFrame], rng: np.random.Generator, share: float) -> None:
    usage = tables["usage_agg_30d"]
    lost = rng.permutation(len(usage))[: int(share * len(usage))]
    tables["usage_agg_30d"] = usage[~usage.index.isin(lost)]


def _lose_cells(tables: dict[str, pd.DataFrame], rng: np.random.Generator, share: float) -> None:
    for table in FEATURE_TABLES:
        frame = tables[table.name]
        for column in table.columns:
            lost = rng.permutation(len(frame))[: int(share * len(frame))]
            if len(lost) and column.null_category is None:  # there a null is a statement, not a gap
                nullable: Any = {"int": "Int64", "bool": "boolean"}.get(column.kind)
                values = frame[column.name].astype(nullable) if nullable else frame[column.name]
                frame[column.name] = values.mask(frame.index.isin(frame.index[lost]))


def _spoil(tables: dict[str, pd.DataFrame], rng: np.random.Generator, count: int) -> None:
    """Make `count` cells wrong, in rows that differ, so that each of them is there to be found."""
    spoilable = [(t.name, c) for t in FEATURE_TABLES if len(tables[t.name]) for c in t.columns]
    rows: dict[str, Any] = {name: rng.permutation(len(frame)) for name, frame in tables.items()}
    for number in range(count):
        name, column = spoilable[int(rng.integers(len(spoilable)))]
        frame = tables[name]
        if frame[column.name].dtype != object:
            frame[column.name] = frame[column.name].astype("string").astype(object)
        wrong = _wrong(column)
        row = frame.index[rows[name][number % len(frame)]]
        frame.loc[row, column.name] = wrong[int(rng.integers(len(wrong)))]


def _wrong(column: Column) -> tuple[str, ...]:
    return {
        "int": ("many", "-3", "1.5"),
        "float": ("a lot", "-12.5", "inf"),
        "bool": ("maybe", "2"),
        "category": ("Carrier pigeon", "???"),
        "date": ("31/12/2023",),
    }[column.kind]


def _write(folder: Path, tables: dict[str, pd.DataFrame], format: Format) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow import csv

    folder.mkdir(parents=True, exist_ok=True)
    for name in TABLES:  # a folder of an earlier call keeps no labels or other format of it
        for suffix in (".csv", ".parquet"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    for name, frame in tables.items():
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        path = folder / f"{name}.{format}"
        if format == "csv":
            csv.write_csv(table, path, csv.WriteOptions(quoting_style="none"))
        else:
            pq.write_table(_nulls_for_blanks(table), path)
    return folder


def _nulls_for_blanks(table: pa.Table) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)  # noqa: PLW2901
        columns.append(column)
    return pa.Table.from_arrays(columns, names=table.column_names)
