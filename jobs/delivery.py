"""Read a delivered file, CSV or Parquet, as text: strictly, within limits, and with the line that is wrong.

Text, because a report that refuses a snapshot must quote what was found; `jobs.ingest` turns it into types.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".csv", ".parquet")
MAX_BYTES = 4 * 1024**3  # of one file, uncompressed
MAX_ROWS = 20_000_000
EXAMPLES = 5  # wrong lines that are shown


class Unreadable(Exception):
    """The file is not one that can be read: `rule` names the reason, the message says what was found and expected."""

    def __init__(self, rule: str, message: str, count: int = 1) -> None:
        self.rule = rule
        self.count = count
        super().__init__(message)


def read_as_text(path: Path) -> pa.Table:
    """Every cell of a CSV or Parquet file as text, nulls as null or empty text; raises Unreadable."""
    if not path.is_file():  # a pipe would keep us waiting for ever
        raise Unreadable("unreadable", f"{path.name} is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise Unreadable("empty_file", f"{path.name} has no bytes; expected a header and rows")
    if size > MAX_BYTES:
        raise Unreadable("too_large", f"{path.name} has {size:,} bytes; at most {MAX_BYTES:,}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic[:2] in {b"\x1f\x8b", b"PK"} or magic == b"\x28\xb5\x2f\xfd":
        raise Unreadable("compressed", f"{path.name} is compressed; expected it unpacked")
    return _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)


def _read_csv(path: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    _check_bytes(path)
    header = _header(path)
    ragged: dict[int, int] = {}

    def on_wrong_row(row: Any) -> str:
        ragged[row.number] = row.actual_columns
        return "skip"

    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False, block_size=8 * 1024**2),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=on_wrong_row),
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        raise Unreadable("unreadable", f"{path.name} is not CSV: {str(error).splitlines()[0]}") from None
    if ragged:
        lines = _lines(path, list(ragged)[:EXAMPLES])
        shown = ", ".join(f"line {line} has {ragged[row]}" for row, line in lines.items())
        message = f"{len(ragged)} rows have not the {len(header)} cells of the header: {shown}"
        raise Unreadable("ragged_row", message, len(ragged))
    return _as_text(path, table)


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        while line := file.readline(65_536):
            if line.strip():
                return next(csv.reader([line]))
    raise Unreadable("empty_file", f"{path.name} has only blank lines; expected a header and rows")


def _lines(path: Path, rows: Sequence[int]) -> dict[int, int]:
    """Row numbers, which count no blank lines, as the line numbers an editor shows."""
    lines: dict[int, int] = {}
    row = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row += bool(line.strip())
            if row in rows:
                lines.setdefault(row, number)
            if len(lines) == len(rows):
                break
    return lines


def _check_bytes(path: Path) -> None:
    """Refuse what is not UTF-8 text, with the line it begins in."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(8 * 1024**2)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += chunk.count(b"\n", 0, error.start)
                raise Unreadable(
                    "encoding",
                    f"{path.name} is not UTF-8 in line {line}; save it as UTF-8 "
                    "(a BOM is fine), not as latin-1 or UTF-16",
                ) from None
            if (nul := chunk.find(b"\0")) >= 0:
                line += chunk.count(b"\n", 0, nul)
                raise Unreadable("nul_byte", f"{path.name} has a NUL byte in line {line}; expected text")
            if not chunk:
                return
            line += chunk.count(b"\n")


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_parquet_size(path, file)
            return _as_text(path, file.read())
    except (pa.ArrowException, OSError) as error:
        raise Unreadable(
            "unreadable", f"{path.name} is not a whole Parquet file: {str(error).splitlines()[0]}"
        ) from None


def _check_parquet_size(path: Path, file: Any) -> None:
    """Sizes are in the footer, so that a small file that unpacks to a huge one is refused unread."""
    meta = file.metadata
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if size > MAX_BYTES:
        raise Unreadable("too_large", f"{path.name} unpacks to {size:,} bytes; at most {MAX_BYTES:,}")
    if meta.num_rows > MAX_ROWS:
        raise Unreadable("too_large", f"{path.name} has {meta.num_rows:,} rows; at most {MAX_ROWS:,}")


def _as_text(path: Path, table: pa.Table) -> pa.Table:
    import pyarrow as pa

    columns = []
    for name in table.column_names:
        column = table.column(table.column_names.index(name))
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise Unreadable("unreadable", f"{path.name}: column {name} holds {column.type}; expected plain values")
        columns.append(column.cast(pa.string()))
    return pa.Table.from_arrays(columns, names=table.column_names)
