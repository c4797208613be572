"""One switch that breaks a named step, for tests: `CHURN_FAILPOINT=promote.opened=exit`.

Off unless the variable is set. A step is declared in `STEPS`, which the tests enumerate, so that a new step
without a test fails.
"""

from __future__ import annotations

import os

STEPS = (
    "promote.opened",
    "promote.built",
    "promote.previous_set",
    "promote.production_set",
    "promote.tagged",
    "promote.patched",
    "promote.settled",
    "promote.probed",
    "promote.closed",
    "retrain.trained",
    "retrain.registered",
)


class Failpoint(RuntimeError):
    """Raised by a step that was told to."""


def failpoint(step: str) -> None:
    """Do nothing, or what `CHURN_FAILPOINT` says of this step: `exit` ends the process at once, `raise` raises."""
    if step not in STEPS:
        raise ValueError(f"{step} is not listed in jobs.failpoints.STEPS")
    name, _, act = os.environ.get("CHURN_FAILPOINT", "").rpartition("=")
    if name == step:
        if act == "exit":
            os._exit(137)
        raise Failpoint(f"failpoint {step}")
