"""Take a delivered snapshot into the store, or refuse it and say why.

Nothing else sees a snapshot before it went through here. A delivery is a folder with one CSV or Parquet
file a table. Every cell is read as text first, so that a refusal can quote what was found, and is then
turned into its type by rules stricter than any reader's guess; pandera checks the values. All findings
are collected before refusing, and a refused snapshot leaves no trace. What is odd but usable (a constant
column, dates that disagree, a few missing values) is stored with a warning.

Outcomes that are easy to get wrong, each on purpose:
- labels may be absent, or come alone later; a corrected delivery without labels keeps those stored;
- a row of a user who is not in `subscriptions` is left out (warning), too many of them refuse;
- a null where `null_category` is set means that category; in `plan_stream_*` only without internet service;
- a column with a default may be missing in any number of rows, but not in all.

Knowingly simple: a delivery is taken as complete when its folder has its name, so whoever delivers
writes to another name and renames.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from feature_repo.columns import ENTITY, POPULATION, TABLES, Column, Table
from jobs.delivery import SUFFIXES, Unreadable, read_as_text
from jobs.settings import Settings
from jobs.snapshots import LABELS, Snapshots, as_day, fingerprint_of
from jobs.sources import arrived

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    Mask = np.ndarray[Any, Any]  # one bool a row

Examples = Sequence[tuple[str, str]]  # user_id, value

log = logging.getLogger(__name__)

MIN_USERS = 10  # fewer is a test file or a broken export, not a month of users
MAX_TEXT = 128  # characters of a user_id or of an open category
EXAMPLES = 5
SIMULATED = "simulated.json"  # in `home`: which days bootstrap has made up

_NULLS = ("", "na", "nan", "null")
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet that opens our CSV of users to call would run it
_NO_INTERNET = ("net_service", "No")
_OLDEST = "1900-01-01"

Result = Literal["ingested", "unchanged", "replaced", "completed_labels"]


@dataclass(frozen=True)
class Finding:
    """One reason to refuse: where, which rule, how often, and up to five (user_id, value) it was seen in."""

    table: str
    column: str
    rule: str
    count: int
    message: str  # what was found, and what would be right
    examples: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        where = f"{self.table}.{self.column}" if self.column else self.table
        shown = ", ".join(f"{_short(value)} (user {_short(user)})" for user, value in self.examples)
        return f"{where}: {self.rule}: {self.message}" + (f"; for example {shown}" if shown else "")


class SnapshotRefused(ValueError):
    """The delivery breaks rules; `findings` has all of them, str() is a report with a line for each."""

    def __init__(self, day: date, folder: Path, findings: Sequence[Finding]) -> None:
        self.day = day
        self.folder = folder
        self.findings = list(findings)
        noun = "finding" if len(self.findings) == 1 else "findings"
        head = f"snapshot {day} in {folder} is refused, nothing was stored; {len(self.findings)} {noun}:"
        super().__init__("\n  ".join([head, *map(str, self.findings)]))


class DeliveriesRefused(ValueError):
    """Some of the source's folders were refused; the others are stored, see `results`."""

    def __init__(self, refusals: Sequence[SnapshotRefused], results: Sequence[IngestResult]) -> None:
        self.refusals = list(refusals)
        self.results = list(results)
        self.findings = [finding for refusal in refusals for finding in refusal.findings]
        super().__init__("\n".join(map(str, refusals)))


@dataclass(frozen=True)
class IngestResult:
    """What became of a delivery; with `dry_run`, what would have."""

    day: date
    result: Result
    rows: dict[str, int]
    warnings: tuple[str, ...]
    fingerprint: str
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The result in plain values, for --json."""
        return {**asdict(self), "day": self.day.isoformat(), "warnings": list(self.warnings)}


def ingest(settings: Settings, folder: Path, *, as_of: date, now: datetime, dry_run: bool = False) -> IngestResult:
    """Store the delivery in `folder` as the snapshot of `as_of`, or raise SnapshotRefused with every finding.

    The same content again is `unchanged`; other content for a stored day is `replaced`; labels that come
    later, alone or with the same features, are `completed_labels`.
    """
    log.info("ingest folder=%s as_of=%s dry_run=%s", folder, as_of, dry_run)
    store = Snapshots(settings.snapshots)
    if not dry_run:
        store.recover()
    delivery = _Delivery(folder, as_of, settings.max_missing_share)
    source = _signature(folder)  # before reading: what changes meanwhile is looked at again next time
    if as_of > now.astimezone(UTC).date():
        today = now.astimezone(UTC).date()
        message = f"as_of is {as_of}, which is in the future; expected {today} or earlier"
        delivery.find("snapshot", "", "future", message)
    labels_only = set(delivery.files) == {LABELS}
    if labels_only and as_of not in store.days():
        have = ", ".join(map(str, store.days()[-3:])) or "none"
        message = f"labels alone, but {as_of} is not stored (stored: {have}); deliver its other tables too"
        delivery.find(LABELS, "", "unknown_day", message)
    delivery.check(expected=(LABELS,) if labels_only else tuple(TABLES))
    delivery.refuse_if_found()

    with nullcontext() if dry_run else store.lock():
        stored = as_of in store.days()
        if labels_only:
            delivery.population = store.read(POPULATION, as_of).index
            delivery.relate(LABELS)
            kept = {name: store.read(name, as_of) for name in store.tables(as_of) if name != LABELS}
        elif stored and store.has_labels(as_of) and LABELS not in delivery.frames:
            delivery.frames[LABELS] = store.read(LABELS, as_of)
            delivery.relate(LABELS)
            delivery.warnings.append(f"labels: not delivered; the stored ones of {as_of} are kept")
            kept = {}
        else:
            kept = {}
        delivery.refuse_if_found()
        tables = {**kept, **delivery.frames}
        result = _outcome(store, as_of, tables)
        if not dry_run and result != "unchanged":
            store.write(
                as_of,
                tables,
                {"warnings": delivery.warnings, "ingested_at": now.isoformat(), "source": source},
            )
    rows = {name: len(frame) for name, frame in tables.items()}
    for warning in delivery.warnings:
        log.warning("snapshot %s: %s", as_of, warning)
    log.info("as_of=%s result=%s users=%s warnings=%s", as_of, result, rows[POPULATION], len(delivery.warnings))
    return IngestResult(as_of, result, rows, tuple(delivery.warnings), fingerprint_of(tables, as_of), dry_run)


def simulated_days(settings: Settings) -> list[date]:
    """The days of made-up users that bootstrap has put, or begun to put, among the snapshots."""
    with suppress(FileNotFoundError):
        return [date.fromisoformat(day) for day in json.loads((settings.home / SIMULATED).read_text())["days"]]
    return []


def refuse_simulated(settings: Settings) -> None:
    """Raise SimulatedData if people's snapshots are to be mixed with made-up ones: the newer would hide the older."""
    days = simulated_days(settings)
    if days and settings.snapshots_source:
        raise SimulatedData(
            f"{settings.snapshots_source} is not ingested: this release was tried out with made-up users "
            f"({days[0]} to {days[-1]}), and its model knows no others. Begin anew: uninstall it, delete its claims "
            "and its Secret (the uninstall names them), install it with snapshots.source; or use another release name"
        )


class SimulatedData(RuntimeError):
    """The snapshots that are there are made up, and real ones were to join them."""


def ingest_source(settings: Settings, *, now: datetime) -> list[IngestResult]:
    """Ingest every new or changed YYYY-MM-DD folder of `snapshots_source`, oldest first; a URL is copied before.

    A folder whose files have the sizes and times they had when it was stored is not read. Good folders
    are stored even when others are refused; DeliveriesRefused then tells of those at the end.
    """
    if settings.snapshots_source is None:
        raise ValueError("CHURN_SNAPSHOTS_SOURCE is not set; expected the folder or URL where snapshots arrive")
    refuse_simulated(settings)
    with arrived(settings.snapshots_source, settings.home.resolve()) as source:
        if source.is_relative_to(settings.home.resolve()):
            source.mkdir(parents=True, exist_ok=True)  # a new volume: nothing has arrived yet
        _require_folder(source, "CHURN_SNAPSHOTS_SOURCE")
        return _ingest_folders(settings, source, now)


def _ingest_folders(settings: Settings, source: Path, now: datetime) -> list[IngestResult]:
    store = Snapshots(settings.snapshots)
    store.recover()
    results: list[IngestResult] = []
    refusals: list[SnapshotRefused] = []
    for folder in sorted(source.iterdir()):
        day = as_day(folder.name)
        if day is None or not folder.is_dir():
            if not folder.name.startswith("."):
                log.warning("%s is skipped: expected folders named YYYY-MM-DD", folder)
            continue
        if store.report(day).get("source") == _signature(folder):
            continue
        try:
            results.append(ingest(settings, folder, as_of=day, now=now))
            log.info("ingested %s: %s", day, results[-1].result)
        except SnapshotRefused as refusal:
            refusals.append(refusal)
    if refusals:
        raise DeliveriesRefused(refusals, results)
    return results


def _outcome(store: Snapshots, day: date, tables: Mapping[str, pd.DataFrame]) -> Result:
    if day not in store.days():
        return "ingested"
    had_labels = store.has_labels(day)
    features = {name: frame for name, frame in tables.items() if name != LABELS}
    if not store.holds(day, features):
        return "replaced"
    if had_labels:
        return "unchanged" if store.holds(day, tables) else "replaced"
    return "completed_labels" if LABELS in tables else "unchanged"


def _signature(folder: Path) -> dict[str, list[int]]:
    """Size and time of each table's file: whether a delivery may have changed since it was read."""
    paths = (folder / f"{name}{suffix}" for name in TABLES for suffix in SUFFIXES)
    return {p.name: [s.st_size, s.st_mtime_ns] for p in paths if p.is_file() and (s := p.stat())}


def _require_folder(path: Path, what: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{what} is {path}, which does not exist; expected a folder of snapshot files")
    if not path.is_dir():
        raise NotADirectoryError(f"{what} is {path}, which is a file; expected the folder that holds it")


def _short(text: str) -> str:
    """Text as a report may show it: quoted, nothing unprintable, not long."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


# --- one delivery: what was read, found and warned of --------------------


class _Delivery:
    """The files of one folder on their way to frames, and what was found on it."""

    def __init__(self, folder: Path, day: date, max_missing_share: float) -> None:
        _require_folder(folder, "the snapshot folder")
        self.folder = folder
        self.day = day
        self.max_share = max_missing_share
        self.findings: list[Finding] = []
        self.warnings: list[str] = []
        self.frames: dict[str, pd.DataFrame] = {}
        self.population: pd.Index[Any] | None = None
        self.files = self._files()

    def find(
        self, table: str, column: str, rule: str, message: str, *, count: int = 1, examples: Examples = ()
    ) -> None:
        self.findings.append(Finding(table, column, rule, int(count), message, tuple(examples)))

    def refuse_if_found(self) -> None:
        if self.findings:
            raise SnapshotRefused(self.day, self.folder, self.findings)

    def check(self, expected: tuple[str, ...]) -> None:
        """Read and check each table, then how they fit together."""
        for name in expected:
            if name in self.files:
                self._check_table(TABLES[name])
            elif name != LABELS:
                self.find(name, "", "missing_file", f"no {name}.csv or {name}.parquet{self._hint(name)}")
        if POPULATION in self.frames:
            self.population = self.frames[POPULATION].index
            for name in list(self.frames):
                if name != POPULATION:
                    self.relate(name)
            self.warnings += _odd_relations(self.frames, self.day)

    def relate(self, name: str) -> None:
        """Compare a table's users with the population; rows of others are left out of the frame."""
        assert self.population is not None  # noqa: S101  the callers have it
        frame, population = self.frames[name], self.population
        strangers = frame.index.difference(population)
        absent = population.difference(frame.index)
        optional = all(column.default is not None for column in TABLES[name].columns)
        for rule, users, of, what in (
            (
                "unknown_users",
                strangers,
                len(frame),
                f"rows of {name} have a user who is not in {POPULATION}",
            ),
            ("absent_rows", absent, len(population), f"users of {POPULATION} have no row in {name}"),
        ):
            if not len(users):
                continue
            share = len(users) / of
            message = f"{len(users)} of {of} {what} ({share:.1%})"
            if share > self.max_share and not (optional and rule == "absent_rows"):
                message += f"; expected at most {self.max_share:.1%}"
                examples = [(str(user), "") for user in users[:EXAMPLES]]
                self.find(name, ENTITY, rule, message, count=len(users), examples=examples)
            else:
                self.warnings.append(f"{name}: {message}" + "; left out" * (rule == "unknown_users"))
        self.frames[name] = frame.loc[frame.index.intersection(population).sort_values()]

    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.stem not in TABLES or path.suffix not in SUFFIXES:
                self.warnings.append(f"{path.name}: ignored; a snapshot has files of {', '.join(TABLES)}")
            elif path.stem in files:
                message = f"both {files[path.stem].name} and {path.name} are there; expected one of them"
                self.find(path.stem, "", "two_files", message, count=2)
            else:
                files[path.stem] = path
        return files

    def _hint(self, name: str) -> str:
        others = [p.name for p in self.folder.iterdir() if p.stem not in TABLES or p.suffix not in SUFFIXES]
        near = [o for o in others if o.lower().startswith(f"{name}.")] or difflib.get_close_matches(name, others, 1)
        return f"; {near[0]} is not read, expected uncompressed and exactly that name" if near else ""

    def _check_table(self, table: Table) -> None:
        before = len(self.findings)
        try:
            raw = read_as_text(self.files[table.name])
        except Unreadable as error:
            self.find(table.name, "", error.rule, str(error), count=error.count)
            return
        except OSError as error:
            message = f"{self.files[table.name].name} cannot be read: {error.strerror or error}"
            self.find(table.name, "", "unreadable", message)
            return
        columns = self._check_header(table, raw)
        if not raw.num_rows:
            self.find(table.name, "", "no_rows", "a header and no rows; expected a row for each user")
        elif table.name == POPULATION and raw.num_rows < MIN_USERS:
            message = f"{raw.num_rows} users; expected at least {MIN_USERS}"
            self.find(table.name, "", "minimum_rows", message, count=raw.num_rows)
        if raw.num_rows and raw.column_names.count(ENTITY) == 1:
            frame = self._check_values(table, columns, raw)
            if len(self.findings) == before:
                self.frames[table.name] = frame

    def _check_header(self, table: Table, raw: pa.Table) -> tuple[Column, ...]:
        header = raw.column_names
        names = [ENTITY, *(column.name for column in table.columns)]
        for name in dict.fromkeys(header):
            if header.count(name) > 1:
                message = f"{header.count(name)} columns have this name; expected one"
                self.find(table.name, name, "duplicate_column", message, count=header.count(name))
            if name not in names:
                near = difflib.get_close_matches(name.strip().lower(), names, 1)
                message = f"not a column of this table{f', is it {near[0]}?' if near else ''}"
                self.find(table.name, name, "extra_column", f"{message}; expected {', '.join(names)}")
        for name in names:
            if name not in header:
                hint = "; no comma in the header, which separates columns" if len(header) == 1 else ""
                self.find(table.name, name, "missing_column", f"the column is not there{hint}")
        return tuple(column for column in table.columns if header.count(column.name) == 1)

    def _check_values(self, table: Table, columns: tuple[Column, ...], raw: pa.Table) -> pd.DataFrame:
        import pandas as pd

        frame = pd.DataFrame({ENTITY: raw.column(ENTITY).to_pandas().astype("string")})
        missing: dict[str, Mask] = {}
        for column in columns:
            frame[column.name], missing[column.name], wrong = _typed(column, raw.column(column.name))
            for rule, mask in wrong.items():
                self._find_cells(table, column.name, rule, mask, raw)
            if column.null_category is None:
                self._check_missing(table, column, missing[column.name], raw)
        for name, rule, mask in _broken_rules(columns, frame):
            self._find_cells(table, name, rule, mask, raw)
        for column in columns:
            values = frame[column.name]
            if column.null_category is not None:
                without = missing[column.name] | _equals(values, column.null_category)
                self._check_offline(table, column.name, without, frame, raw)
                frame[column.name] = values.mask(missing[column.name], column.null_category)
            elif table.role != "labels" and values.notna().all() and values.nunique() == 1:
                self.warnings.append(f"{table.name}.{column.name}: constant, every row is {values.iloc[0]}")
        return frame.astype({ENTITY: object}).set_index(ENTITY).sort_index()

    def _find_cells(self, table: Table, name: str, rule: str, mask: Mask, raw: pa.Table) -> None:
        rows = mask.nonzero()[0]
        if len(rows):
            users, text = raw.column(ENTITY), raw.column(name)
            examples = [(users[int(i)].as_py() or "", text[int(i)].as_py() or "") for i in rows[:EXAMPLES]]
            message = f"{len(rows)} of {len(mask)} rows; expected {_expected(table, name, rule)}"
            self.find(table.name, name, rule, message, count=len(rows), examples=examples)

    def _check_missing(self, table: Table, column: Column, missing: Mask, raw: pa.Table) -> None:
        count, rows = int(missing.sum()), len(missing)
        found = f"{count} of {rows} rows are empty ({count / rows:.1%})"
        if count == rows:
            self.find(table.name, column.name, "all_null", f"{found}; expected values", count=count)
        elif count > self.max_share * rows and column.default is None:
            users = raw.column(ENTITY)
            examples = [(users[int(i)].as_py() or "", "") for i in missing.nonzero()[0][:EXAMPLES]]
            message = f"{found}; expected at most {self.max_share:.1%}"
            self.find(table.name, column.name, "missing_share", message, count=count, examples=examples)
        elif count:
            stands_in = "" if column.default is None else f"; {column.default} stands in"
            self.warnings.append(f"{table.name}.{column.name}: {found}{stands_in}")

    def _check_offline(self, table: Table, name: str, without: Mask, frame: pd.DataFrame, raw: pa.Table) -> None:
        """Having none of a service needs a reason: no internet."""
        service, no = _NO_INTERNET
        if service not in frame:
            return
        offline = _equals(frame[service], no)
        known = next(c.categories or () for c in table.columns if c.name == service)
        online = frame[service].isin(known).to_numpy(bool) & ~offline
        self._find_cells(table, name, "null", without & online, raw)
        if odd := int((offline & ~without).sum()):
            self.warnings.append(f"{table.name}.{name}: {odd} rows have a value although {service} is {no}")


def _equals(values: pd.Series[Any], word: str) -> Mask:
    return (values == word).fillna(False).to_numpy(bool)


def _expected(table: Table, name: str, rule: str) -> str:
    column = next((c for c in table.columns if c.name == name), None)
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "date": "a day, YYYY-MM-DD",
    }
    if rule == "range" and column and column.kind == "date":
        return f"{_OLDEST} or later"
    if rule in {"type", "range", "finite"} and column:
        bounds = f" from {column.low:g} to {column.high:g}" if column.kind in {"int", "float"} else ""
        return f"{kinds.get(column.kind, 'text')}{bounds}"
    if rule == "category" and column and column.categories:
        return f"one of {', '.join(column.categories)}"
    return {
        "duplicate_user": "one row a user",
        "user_id": f"1 to {MAX_TEXT} printable characters, no space at the ends, not beginning with __",
        "text": f"at most {MAX_TEXT} printable characters",
        "formula": "text that does not begin with = + - @ or a tab, which spreadsheets run as a formula",
        "null": f"a value, because only {_NO_INTERNET[0]} {_NO_INTERNET[1]} has none",
    }.get(rule, "another value")


# --- values: text to types, then pandera --------------------


def _typed(column: Column, text: pa.Array) -> tuple[pd.Series[Any], Mask, dict[str, Mask]]:
    """The column's values, which rows are null, and by rule the rows whose text is not of its type."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    def flags(array: Any) -> Mask:
        return np.asarray(pc.fill_null(array, False).to_numpy(zero_copy_only=False), dtype=bool)

    lower = pc.utf8_lower(text)
    null = flags(pc.is_in(lower, value_set=pa.array(_NULLS))) | ~flags(pc.is_valid(text))
    wrong: dict[str, Mask] = {}
    if column.kind == "int":
        fits = flags(pc.match_substring_regex(text, r"^-?\d{1,18}(\.0+)?$")) & ~null
        whole = pc.replace_substring_regex(text, r"\.0+$", "")
        values = _where(fits, whole, pa.int64()).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    elif column.kind == "float":
        number = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?$"
        fits = flags(pc.match_substring_regex(text, number)) & ~null
        infinite = flags(pc.match_substring_regex(lower, r"^[+-]?inf(inity)?$"))
        values = _where(fits, pc.replace_substring_regex(text, r"^\+", ""), pa.float64()).to_pandas()
        wrong["finite"] = infinite | np.isinf(values.to_numpy())
        fits |= infinite
        values = values.astype("float64").mask(wrong["finite"])
    elif column.kind == "bool":
        true, false = (flags(pc.is_in(lower, value_set=pa.array(words))) for words in (_TRUE, _FALSE))
        fits = true | false
        values = pd.Series(pd.arrays.BooleanArray(true, ~fits))
    elif column.kind == "date":
        fits = flags(pc.match_substring_regex(text, r"^\d{4}-\d\d-\d\d([ T]00:00(:00(\.0+)?)?)?$")) & ~null
        days = _where(fits, pc.utf8_slice_codeunits(text, 0, 10), pa.string()).to_pandas()
        values = pd.to_datetime(days, format="%Y-%m-%d", errors="coerce").astype("datetime64[s]")
        fits &= values.notna().to_numpy()
    else:
        fits = ~null
        folded = lower if column.categories and all(c == c.lower() for c in column.categories) else text
        values = _where(fits, folded, pa.string()).to_pandas().astype("string")
    wrong["type"] = ~fits & ~null
    return values, null, wrong


def _where(keep: Mask, text: pa.Array, kind: Any) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.if_else(pa.array(keep), text, pa.scalar(None, pa.string())).cast(kind)


def _broken_rules(columns: tuple[Column, ...], frame: pd.DataFrame) -> Iterator[tuple[str, str, Mask]]:
    """Column, rule and rows of whatever pandera finds wrong."""
    import numpy as np
    import pandera.errors
    import pandera.pandas as pa

    rules = {ENTITY: pa.Column("string", _user_checks(), nullable=True)}
    rules |= {column.name: _pandera_column(column) for column in columns}
    try:
        pa.DataFrameSchema(rules, strict=True).validate(frame, lazy=True)
    except pandera.errors.SchemaErrors as errors:
        cases = errors.failure_cases
        for (name, rule), rows in cases.groupby(["column", "check"], sort=False)["index"]:
            if rows.isna().any():  # a rule about the frame, not about cells: our own mistake, not the delivery's
                raise errors from None
            mask = np.zeros(len(frame), dtype=bool)
            mask[rows.to_numpy(dtype=int)] = True
            yield str(name), str(rule), mask


def _pandera_column(column: Column) -> Any:
    import pandas as pd
    import pandera.pandas as pa

    dtype = {
        "int": "Int64",
        "float": "float64",
        "bool": "boolean",
        "category": "string",
        "date": "datetime64[s]",
    }
    checks: list[Any] = []
    if column.kind in {"int", "float"}:
        checks = [pa.Check.in_range(column.low, column.high, error="range")]
    elif column.kind == "date":
        checks = [pa.Check.ge(pd.Timestamp(_OLDEST), error="range")]
    elif column.categories:
        checks = [pa.Check.isin(column.categories, error="category")]
    elif column.kind == "category":
        checks = [
            pa.Check(_is_text, error="text", name="text"),
            pa.Check(_no_formula, error="formula", name="formula"),
        ]
    return pa.Column(dtype[column.kind], checks, nullable=True)


def _user_checks() -> list[Any]:
    import pandera.pandas as pa

    # nulls are looked at too: a user without an id is refused, not skipped
    return [
        pa.Check(_is_user, error="user_id", name="user_id", ignore_na=False),
        pa.Check(_no_formula, error="formula", name="formula"),
        pa.Check(lambda ids: ~ids.duplicated(keep=False), error="duplicate_user", name="duplicate_user"),
    ]


def _is_user(ids: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    def fits(text: object) -> bool:
        return (
            isinstance(text, str)
            and text.lower() not in _NULLS
            and len(text) <= MAX_TEXT
            and text.isprintable()
            and text == text.strip()
            and not text.startswith("__")
        )

    return pd.Series([fits(text) for text in ids.tolist()], index=ids.index, dtype=bool)


def _is_text(values: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    good = [len(text) <= MAX_TEXT and text.isprintable() for text in values.tolist()]
    return pd.Series(good, index=values.index, dtype=bool)


def _no_formula(values: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    good = [not text.startswith(_FORMULA) for text in values.tolist()]
    return pd.Series(good, index=values.index, dtype=bool)


def _odd_relations(frames: Mapping[str, pd.DataFrame], day: date) -> list[str]:
    """What is unlikely between columns, as warnings: such data trains, but someone should look."""
    import pandas as pd

    subscriptions = frames[POPULATION]
    months = subscriptions["months_active"].astype("float64")
    due = months * subscriptions["monthly_fee"]
    warnings = []
    far = ((subscriptions["total_paid"] - due).abs() > 0.5 * due + 3 * subscriptions["monthly_fee"]).mean()
    if far > 0.01:
        warnings.append(f"{POPULATION}.total_paid: {far:.1%} of rows are far from months_active times monthly_fee")
    if "users" in frames:
        signup = frames["users"]["signup_date"].reindex(subscriptions.index)
        since = (day.year - signup.dt.year) * 12 + (day.month - signup.dt.month)
        if (odd := ((since - months).abs() > 1).mean()) > 0.01:
            warnings.append(f"users.signup_date: in {odd:.1%} of rows it disagrees with months_active by over a month")
        if late := int((signup > pd.Timestamp(day)).sum()):
            warnings.append(f"users.signup_date: {late} rows are later than the snapshot")
    return warnings
