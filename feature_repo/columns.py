"""The columns of a snapshot: the one place that says what each may hold.

Feast's feature views, the rules of `churn ingest`, the simulator and the request schema of `/predict`
are all made from these tables, so that a column is added or widened here and nowhere else.
Importing this costs nothing; Feast's objects are made in `feature_repo.definitions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float", "bool", "category", "date"]


@dataclass(frozen=True)
class Column:
    """One column: its type, the values allowed (both ends inclusive), and what a null means."""

    name: str
    kind: Kind
    description: str
    low: float = 0.0
    high: float = 0.0
    categories: tuple[str, ...] | None = None  # None: any short text (slices only, never a feature)
    null_category: str | None = None  # a null is this category, not a missing value
    default: float | Literal["median"] | None = None  # stands in for a missing value; None: cannot do without


@dataclass(frozen=True)
class Table:
    """One file of a snapshot. `role` says what it is for: the population, features, slices or labels."""

    name: str
    role: Literal["features", "slices", "labels"]
    columns: tuple[Column, ...]


POPULATION = "subscriptions"  # every row of this table is a user of the snapshot
ENTITY = "user_id"
LABEL = "churn_label"

_STREAMING = ("false", "true", "none")  # none: no internet service

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "users",
            "slices",
            (
                Column("signup_date", "date", "day the account was opened"),
                Column("user_gender", "category", "as the user stated it; reported by slice, never a feature"),
                Column("user_is_senior", "bool", "65 or older"),
                Column("has_family", "bool", "lives with a partner"),
                Column("has_dependents", "bool", "has children or others to support"),
            ),
        ),
        Table(
            "subscriptions",
            "features",
            (
                Column("months_active", "int", "whole months since the subscription began", 0, 1200),
                Column(
                    "plan_stream_tv",
                    "category",
                    "TV in the plan; none: no internet service",
                    categories=_STREAMING,
                    null_category="none",
                ),
                Column(
                    "plan_stream_movies",
                    "category",
                    "films in the plan; none: no internet service",
                    categories=_STREAMING,
                    null_category="none",
                ),
                Column(
                    "contract_type",
                    "category",
                    "length of the contract",
                    categories=("Month-to-month", "One year", "Two year"),
                ),
                Column("paperless_billing", "bool", "bills by e-mail only"),
                Column("monthly_fee", "float", "current fee per month, in the company's currency", 0, 100_000),
                Column("total_paid", "float", "all payments so far, in the company's currency", 0, 100_000_000),
                Column(
                    "net_service",
                    "category",
                    "internet access behind the subscription",
                    categories=("DSL", "Fiber optic", "No"),
                ),
            ),
        ),
        Table(
            "usage_agg_30d",
            "features",
            (
                Column("watch_hours_30d", "float", "hours watched, last 30 days", 0, 7200),
                Column("avg_session_mins_7d", "float", "mean minutes per session, last 7 days", 0, 1440),
                Column("unique_devices_30d", "int", "devices seen, last 30 days", 0, 10_000),
                Column("skips_7d", "int", "titles skipped, last 7 days", 0, 100_000),
                Column("rebuffer_events_7d", "int", "playback stalls, last 7 days", 0, 100_000),
            ),
        ),
        Table(
            "payments_agg_90d",
            "features",
            (Column("failed_payments_90d", "int", "payments refused, last 90 days", 0, 10_000, default=0.0),),
        ),
        Table(
            "support_agg_90d",
            "features",
            (
                Column("support_tickets_90d", "int", "tickets opened, last 90 days", 0, 10_000, default=0.0),
                Column(
                    "ticket_avg_resolution_hrs_90d",
                    "float",
                    "mean hours to close a ticket, last 90 days",
                    0,
                    2160,
                    default="median",
                ),
            ),
        ),
        Table("labels", "labels", (Column(LABEL, "bool", "left within label_horizon after the snapshot"),)),
    )
}

FEATURE_TABLES: tuple[Table, ...] = tuple(t for t in TABLES.values() if t.role == "features")


def view_name(table: str) -> str:
    """The feature view of a table; `subscriptions` has more columns in other companies, hence its own name."""
    return "subscriptions_profile" if table == "subscriptions" else table
