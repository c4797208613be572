"""The record of promotions: what was opened and closed, and the pin. At most one promotion is open."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from jobs.database import pins, promotions

if TYPE_CHECKING:
    from jobs.serving import Serving

GOOD = ("promoted", "rolled_back")  # results after which `to` is what should be served


@dataclass(frozen=True)
class Promotion:
    """One row of `promotions`; `id` is also its fence number."""

    id: int
    opened_at: datetime
    closed_at: datetime | None
    action: str
    from_version: int | None
    from_tag: str | None
    to_version: int
    to_tag: str | None
    result: str | None
    reason: str
    by: str


@dataclass(frozen=True)
class Pin:
    """What is served until unpinned, whatever the registry says."""

    version: int
    bento_tag: str
    reason: str
    by: str
    pinned_at: datetime


class History:
    """Reads and writes of `promotions` and `pins`."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    def _rows(self, query: sa.Select[Any]) -> list[Promotion]:
        with self.engine.connect() as connection:
            return [Promotion(**row._mapping) for row in connection.execute(query)]

    def open_row(self) -> Promotion | None:
        """The promotion under way, or left behind by a killed job."""
        rows = self._rows(sa.select(promotions).where(promotions.c.closed_at.is_(None)))
        return rows[0] if rows else None

    def last(self, *, good: bool = False) -> Promotion | None:
        """The last closed promotion; with `good`, the last that ended as it should."""
        query = sa.select(promotions).where(promotions.c.closed_at.is_not(None)).order_by(promotions.c.id.desc())
        if good:
            query = query.where(promotions.c.result.in_(GOOD))
        rows = self._rows(query.limit(1))
        return rows[0] if rows else None

    def has_served(self, tag: str) -> bool:
        """Whether a promotion of that tag ended well before."""
        query = sa.select(promotions).where(promotions.c.to_tag == tag, promotions.c.result.in_(GOOD))
        return bool(self._rows(query.limit(1)))

    def rows(self, limit: int = 50) -> list[Promotion]:
        """The newest promotions first."""
        return self._rows(sa.select(promotions).order_by(promotions.c.id.desc()).limit(limit))

    def newest_id(self) -> int:
        """The number of the newest promotion, 0 if there was none."""
        return max((row.id for row in self.rows(limit=1)), default=0)

    def interruptions(self) -> list[Promotion]:
        """The interrupted attempts at one version since anything else happened, newest first."""
        result: list[Promotion] = []
        for row in self.rows():
            if row.closed_at is None:
                continue
            if row.result != "interrupted" or (result and row.to_version != result[0].to_version):
                break
            result.append(row)
        return result

    def open(
        self,
        *,
        now: datetime,
        action: str,
        from_version: int | None,
        from_tag: str | None,
        to_version: int,
        to_tag: str | None,
        reason: str,
        by: str,
    ) -> Promotion:
        """Open a row; the database refuses a second open one."""
        with self.engine.begin() as connection:
            identity = connection.execute(
                promotions.insert().values(
                    opened_at=now,
                    action=action,
                    from_version=from_version,
                    from_tag=from_tag,
                    to_version=to_version,
                    to_tag=to_tag,
                    reason=reason,
                    by=by,
                )
            ).inserted_primary_key
        assert identity is not None  # noqa: S101  an insert of one row has one
        return self._rows(sa.select(promotions).where(promotions.c.id == identity[0]))[0]

    def adopt(self, *, fence: int, now: datetime, version: int, tag: str, reason: str, by: str) -> None:
        """Note as promotion number `fence` + 1 what serves, after a backup older than it was restored."""
        values = {"from_version": version, "from_tag": tag, "to_version": version, "to_tag": tag, "by": by}
        row = {
            "id": fence + 1,
            "opened_at": now,
            "closed_at": now,
            "action": "adopt",
            "result": "promoted",
            "reason": reason,
        }
        with self.engine.begin() as connection:
            connection.execute(promotions.insert().values(**row, **values))
            if self.engine.dialect.name == "postgresql":  # a number that was given does not move the sequence
                sequence = sa.func.pg_get_serial_sequence("promotions", "id")
                connection.execute(sa.select(sa.func.setval(sequence, fence + 1)))

    def set_target(self, row: Promotion, tag: str) -> None:
        """Note the tag that an open row leads to, once it is known."""
        with self.engine.begin() as connection:
            connection.execute(promotions.update().where(promotions.c.id == row.id).values(to_tag=tag))

    def close(self, row: Promotion, *, now: datetime, result: str, reason: str) -> None:
        """Close an open row, once."""
        query = promotions.update().where(promotions.c.id == row.id, promotions.c.closed_at.is_(None))
        with self.engine.begin() as connection:
            connection.execute(query.values(closed_at=now, result=result, reason=reason))

    def pin(self) -> Pin | None:
        """The pin, if there is one."""
        query = sa.select(pins.c.version, pins.c.bento_tag, pins.c.reason, pins.c.by, pins.c.pinned_at)
        with self.engine.connect() as connection:
            row = connection.execute(query).first()
        return Pin(**row._mapping) if row else None

    def set_pin(self, pin: Pin) -> None:
        """Pin, in place of any other pin."""
        values = {
            "version": pin.version,
            "bento_tag": pin.bento_tag,
            "reason": pin.reason,
            "by": pin.by,
            "pinned_at": pin.pinned_at,
        }
        insert = (postgresql if self.engine.dialect.name == "postgresql" else sqlite).insert(pins)
        with self.engine.begin() as connection:  # one statement: two who pin at once do not get in each other's way
            connection.execute(
                insert.values(id=1, **values).on_conflict_do_update(index_elements=[pins.c.id], set_=values)
            )

    def clear_pin(self, pin: Pin) -> None:
        """Unpin, unless somebody has pinned anew."""
        this = (pins.c.bento_tag == pin.bento_tag, pins.c.pinned_at == pin.pinned_at)
        with self.engine.begin() as connection:
            connection.execute(pins.delete().where(*this))


def older_database(history: History, serving: Serving) -> str | None:
    """That the database does not know the promotion that wrote what serves, and the way out; None if it does."""
    fence, newest = serving.fence(), history.newest_id()  # in this order: whoever promotes now opens a row first
    if fence <= newest:
        return None
    wrote = f"{serving.served_tag()} was written by promotion {fence}"
    remedy = "is it another database, or was an older backup restored? `churn adopt` goes on from what serves"
    return f"the database knows promotions up to {newest}, but {wrote}: {remedy}"
