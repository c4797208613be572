"""The story of the first issue on a cluster: drift found, retraining waits for labels, a second model takes over."""

from __future__ import annotations

import pytest

from tests.cluster.commands import wait_until
from tests.cluster.story import FIRST, FIRST_KNOWN, SECOND, Story, html_report, known_on

pytestmark = pytest.mark.cluster


def test_without_data_an_install_waits_and_says_for_what(story: Story) -> None:
    """snapshots.source names a folder of the data volume that nothing has arrived in yet: no error, no model."""
    assert story.waiting.complete, story.waiting
    assert "no_data" in story.waiting.log
    (pod,) = wait_until("a pod waits for a first model", lambda: story.release.pods("serving"), within=60)

    def says() -> bool:
        return bool(story.release.kubectl("logs", pod["metadata"]["name"], "--container=fetch").strip())

    wait_until("the pod says what it waits for", says, within=60)
    assert story.release.served_tag() is None


def test_what_arrives_on_the_data_volume_is_ingested_by_materialize(story: Story) -> None:
    """`kubectl churn put`, then `kubectl create job --from=cronjob/materialize m1`."""
    for day in (FIRST, SECOND):
        assert f"ingested {day}" in story.delivered.log


def test_the_first_model_is_served_when_it_was_trained(story: Story) -> None:
    """Job retrain by hand, CronJob promote by its schedule; `curl` through the ingress gives a probability."""
    tag = story.first_model
    answer = story.release.predict(story.release.users()[0])
    assert (answer["model_version"], answer["bento_tag"]) == (1, tag)
    assert 0 < answer["churn_probability"] < 1


def test_drift_job_by_hand_leaves_a_report_in_mlflow(story: Story) -> None:
    """`kubectl create job --from=cronjob/drift d1` completes, report in MLflow."""
    assert story.drifted.job.complete
    assert "rebuffer_events_7d" in story.drifted.check["drifted_columns"]
    report = html_report(story.release, story.drifted.check["run_id"])
    assert "Drift as of 2024-03-01" in report
    assert "rebuffer_events_7d" in report


def test_drift_starts_retrain_by_itself(story: Story) -> None:
    """… starts `retrain` by itself: a Job owned by the CronJob, with the reason, and an Event."""
    assert story.drifted.check["decision"] == "retrain"
    job = story.drifted.retrain["metadata"]
    (owner,) = job["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("CronJob", "retrain")
    assert "rebuffer_events_7d drifted" in job["annotations"]["churn/started-because"]
    assert any(job["name"] in event["message"] for event in story.release.events("RetrainStarted"))


def test_retrain_waits_for_labels(story: Story) -> None:
    """… which waits for labels: a success, no candidate, version 1 serves on."""
    outcome = story.drifted.outcome
    assert outcome["result"] == "waiting_for_labels"
    assert outcome["known_at"].startswith(known_on(SECOND))
    assert outcome["wanted_by"] == "drift"
    assert story.release.aliases() == {"production": 1}
    assert story.release.served_version() == 1


def test_the_clock_moves_by_an_upgrade_and_nobody_notices(story: Story) -> None:
    """`helm upgrade --set asOf=…` restarts the service under load: no request fails, version 1 answers throughout."""
    clients = story.upgraded
    print(clients)
    clients.check_none_failed()
    assert clients.versions == [1]
    story.release.check_logged_once(clients)


def test_labels_lead_to_a_second_model_in_production(story: Story) -> None:
    """When they arrive, candidate promoted."""
    outcome = story.promoted.drift.outcome
    assert (outcome["result"], outcome["version"]) == ("registered", 2), outcome
    last = story.release.promotions()[-1]
    assert (last["action"], last["from_version"], last["to_version"], last["result"]) == ("promote", 1, 2, "promoted")
    assert story.release.aliases() == {"production": 2, "previous": 1}


def test_no_request_fails_while_the_served_tag_changes(story: Story) -> None:
    """The served tag changes by rolling update while a client sends requests through the ingress: none fails,
    and `/predict` reports version 2."""
    promoted = story.promoted
    print(f"{promoted.clients}, longest gap between answers {promoted.longest_gap * 1000:.0f} ms")
    promoted.clients.check_none_failed()
    assert promoted.clients.tags == [promoted.old_tag, promoted.new_tag]
    assert promoted.clients.versions == [1, 2]
    assert story.release.predict()["model_version"] == 2


def test_every_answer_is_logged_exactly_once(story: Story) -> None:
    """Also those of the pods that went away: the log has each answer once, with the tag that gave it."""
    story.release.check_logged_once(story.promoted.clients)


def test_the_promotion_is_told_as_an_event(story: Story) -> None:
    """`kubectl get events` says what was promoted and why."""
    tag = story.promoted.new_tag
    assert any(tag in event["message"] for event in story.release.events("Promoted"))


def test_what_the_clock_says_is_what_jobs_believe(story: Story) -> None:
    """asOf is the day that all jobs take for today: the first check is dated by it, not by this year."""
    assert story.drifted.check["as_of"].startswith(FIRST_KNOWN.isoformat())
