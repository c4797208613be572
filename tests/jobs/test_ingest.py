"""What ingestion takes, what it takes with a warning, and what it refuses; refusing leaves no trace."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.columns import TABLES
from jobs import ingest as ingest_module
from jobs.delivery import MAX_BYTES
from jobs.ingest import DeliveriesRefused, IngestResult, SnapshotRefused, ingest, ingest_source
from jobs.settings import Settings
from jobs.simulate import simulate
from jobs.snapshots import Snapshots

JANUARY, FEBRUARY = date(2024, 1, 31), date(2024, 2, 29)
NOW = datetime(2024, 3, 1, 2, tzinfo=UTC)
USERS = 120
SUBSCRIPTIONS, USAGE, PAYMENTS, SUPPORT = (
    "subscriptions", "usage_agg_30d", "payments_agg_90d", "support_agg_90d",
)  # fmt: skip

Edit = Callable[[pd.DataFrame], pd.DataFrame]


@pytest.fixture(scope="session")
def months(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two good deliveries; nobody writes in them."""
    first, second = simulate(tmp_path_factory.mktemp("months"), users=USERS, months=2, start=JANUARY, seed=3)
    return first, second


@pytest.fixture
def delivery(months: tuple[Path, Path], tmp_path: Path) -> Path:
    """February's files, to be spoiled."""
    return Path(shutil.copytree(months[1], tmp_path / "delivery"))


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture(scope="module")
def stored(months: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home that has January, for tests that leave it as it is."""
    kept = Settings(home=tmp_path_factory.mktemp("stored") / "home")
    ingest(kept, months[0], as_of=JANUARY, now=NOW)
    return kept


def take(home: Settings, folder: Path, day: date = FEBRUARY, **more: Any) -> IngestResult:
    return ingest(home, folder, as_of=day, now=NOW, **more)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def edit(folder: Path, table: str, change: Edit) -> None:
    path = folder / f"{table}.csv"
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(frame).to_csv(path, index=False)


def as_parquet(folder: Path, table: str, change: Edit = lambda frame: frame) -> Path:
    path = folder / f"{table}.csv"
    change(pd.read_csv(path)).to_parquet(path.with_suffix(".parquet"))
    path.unlink()
    return path.with_suffix(".parquet")


# --- what is taken --------------------------------------------------------------------------------------


def test_a_good_delivery_is_stored_with_typed_columns(home: Settings, delivery: Path):
    result = take(home, delivery)

    assert result.result == "ingested"
    assert result.warnings == ()
    assert result.rows == dict.fromkeys(TABLES, USERS)
    store = Snapshots(home.snapshots)
    assert store.days() == [FEBRUARY]
    assert store.fingerprint(FEBRUARY) == result.fingerprint
    subscriptions = store.read(SUBSCRIPTIONS, FEBRUARY)
    offline = subscriptions["net_service"] == "No"
    assert set(subscriptions["plan_stream_tv"]) == {"true", "false", "none"}
    assert ((subscriptions["plan_stream_tv"] == "none") == offline).all()
    assert json.loads(json.dumps(result.as_dict()))["day"] == "2024-02-29"


def test_the_sample_is_taken_with_warnings_only(home: Settings, sample: Path):
    for number, day in enumerate((JANUARY, FEBRUARY)):
        result = take(home, sample / f"month_00{number}", day)
        assert result.result == "ingested"
        assert result.rows == dict.fromkeys(TABLES, 7043)
        assert any(w.startswith("usage_agg_30d.avg_session_mins_7d: constant") for w in result.warnings)
        assert any(w.startswith("users.signup_date: in 96") for w in result.warnings)
        assert len(result.warnings) == 2
    subscriptions = Snapshots(home.snapshots).read(SUBSCRIPTIONS, FEBRUARY)
    assert (subscriptions["plan_stream_tv"] == "none").sum() == 1526
    raw = pd.read_csv(sample / "month_001" / "usage_agg_30d.csv", index_col="user_id", float_precision="round_trip")
    stored = Snapshots(home.snapshots).read(USAGE, FEBRUARY)
    assert (stored["watch_hours_30d"] == raw["watch_hours_30d"].sort_index()).all()


@dataclass(frozen=True)
class Variant:
    name: str
    change: Callable[[Path], object]


def rewrite(folder: Path, change: Callable[[bytes], bytes]) -> None:
    for path in folder.glob("*.csv"):
        path.write_bytes(change(path.read_bytes()))


SAME = [
    Variant("byte-order-mark", lambda f: rewrite(f, lambda b: b"\xef\xbb\xbf" + b)),
    Variant("crlf", lambda f: rewrite(f, lambda b: b.replace(b"\n", b"\r\n"))),
    Variant("blank-lines-at-the-end", lambda f: rewrite(f, lambda b: b + b"\n\n")),
    Variant("no-newline-at-the-end", lambda f: rewrite(f, lambda b: b.rstrip(b"\n"))),
    Variant("quoted-cells", lambda f: rewrite(f, lambda b: b.replace(b"Fiber optic", b'"Fiber optic"'))),
    Variant("columns-in-another-order", lambda f: edit(f, SUBSCRIPTIONS, lambda d: d[d.columns[::-1]])),
    Variant("rows-in-another-order", lambda f: edit(f, USAGE, lambda d: d[::-1])),
    Variant("whole-numbers-as-3.0", lambda f: edit(f, USAGE, lambda d: d.assign(skips_7d=d["skips_7d"] + ".0"))),
    Variant("1-and-0", lambda f: edit(f, "labels", lambda d: d.replace({"true": "1", "false": "0"}))),
    Variant("TRUE-and-FALSE", lambda f: edit(f, "users", lambda d: d.replace({"true": "TRUE", "false": "FALSE"}))),
    Variant("NaN-for-no-internet", lambda f: edit(f, SUBSCRIPTIONS, lambda d: d.replace({"": "NaN"}))),
    Variant("null-for-no-internet", lambda f: edit(f, SUBSCRIPTIONS, lambda d: d.replace({"": "null"}))),
    Variant("none-for-no-internet", lambda f: edit(f, SUBSCRIPTIONS, lambda d: d.replace({"": "none"}))),
    Variant("parquet", lambda f: [as_parquet(f, name) for name in TABLES]),
    Variant("parquet-with-dates", lambda f: as_parquet(
        f, "users", lambda d: d.assign(signup_date=pd.to_datetime(d["signup_date"])))),
    Variant("parquet-with-categories", lambda f: as_parquet(
        f, SUBSCRIPTIONS, lambda d: d.astype({"contract_type": "category"}))),
    Variant("parquet-ints-as-floats", lambda f: as_parquet(f, USAGE, lambda d: d.astype({"skips_7d": float}))),
]  # fmt: skip


@pytest.mark.parametrize("variant", SAME, ids=lambda v: v.name)
def test_another_spelling_is_the_same_snapshot(home: Settings, delivery: Path, variant: Variant):
    first = take(home, delivery)
    variant.change(delivery)
    again = take(home, delivery)
    assert again.result == "unchanged"
    assert again.fingerprint == first.fingerprint


# --- what is refused ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A way to spoil a delivery, and the finding that must be among those of the refusal."""

    name: str
    table: str
    column: str
    rule: str
    spoil: Callable[[Path], object]
    day: date = FEBRUARY


def cell(name: str, table: str, column: str, value: str, rule: str) -> Case:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        online = frame.index[frame["net_service"] == "DSL"] if "net_service" in frame else frame.index
        frame.loc[online[5], column] = value
        return frame

    return Case(name, table, column, rule, lambda folder: edit(folder, table, change))


def column(name: str, table: str, column: str, rule: str, change: Edit) -> Case:
    return Case(name, table, column, rule, lambda folder: edit(folder, table, change))


def file(name: str, table: str, rule: str, spoil: Callable[[Path], object]) -> Case:
    """`spoil` is given the path of the table's CSV file."""
    return Case(name, table, "", rule, lambda folder: spoil(folder / f"{table}.csv"))


def empty_share(frame: pd.DataFrame, column: str, share: float) -> pd.DataFrame:
    frame.loc[: int(share * len(frame)), column] = ""
    return frame


def strangers(frame: pd.DataFrame, share: float = 0.2) -> pd.DataFrame:
    count = int(share * len(frame))
    frame.loc[: count - 1, "user_id"] = [f"stranger{number}" for number in range(count)]
    return frame


def huge(path: Path) -> None:
    with path.open("r+b") as handle:  # sparse: takes no room
        handle.truncate(MAX_BYTES + 1)


def huge_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000_001, pa.int8()), ["u"])
    pq.write_table(pa.table({"user_id": rows}), path.with_suffix(".parquet"))
    path.unlink()


def truncated_parquet(path: Path) -> None:
    parquet = as_parquet(path.parent, path.stem)
    parquet.write_bytes(parquet.read_bytes()[:-50])


def damaged_parquet(path: Path) -> None:
    parquet = as_parquet(path.parent, path.stem)
    data = bytearray(parquet.read_bytes())
    data[4:600] = bytes(596)
    parquet.write_bytes(data)


def nested_parquet(path: Path) -> None:
    as_parquet(path.parent, path.stem, lambda d: d.assign(skips_7d=[[1]] * len(d)))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(path.name, b"0" * 10_000_000)
    path.with_suffix(".zip").replace(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def line(number: int, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def spoil(path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = change(lines[number - 1])
        path.write_bytes(b"".join(lines))

    return spoil


MALFORMED = [
    # files
    file("missing-file", USAGE, "missing_file", Path.unlink),
    Case("empty-folder", SUBSCRIPTIONS, "", "missing_file", lambda f: [p.unlink() for p in f.iterdir()]),
    file("misspelt-file", PAYMENTS, "missing_file", lambda p: p.rename(p.with_name("payments.csv"))),
    file("csv-and-parquet", USAGE, "two_files", lambda p: shutil.copy(p, p.with_suffix(".parquet"))),
    file("empty-file", USAGE, "empty_file", lambda p: p.write_bytes(b"")),
    file("blank-file", USAGE, "empty_file", lambda p: p.write_bytes(b"\n\n")),
    file("header-only", USAGE, "no_rows", lambda p: p.write_bytes(p.read_bytes().splitlines(keepends=True)[0])),
    file("header-only-parquet", USAGE, "no_rows", lambda p: as_parquet(p.parent, USAGE, lambda d: d[:0])),
    file("gzip-named-csv", USAGE, "compressed", lambda p: p.write_bytes(gzip.compress(p.read_bytes()))),
    file("zip-bomb-named-csv", USAGE, "compressed", zipped),
    file("csv.gz", USAGE, "missing_file", lambda p: p.rename(p.with_name(f"{p.name}.gz"))),
    file("over-4-gib", USAGE, "too_large", huge),
    file("parquet-of-20-million-rows", USAGE, "too_large", huge_parquet),
    file("truncated-parquet", USAGE, "unreadable", truncated_parquet),
    file("damaged-parquet", USAGE, "unreadable", damaged_parquet),
    file("lists-in-parquet", USAGE, "unreadable", nested_parquet),
    file("csv-named-parquet", USAGE, "unreadable", lambda p: p.rename(p.with_suffix(".parquet"))),
    file("folder-named-csv", USAGE, "unreadable", lambda p: (p.unlink(), p.mkdir())),
    file("pipe-named-csv", USAGE, "unreadable", pipe),
    file("dangling-link", USAGE, "unreadable", lambda p: (p.unlink(), p.symlink_to("nowhere.csv"))),
    file("latin-1", "users", "encoding", line(3, lambda b: b.replace(b"ale,", b"al\xe9,"))),
    file("utf-16", USAGE, "encoding", lambda p: p.write_bytes(p.read_text().encode("utf-16"))),
    file("nul-byte", USAGE, "nul_byte", line(9, lambda b: b[:4] + b"\0" + b[5:])),
    file("row-too-short", USAGE, "ragged_row", line(7, lambda b: b.split(b",", 1)[1])),
    file("row-too-long", USAGE, "ragged_row", line(7, lambda b: b.strip() + b",1\n")),
    file("quote-not-closed", USAGE, "ragged_row", line(7, lambda b: b'"' + b)),
    # columns
    column("semicolons", USAGE, "user_id", "missing_column",
           lambda d: d[["user_id"]].set_axis([";".join(d.columns)], axis=1)),
    column("missing-column", USAGE, "skips_7d", "missing_column", lambda d: d.drop(columns="skips_7d")),
    column("missing-user-id", USAGE, "user_id", "missing_column", lambda d: d.drop(columns="user_id")),
    column("extra-column", USAGE, "mood", "extra_column", lambda d: d.assign(mood="good")),
    column("pandas-index-column", USAGE, "Unnamed: 0", "extra_column", lambda d: d.assign(**{"Unnamed: 0": "1"})),
    column("renamed-column", USAGE, "skip_7d", "extra_column", lambda d: d.rename(columns={"skips_7d": "skip_7d"})),
    column("column-in-capitals", USAGE, "skips_7d", "missing_column", lambda d: d.rename(columns=str.upper)),
    column("duplicate-column", USAGE, "skips_7d", "duplicate_column",
           lambda d: pd.concat([d, d[["skips_7d"]]], axis=1)),
    # rows
    column("one-row", SUBSCRIPTIONS, "", "minimum_rows", lambda d: d[:1]),
    column("nine-rows", SUBSCRIPTIONS, "", "minimum_rows", lambda d: d[:9]),
    column("duplicate-user", SUBSCRIPTIONS, "user_id", "duplicate_user", lambda d: pd.concat([d, d[3:4]])),
    column("duplicate-user-in-usage", USAGE, "user_id", "duplicate_user", lambda d: pd.concat([d, d[3:4]])),
    column("duplicate-user-in-labels", "labels", "user_id", "duplicate_user", lambda d: pd.concat([d, d[3:4]])),
    column("unknown-users", USAGE, "user_id", "unknown_users", strangers),
    column("unknown-users-in-labels", "labels", "user_id", "unknown_users", strangers),
    column("absent-rows", USAGE, "user_id", "absent_rows", lambda d: d[: int(0.9 * len(d))]),
    column("absent-labels", "labels", "user_id", "absent_rows", lambda d: d[: int(0.9 * len(d))]),
    # user ids
    cell("no-user-id", SUBSCRIPTIONS, "user_id", "", "user_id"),
    cell("user-id-nan", SUBSCRIPTIONS, "user_id", "NaN", "user_id"),
    cell("blank-user-id", SUBSCRIPTIONS, "user_id", "   ", "user_id"),
    cell("padded-user-id", SUBSCRIPTIONS, "user_id", " 7590-VHVEG", "user_id"),
    cell("user-id-of-129", SUBSCRIPTIONS, "user_id", "u" * 129, "user_id"),
    cell("newline-in-user-id", SUBSCRIPTIONS, "user_id", "7590\nVHVEG", "user_id"),
    cell("escape-in-user-id", SUBSCRIPTIONS, "user_id", "7590\x1b[31m", "user_id"),
    cell("bidi-override-in-user-id", SUBSCRIPTIONS, "user_id", "7590\u202eGEV", "user_id"),
    cell("reserved-user-id", SUBSCRIPTIONS, "user_id", "__sentinel__", "user_id"),
    cell("formula-in-user-id", SUBSCRIPTIONS, "user_id", "=HYPERLINK(1)", "formula"),
    cell("plus-in-user-id", SUBSCRIPTIONS, "user_id", "+1+cmd|' /C calc'!A0", "formula"),
    cell("at-in-user-id", SUBSCRIPTIONS, "user_id", "@SUM(1)", "formula"),
    cell("formula-in-open-category", "users", "user_gender", "-2+3", "formula"),
    cell("tab-in-open-category", "users", "user_gender", "\tFemale", "formula"),
    cell("long-open-category", "users", "user_gender", "f" * 200, "text"),
    # types
    cell("text-for-int", USAGE, "skips_7d", "many", "type"),
    cell("fraction-for-int", USAGE, "skips_7d", "3.5", "type"),
    cell("hexadecimal", USAGE, "skips_7d", "0x10", "type"),
    cell("thousands-separator", SUBSCRIPTIONS, "total_paid", "1,234.5", "type"),
    cell("decimal-comma", SUBSCRIPTIONS, "monthly_fee", "29,85", "type"),
    cell("arabic-digits", USAGE, "skips_7d", "٣", "type"),
    cell("int-of-30-digits", USAGE, "skips_7d", "9" * 30, "type"),
    cell("text-for-bool", SUBSCRIPTIONS, "paperless_billing", "maybe", "type"),
    cell("text-for-label", "labels", "churn_label", "churned", "type"),
    cell("day-first-date", "users", "signup_date", "31/12/2023", "type"),
    cell("no-such-day", "users", "signup_date", "2023-02-30", "type"),
    Case("text-in-parquet", USAGE, "skips_7d", "type", lambda f: as_parquet(
        f, USAGE, lambda d: d.assign(skips_7d=["many", *d["skips_7d"].astype(str)[1:]]))),
    # values
    cell("infinity", SUBSCRIPTIONS, "monthly_fee", "inf", "finite"),
    cell("minus-infinity", SUBSCRIPTIONS, "monthly_fee", "-Infinity", "finite"),
    cell("1e999", SUBSCRIPTIONS, "monthly_fee", "1e999", "finite"),
    cell("1e308", SUBSCRIPTIONS, "monthly_fee", "1e308", "range"),
    cell("negative-count", USAGE, "rebuffer_events_7d", "-1", "range"),
    cell("negative-fee", SUBSCRIPTIONS, "monthly_fee", "-0.01", "range"),
    cell("too-many-failed-payments", PAYMENTS, "failed_payments_90d", "10001", "range"),
    cell("more-hours-than-there-are", SUPPORT, "ticket_avg_resolution_hrs_90d", "2160.1", "range"),
    cell("signed-up-in-1066", "users", "signup_date", "1799-10-14", "range"),
    Case("negative-in-parquet", USAGE, "skips_7d", "range",
         lambda f: as_parquet(f, USAGE, lambda d: d.assign(skips_7d=-1))),
    cell("unknown-category", SUBSCRIPTIONS, "contract_type", "Three year", "category"),
    cell("category-in-lower-case", SUBSCRIPTIONS, "net_service", "dsl", "category"),
    cell("unknown-plan", SUBSCRIPTIONS, "plan_stream_tv", "sometimes", "category"),
    cell("no-plan-but-internet", SUBSCRIPTIONS, "plan_stream_tv", "", "null"),
    cell("plan-none-but-internet", SUBSCRIPTIONS, "plan_stream_movies", "none", "null"),
    column("all-null", USAGE, "skips_7d", "all_null", lambda d: d.assign(skips_7d="")),
    column("all-null-with-default", PAYMENTS, "failed_payments_90d", "all_null",
           lambda d: d.assign(failed_payments_90d="NA")),
    column("too-many-nulls", USAGE, "skips_7d", "missing_share", lambda d: empty_share(d, "skips_7d", 0.2)),
    column("too-many-null-labels", "labels", "churn_label", "missing_share",
           lambda d: empty_share(d, "churn_label", 0.2)),
    # the day
    Case("future-as-of", "snapshot", "", "future", lambda f: None, day=date(2024, 3, 2)),
    Case("labels-of-an-unknown-day", "labels", "", "unknown_day",
         lambda f: [p.unlink() for p in f.iterdir() if p.stem != "labels"]),
]  # fmt: skip


def test_there_are_at_least_40_malformed_snapshots():
    assert len({case.name for case in MALFORMED}) == len(MALFORMED) >= 40


@pytest.mark.parametrize("case", MALFORMED, ids=lambda c: c.name)
def test_a_malformed_snapshot_is_refused_and_leaves_no_trace(stored: Settings, delivery: Path, case: Case):
    case.spoil(delivery)
    before = state(stored.home)

    with pytest.raises(SnapshotRefused) as refused:
        take(stored, delivery, case.day)

    assert state(stored.home) == before
    findings = {(f.table, f.column, f.rule): f for f in refused.value.findings}
    assert (case.table, case.column, case.rule) in findings, str(refused.value)
    finding = findings[case.table, case.column, case.rule]
    assert finding.count >= 1
    assert len(finding.examples) <= 5
    assert str(finding) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 + len(refused.value.findings)
    assert str(refused.value).isascii() and "\x1b" not in str(refused.value)


def test_a_refusal_before_the_first_snapshot_does_not_even_make_the_home(home: Settings, delivery: Path):
    (delivery / "users.csv").unlink()
    with pytest.raises(SnapshotRefused):
        take(home, delivery)
    assert not home.home.exists()


def test_the_report_says_what_was_found_and_what_would_be_right(stored: Settings, delivery: Path):
    def spoil(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[0, "skips_7d"] = "many"
        frame.loc[1:7, "rebuffer_events_7d"] = "-2"
        return frame

    edit(delivery, USAGE, spoil)
    users = pd.read_csv(delivery / f"{USAGE}.csv")["user_id"]
    with pytest.raises(SnapshotRefused) as refused:
        take(stored, delivery)

    head, *lines = str(refused.value).splitlines()
    assert head == f"snapshot 2024-02-29 in {delivery} is refused, nothing was stored; 2 findings:"
    assert lines[0] == (
        f"  usage_agg_30d.skips_7d: type: 1 of {USERS} rows; expected a whole number from 0 to 100000; "
        f"for example 'many' (user '{users[0]}')"
    )
    finding = refused.value.findings[1]
    assert (finding.column, finding.rule, finding.count) == ("rebuffer_events_7d", "range", 7)
    assert finding.examples == tuple((user, "-2") for user in users[1:6])


def test_a_ragged_row_is_named_by_its_line(stored: Settings, delivery: Path):
    line(7, lambda b: b.split(b",", 1)[1])(delivery / f"{USAGE}.csv")
    line(4, lambda b: b"\n" + b)(delivery / f"{USAGE}.csv")
    with pytest.raises(SnapshotRefused, match="line 8 has 5"):
        take(stored, delivery)


def test_bad_bytes_are_named_by_their_line(stored: Settings, delivery: Path):
    line(40, lambda b: b[:-2] + b"\xff\n")(delivery / f"{USAGE}.csv")
    with pytest.raises(SnapshotRefused, match="not UTF-8 in line 40"):
        take(stored, delivery)


def test_a_renamed_column_is_named_with_its_right_name(stored: Settings, delivery: Path):
    edit(delivery, USAGE, lambda d: d.rename(columns={"skips_7d": "skip_7d"}))
    with pytest.raises(SnapshotRefused, match=r"usage_agg_30d\.skip_7d: extra_column: .*is it skips_7d\?"):
        take(stored, delivery)


@pytest.mark.parametrize("value, rule", [("inf", "finite"), ("much", "type"), ("-1", "range")])
def test_a_wrong_cell_is_one_finding(stored: Settings, delivery: Path, value: str, rule: str):
    edit(delivery, SUBSCRIPTIONS, lambda d: d.assign(monthly_fee=[value, *d["monthly_fee"][1:]]))
    with pytest.raises(SnapshotRefused) as refused:
        take(stored, delivery)
    assert [(f.rule, f.count) for f in refused.value.findings] == [(rule, 1)]


def test_all_findings_are_told_at_once(stored: Settings, delivery: Path):
    edit(delivery, USAGE, lambda d: d.drop(columns="skips_7d").assign(watch_hours_30d="-1"))
    edit(delivery, "users", lambda d: d.assign(user_gender="=1"))
    (delivery / f"{PAYMENTS}.csv").unlink()
    with pytest.raises(SnapshotRefused) as refused:
        take(stored, delivery)
    assert {(f.table, f.rule) for f in refused.value.findings} == {
        (USAGE, "missing_column"), (USAGE, "range"), ("users", "formula"), (PAYMENTS, "missing_file"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nowhere", "file.csv"])
def test_what_is_not_a_folder_is_said(home: Settings, tmp_path: Path, name: str):
    (tmp_path / "file.csv").write_text("")
    with pytest.raises((FileNotFoundError, NotADirectoryError), match=f"{name}, which .*; expected"):
        take(home, tmp_path / name)


# --- what is taken with a warning -----------------------------------------------------------------------


def mostly(change: Callable[[pd.DataFrame], object]) -> Edit:
    def apply(frame: pd.DataFrame) -> pd.DataFrame:
        change(frame)
        return frame

    return apply


WARNED: list[tuple[str, str, Edit, str]] = [
    ("few-nulls", USAGE, lambda d: empty_share(d, "skips_7d", 0.02), "usage_agg_30d.skips_7d: 3 of 120 rows are empty"),
    ("half-null-with-default", PAYMENTS, lambda d: empty_share(d, "failed_payments_90d", 0.5),
     "payments_agg_90d.failed_payments_90d: 61 of 120 rows are empty (50.8%); 0.0 stands in"),
    ("constant", USAGE, lambda d: d.assign(skips_7d="4"), "usage_agg_30d.skips_7d: constant, every row is 4"),
    ("few-absent", USAGE, lambda d: d[2:], "usage_agg_30d: 2 of 120 users of subscriptions have no row"),
    ("half-absent-with-defaults", SUPPORT, lambda d: d[60:], "support_agg_90d: 60 of 120 users of subscriptions"),
    ("few-strangers", USAGE, lambda d: strangers(d, 0.02), "not in subscriptions (1.7%); left out"),
    ("few-labels-absent", "labels", lambda d: d[2:], "labels: 2 of 120 users of subscriptions have no row"),
    ("paid-too-much", SUBSCRIPTIONS, lambda d: d.assign(total_paid="99999"),
     "far from months_active times monthly_fee"),
    ("signed-up-later", "users", lambda d: d.assign(signup_date="2024-03-05"), "120 rows are later than the snapshot"),
    ("plan-without-internet", SUBSCRIPTIONS, lambda d: d.assign(net_service="No").replace("", "true"),
     "rows have a value although net_service is No"),
]  # fmt: skip


@pytest.mark.parametrize("name, table, change, warning", WARNED, ids=[case[0] for case in WARNED])
def test_what_is_odd_is_taken_with_a_warning(
    home: Settings, delivery: Path, name: str, table: str, change: Edit, warning: str
):
    edit(delivery, table, change)
    result = take(home, delivery)
    assert result.result == "ingested"
    assert any(warning in text for text in result.warnings), result.warnings
    assert Snapshots(home.snapshots).report(FEBRUARY)["warnings"] == list(result.warnings)


def test_rows_of_strangers_are_not_stored(home: Settings, delivery: Path):
    edit(delivery, USAGE, lambda d: strangers(d, 0.02))
    result = take(home, delivery)
    store = Snapshots(home.snapshots)
    assert result.rows[USAGE] == USERS - 2
    assert set(store.read(USAGE, FEBRUARY).index) < set(store.read(SUBSCRIPTIONS, FEBRUARY).index)


def test_other_files_are_ignored_with_a_warning(home: Settings, delivery: Path):
    (delivery / "notes.txt").write_text("hello")
    (delivery / ".DS_Store").write_text("")
    assert [w.split(":")[0] for w in take(home, delivery).warnings] == ["notes.txt"]


def test_max_missing_share_is_the_setting(home: Settings, delivery: Path):
    edit(delivery, USAGE, lambda d: empty_share(d, "skips_7d", 0.2))
    lenient = Settings(home=home.home, max_missing_share=0.3)
    assert take(lenient, delivery).result == "ingested"


# --- again, corrected, labels ---------------------------------------------------------------------------


def drop_labels(folder: Path) -> None:
    (folder / "labels.csv").unlink()


def only_labels(folder: Path) -> None:
    for path in folder.iterdir():
        if path.stem != "labels":
            path.unlink()


def test_the_same_day_twice_is_unchanged_and_untouched(home: Settings, delivery: Path):
    first = take(home, delivery)
    before = state(home.snapshots)
    again = ingest(home, delivery, as_of=FEBRUARY, now=NOW.replace(hour=9))
    assert (again.result, again.fingerprint) == ("unchanged", first.fingerprint)
    assert state(home.snapshots) == before


def test_corrected_data_replaces_the_old(home: Settings, delivery: Path):
    first = take(home, delivery)
    edit(delivery, USAGE, lambda d: d.assign(skips_7d=["77", *d["skips_7d"][1:]]))
    again = take(home, delivery)
    assert again.result == "replaced"
    assert again.fingerprint != first.fingerprint
    assert (Snapshots(home.snapshots).read(USAGE, FEBRUARY)["skips_7d"] == 77).sum() == 1


def test_labels_may_come_later_with_everything(home: Settings, months: tuple[Path, Path], delivery: Path):
    drop_labels(delivery)
    assert take(home, delivery).result == "ingested"
    assert not Snapshots(home.snapshots).has_labels(FEBRUARY)
    result = take(home, months[1])
    assert result.result == "completed_labels"
    assert Snapshots(home.snapshots).has_labels(FEBRUARY)


def test_labels_may_come_later_alone(home: Settings, months: tuple[Path, Path], delivery: Path, tmp_path: Path):
    """The result is the same as if everything had come at once."""
    drop_labels(delivery)
    take(home, delivery)
    alone = Path(shutil.copytree(months[1], tmp_path / "alone"))
    only_labels(alone)
    result = take(home, alone)
    assert result.result == "completed_labels"
    assert result.fingerprint == take(Settings(home=tmp_path / "other"), months[1]).fingerprint
    assert take(home, alone).result == "unchanged"

    edit(alone, "labels", lambda d: d.replace({"true": "false", "false": "true"}))
    assert take(home, alone).result == "replaced"


def test_labels_of_other_users_are_refused(home: Settings, months: tuple[Path, Path], delivery: Path, tmp_path: Path):
    drop_labels(delivery)
    take(home, delivery)
    alone = Path(shutil.copytree(months[1], tmp_path / "alone"))
    only_labels(alone)
    edit(alone, "labels", strangers)
    before = state(home.snapshots)
    with pytest.raises(SnapshotRefused) as refused:
        take(home, alone)
    assert {f.rule for f in refused.value.findings} == {"unknown_users", "absent_rows"}
    assert state(home.snapshots) == before


def test_a_correction_without_labels_keeps_those_stored(home: Settings, delivery: Path):
    take(home, delivery)
    labels = Snapshots(home.snapshots).read("labels", FEBRUARY)
    drop_labels(delivery)
    assert take(home, delivery).result == "unchanged"
    edit(delivery, USAGE, lambda d: d.assign(skips_7d="4"))
    result = take(home, delivery)
    assert result.result == "replaced"
    assert any("stored ones of 2024-02-29 are kept" in warning for warning in result.warnings)
    pd.testing.assert_frame_equal(Snapshots(home.snapshots).read("labels", FEBRUARY), labels)


def test_today_is_not_the_future(home: Settings, delivery: Path):
    noon = datetime(2024, 2, 29, 12, tzinfo=UTC)
    assert ingest(home, delivery, as_of=FEBRUARY, now=noon).result == "ingested"


def test_a_dry_run_says_the_result_and_stores_nothing(home: Settings, delivery: Path):
    would = take(home, delivery, dry_run=True)
    assert would.dry_run and would.result == "ingested"
    assert not home.home.exists()
    did = take(home, delivery)
    assert (did.rows, did.fingerprint) == (would.rows, would.fingerprint)
    before = state(home.home)
    assert take(home, delivery, dry_run=True).result == "unchanged"
    drop_labels(delivery)
    edit(delivery, USAGE, lambda d: d.assign(skips_7d="4"))
    assert take(home, delivery, dry_run=True).result == "replaced"
    assert state(home.home) == before


# --- the source -----------------------------------------------------------------------------------------


@pytest.fixture
def source(months: tuple[Path, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for path in months:
        shutil.copytree(path, folder / path.name)
    (folder / "archive").mkdir()
    return folder


def test_the_source_is_taken_oldest_first_and_once(home: Settings, source: Path, monkeypatch: pytest.MonkeyPatch):
    settings_ = Settings(home=home.home, snapshots_source=source)
    assert [(r.day, r.result) for r in ingest_source(settings_, now=NOW)] == [
        (JANUARY, "ingested"), (FEBRUARY, "ingested"),
    ]  # fmt: skip
    monkeypatch.setattr(ingest_module, "read_as_text", None)  # nothing is read again
    assert ingest_source(settings_, now=NOW) == []


def test_the_source_is_looked_at_again_when_a_file_changes(home: Settings, source: Path):
    settings_ = Settings(home=home.home, snapshots_source=source)
    labels = (source / "2024-02-29" / "labels.csv").read_bytes()
    drop_labels(source / "2024-02-29")
    ingest_source(settings_, now=NOW)
    (source / "2024-02-29" / "labels.csv").write_bytes(labels)
    assert [(r.day, r.result) for r in ingest_source(settings_, now=NOW)] == [(FEBRUARY, "completed_labels")]


def test_a_bad_folder_of_the_source_does_not_hold_up_the_others(home: Settings, source: Path):
    settings_ = Settings(home=home.home, snapshots_source=source)
    edit(source / "2024-01-31", USAGE, lambda d: d.assign(skips_7d="-1"))
    with pytest.raises(DeliveriesRefused, match=r"snapshot 2024-01-31 in .* is refused") as refused:
        ingest_source(settings_, now=NOW)
    assert [r.day for r in refused.value.results] == [FEBRUARY]
    assert [(f.column, f.rule) for f in refused.value.findings] == [("skips_7d", "range")]
    assert Snapshots(home.snapshots).days() == [FEBRUARY]


def test_a_source_that_is_not_there_is_said(home: Settings, tmp_path: Path):
    with pytest.raises(ValueError, match="CHURN_SNAPSHOTS_SOURCE is not set"):
        ingest_source(home, now=NOW)
    with pytest.raises(FileNotFoundError, match=r"CHURN_SNAPSHOTS_SOURCE is .*nowhere, which does not exist"):
        ingest_source(Settings(home=home.home, snapshots_source=tmp_path / "nowhere"), now=NOW)


# --- properties -----------------------------------------------------------------------------------------

FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(
    fees=st.lists(st.floats(0, 100_000), min_size=USERS, max_size=USERS),
    skips=st.lists(st.integers(0, 100_000), min_size=USERS, max_size=USERS),
)
def test_numbers_come_back_to_the_last_digit(
    months: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, fees: list[float], skips: list[int]
):
    folder = tmp_path_factory.mktemp("numbers")
    shutil.copytree(months[1], folder / "in")
    edit(folder / "in", SUBSCRIPTIONS, lambda d: d.assign(monthly_fee=[repr(fee) for fee in fees]))
    edit(folder / "in", USAGE, lambda d: d.assign(skips_7d=skips))
    home = Settings(home=folder / "home")
    take(home, folder / "in")

    users = pd.read_csv(folder / "in" / "subscriptions.csv")["user_id"]
    store = Snapshots(home.snapshots)
    assert store.read(SUBSCRIPTIONS, FEBRUARY)["monthly_fee"].loc[users].tolist() == fees
    assert store.read(USAGE, FEBRUARY)["skips_7d"].loc[users].tolist() == skips


@settings(FEW, max_examples=20)
@given(
    where=st.sampled_from([(t.name, c) for t in TABLES.values() for c in ["user_id", *(x.name for x in t.columns)]]),
    text=st.one_of(st.text(max_size=12), st.sampled_from(["1e5", "-0", "0" * 40, '"', "\r", "\ufeff", "None"])),
)
def test_whatever_a_cell_says_it_is_taken_or_refused(
    stored: Settings, months: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory,
    where: tuple[str, str], text: str,
):  # fmt: skip
    folder = Path(shutil.copytree(months[1], tmp_path_factory.mktemp("any") / "in"))
    table, column_name = where

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[4, column_name] = text.encode("utf-8", "replace").decode()
        return frame

    edit(folder, table, change)
    try:
        assert take(stored, folder, dry_run=True).rows[table] >= USERS - 1
    except SnapshotRefused as refused:
        assert {f.table for f in refused.findings} <= set(TABLES)
