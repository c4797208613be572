"""Ask the service for a golden row of what it serves: the shortest proof that the whole path answers rightly."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.promote import GOLDEN_TOLERANCE, ask, ask_golden
from jobs.serving import serving_of
from jobs.settings import Settings


@dataclass(frozen=True)
class CheckResult:
    """What answered, and how far its score is from the one stored with the bento."""

    url: str
    served_tag: str
    model_version: int
    difference: float


def check(settings: Settings) -> CheckResult:
    """One request through the Service; raises if nothing answers, or another score than was stored."""
    url = serving_of(settings).url
    tag = str(ask(f"{url}/info")["bento_tag"])
    answer, score = ask_golden(settings, url, tag)
    difference = abs(float(answer["churn_probability"]) - score)
    if answer["bento_tag"] == tag and not difference <= GOLDEN_TOLERANCE:
        raise RuntimeError(f"{url} scored {answer['churn_probability']} by {tag}; expected {score}")
    return CheckResult(url, str(answer["bento_tag"]), int(answer["model_version"]), difference)
