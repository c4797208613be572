"""One switch that breaks named steps, for tests: `CHURN_FAILPOINT=promote.opened=exit`, or `=sleep:5`, `=raise`.

Off unless the variable is set; several are separated by commas. A step is declared in `STEPS`, which the tests
enumerate, so that a new step without a test fails.
"""

from __future__ import annotations

import os
import re
import time

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
    "undo.tag_put_back",
    "undo.alias_put_back",
    "pin.recorded",
    "retrain.trained",
    "retrain.recorded",
    "retrain.registered",
)


class Failpoint(RuntimeError):
    """Raised by a step that was told to."""


def acts() -> dict[str, str]:
    """What `CHURN_FAILPOINT` says, by step; raises ValueError if that is no step or nothing it could do."""
    said = [part.partition("=") for part in os.environ.get("CHURN_FAILPOINT", "").split(",") if part]
    for step, _, act in said:
        if step not in STEPS:
            raise ValueError(f"CHURN_FAILPOINT names {step!r}; expected one of {', '.join(STEPS)}")
        if not re.fullmatch(r"exit|raise|sleep:\d+(\.\d+)?", act):
            raise ValueError(f"CHURN_FAILPOINT says {step}={act}; expected exit, raise or sleep:SECONDS")
    return {step: act for step, _, act in said}


def failpoint(step: str) -> None:
    """Do nothing, or what `CHURN_FAILPOINT` says of this step.

    `exit` ends the process at once as SIGKILL would, `sleep:5` goes on after 5 seconds, `raise` raises Failpoint.
    """
    if step not in STEPS:
        raise ValueError(f"{step} is not listed in jobs.failpoints.STEPS")
    act = acts().get(step)
    if act is None:
        return None
    if act == "exit":
        os._exit(137)
    if act.startswith("sleep:"):
        return time.sleep(float(act.removeprefix("sleep:")))
    raise Failpoint(f"failpoint {step}")
