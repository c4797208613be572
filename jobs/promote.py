"""Make what is served follow the registry's `production` alias: run twice it does nothing the second time.

The table `promotions` is the write-ahead record. A row is opened before anything changes, and every step after
it sets a thing only where it differs, so that the run after a killed one walks the same steps and ends them.
Deciding (`decide`) is pure; each act has its home: aliases and tags in `jobs.registry`, the served tag in
`jobs.serving`, building in `jobs.package`. Looking takes well under a second and imports nothing heavy.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from jobs.canary import Canary
from jobs.database import await_answer, connect
from jobs.failpoints import failpoint
from jobs.history import History, Pin, Promotion, older_database
from jobs.lease import Held, lease
from jobs.package import bento_of, ensure_bento, expected_tag, golden_row, is_whole, prune_bentos, version_of
from jobs.provenance import record_of
from jobs.registry import (
    CANDIDATE,
    HELD,
    HELD_AGAINST,
    PREVIOUS,
    PRODUCTION,
    ModelRefused,
    ModelVersion,
    Registry,
    RegistryError,
)
from jobs.replay import held_against, realised_auc, replay
from jobs.serving import DIRECT, ServedTagChanged, Serving, StaleFence, serving_of
from jobs.settings import Mode, Settings

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between looks at a rollout; on a cluster five times that
PROBE_FOR = 10.0  # seconds until a client reaches what a settled rollout serves
DATABASE_WITHIN = 45.0  # seconds for a database that restarts
GOLDEN_TOLERANCE = 1e-6
LONGEST_BACKOFF, PIN_BACKOFF = timedelta(hours=1), timedelta(minutes=5)  # a person waits for a pin

Action = Literal["promote", "follow", "pin", "restore", "rebuild"]
TOLD = {"promote": "Promoted", "follow": "Followed", "pin": "Pinned", "restore": "Restored", "rebuild": "Rebuilt"}


class PromotionFailed(RuntimeError):
    """The promotion was undone; the message says why. `interrupted`: the world's fault, it is tried again."""

    def __init__(self, reason: str, *, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.interrupted = interrupted


class _ModelFault(Exception):
    """The model or its bento is at fault: it will not be tried again."""


class _WorldFault(Exception):
    """Something around it is at fault: try again later."""


@dataclass(frozen=True)
class World:
    """What `decide` looks at."""

    mode: Mode
    pin: Pin | None
    aliases: dict[str, int]
    served_tag: str | None
    served_version: int | None  # of the served tag, where its archive is known
    last: Promotion | None  # the last promotion that ended well
    registered: bool  # whether the registry still has the model that should be served, under its number
    candidate: ModelVersion | None
    expected_tag: str | None  # of the last promotion's version with today's serving code
    rebuild_on_code_change: bool
    retry_at: dict[int, datetime]  # versions whose last attempt was interrupted, and when to try again
    failed_rebuild: str | None  # the tag whose rebuilding failed last; it is not tried again
    held_against: str  # what a replay would be judged by today
    now: datetime
    alias_recorded: bool = True  # whether the version that alias production names was made here, or approved

    def waits(self, version: int) -> str | None:
        """Until when it is not tried again, if its last attempt was interrupted."""
        at = self.retry_at.get(version, self.now)
        return f"was interrupted; next try at {at:%H:%M:%S} UTC" if at > self.now else None


@dataclass(frozen=True)
class Want:
    """A change that should be made: to which version, by which rule, and why. `tag` is known for stored archives."""

    action: Action
    version: int
    tag: str | None
    reason: str


@dataclass(frozen=True)
class Idle:
    """Nothing to change, and why."""

    reason: str


def decide(world: World) -> Want | Idle:
    """What promotion should do now: the first rule of the design that applies."""
    last, production = world.last, world.aliases.get(PRODUCTION)
    if world.pin is not None:
        return _pinned(world, world.pin)
    if last is not None and production is not None and not world.registered and not world.alias_recorded:
        stranger = f"alias {PRODUCTION} names version {production}, which was not made here"
        remedy = f"is it another model registry? `churn approve {production}` takes that version over"
        return Idle(f"{stranger}; {last.to_tag} serves on: {remedy}")
    if production is not None and (last is None or last.to_version != production):
        if waits := world.waits(production):
            return Idle(f"version {production} {waits}")
        return Want("follow", production, None, f"alias {PRODUCTION} was moved to version {production} by a hand")
    if last is not None and last.to_tag is not None and world.served_tag != last.to_tag:
        if world.served_tag is not None and world.served_version is not None:
            return Want("pin", world.served_version, world.served_tag, "the served tag was changed by a hand")
        return Want(
            "restore",
            last.to_version,
            last.to_tag,
            f"the served tag is {world.served_tag}, the record says {last.to_tag}",
        )
    approved = world.candidate is not None and "approved_by" in world.candidate.tags
    if last is not None and production is None and not world.registered and not approved:
        gone = f"version {last.to_version} was deleted from the model registry, or that is another one"
        return Idle(f"{gone}; {last.to_tag} serves on; `churn approve N` replaces it by version N")
    if last is not None and production is None and world.registered:
        if waits := world.waits(last.to_version):
            return Idle(f"alias {PRODUCTION} is gone, and putting it back {waits}")
        return Want(
            "restore",
            last.to_version,
            last.to_tag,
            f"alias {PRODUCTION} is gone, the record says version {last.to_version}",
        )
    idle = _candidate(world)
    if isinstance(idle, Want):
        return idle
    if (
        last is not None
        and not _taken_back(last, world.expected_tag)
        and not world.waits(last.to_version)
        and world.expected_tag not in (None, last.to_tag, world.failed_rebuild)
        and world.rebuild_on_code_change
        and world.mode != "off"
    ):
        return Want("rebuild", last.to_version, world.expected_tag, "the serving code has changed")
    return idle


def _pinned(world: World, pin: Pin) -> Want | Idle:
    recorded = world.last is not None and world.last.to_tag == pin.bento_tag == world.served_tag
    alias_follows = world.aliases.get(PRODUCTION) == pin.version or not world.registered
    if recorded and alias_follows:
        return Idle(f"pinned to {pin.bento_tag}: {pin.reason}")
    if waits := world.waits(pin.version):
        return Idle(f"pinned to {pin.bento_tag}, but that {waits}")
    return Want("pin", pin.version, pin.bento_tag, f"pinned by {pin.by}: {pin.reason}")


def _taken_back(last: Promotion, tag: str | None) -> bool:
    """Whether a person went back from that build of a version to another one of it."""
    return last.action == "pin" and last.from_version == last.to_version and last.from_tag == tag


def _candidate(world: World) -> Want | Idle:
    candidate, first = world.candidate, world.aliases.get(PRODUCTION) is None
    if candidate is None:
        return Idle("no candidate" if not first else "no model yet: `churn retrain` trains one")
    name = f"candidate {candidate.version}"
    if candidate.version == world.aliases.get(PRODUCTION) and world.registered:
        return Idle(f"version {candidate.version} is in production")
    if not candidate.passed:
        return Idle(f"{name} was refused by the gate: {candidate.tags.get('gate_reason', 'no reason recorded')}")
    if candidate.spent:
        return Idle(f"{name} is not tried again ({candidate.spent}); `churn approve {candidate.version}` allows it")
    approved = "approved_by" in candidate.tags
    judged_against, champion = candidate.tags.get("champion", ""), str(world.aliases.get(PRODUCTION, ""))
    if not approved and judged_against != champion:
        against = f"version {judged_against}" if judged_against else "no champion"
        remedy = f"`churn retrain` judges it anew, `churn approve {candidate.version}` promotes it as it is"
        return Idle(f"{name} was judged against {against}, and production is version {champion}: {remedy}")
    if world.mode == "off" or (world.mode == "dryRun" and not first):
        return Idle(f"{name} passed the gate; mode {world.mode} promotes nothing")
    if world.mode == "manual" and not first and not approved:
        return Idle(f"{name} passed the gate and waits for `churn approve {candidate.version}`")
    if not approved and candidate.tags.get(HELD_AGAINST) == world.held_against:
        return Idle(f"{name} waits for `churn approve {candidate.version}`: {candidate.tags.get(HELD)}")
    if waits := world.waits(candidate.version):
        return Idle(f"{name} {waits}")
    why = candidate.tags.get("gate_reason", "")
    if approved:
        said = candidate.tags.get("approved_reason")
        why = f"approved by {candidate.tags['approved_by']}" + (f": {said}" if said else "")
    return Want("promote", candidate.version, None, why)


@dataclass(frozen=True)
class PromoteResult:
    """`idle`, `promoted`, `rolled_back`, `held` (another works) or `dry_run`, and the sentence that goes with it."""

    result: Literal["idle", "promoted", "rolled_back", "held", "dry_run"]
    reason: str
    served_tag: str | None = None
    from_version: int | None = None
    to_version: int | None = None


class Promoter:
    """One attempt to bring alias, served tag and record into line, for one release."""

    def __init__(self, settings: Settings, serving: Serving | None = None, *, by: str = "promote") -> None:
        self.settings = settings
        self.serving: Serving = serving or serving_of(settings)
        self.registry = Registry(settings)
        self.engine = connect(settings.database)
        self.history = History(self.engine)
        self.by = by

    # ---- looking -----------------------------------------------------------------------------------------

    def world(self) -> World:
        """Everything `decide` needs; with a pin, a registry that does not answer is no obstacle."""
        pin, last = self.history.pin(), self.history.last(good=True)
        served_tag = self.serving.served_tag()
        registered = alias_recorded = True
        try:
            aliases = self.registry.aliases()
            number, production = aliases.get(CANDIDATE), aliases.get(PRODUCTION)
            candidate = None if number is None else self.registry.version(number)
            champion = version_of(self.engine, self.registry, last.to_version, last.to_tag) if last else None
            if pin:
                registered = version_of(self.engine, self.registry, pin.version, pin.bento_tag) is not None
            else:
                registered = champion is not None
                stranger = None if registered or production is None else self.registry.version(production)
                alias_recorded = stranger is None or record_of(self.engine, stranger.run_id) is not None
        except RegistryError:
            if pin is None:
                raise
            log.warning("the model registry does not answer; the pin is followed without it")
            aliases, candidate, champion = {PRODUCTION: pin.version}, None, None
        archive = bento_of(self.engine, served_tag) if served_tag else None
        before = self.history.last()
        failed_rebuild = before.to_tag if before and (before.action, before.result) == ("rebuild", "failed") else None
        return World(
            mode=self.settings.promotion_mode,
            pin=pin,
            aliases=aliases,
            served_tag=served_tag,
            served_version=archive.model_version if archive else None,
            registered=registered,
            last=last,
            candidate=candidate,
            expected_tag=None if champion is None else expected_tag(champion),
            rebuild_on_code_change=self.settings.rebuild_on_code_change,
            retry_at=self._retry_at(pin),
            failed_rebuild=failed_rebuild,
            held_against=held_against(self.settings, last.to_version if last else None),
            now=datetime.now(UTC),
            alias_recorded=alias_recorded,
        )

    def _retry_at(self, pin: Pin | None) -> dict[int, datetime]:
        """Backoff: 1, 2, 4 … minutes after the last of the interrupted attempts in a row, at most LONGEST_BACKOFF.

        With a pin at most PIN_BACKOFF, from when it was set: who pins again wants another try now.
        """
        longest = PIN_BACKOFF if pin else LONGEST_BACKOFF
        attempts = [a for a in self.history.interruptions() if pin is None or a.opened_at >= pin.pinned_at]
        if not attempts or attempts[0].closed_at is None or attempts[0].closed_at > datetime.now(UTC):
            return {}  # none, or by a clock that was ahead
        backoff = min(timedelta(minutes=2 ** (len(attempts) - 1)), longest)
        return {attempts[0].to_version: attempts[0].closed_at + backoff}

    # ---- doing -------------------------------------------------------------------------------------------

    def run(self, *, dry_run: bool = False, wait: float = 0.0) -> PromoteResult:
        """Finish or undo what is open, then make the wanted change; raises PromotionFailed when it was undone."""
        self._refuse_older_database()
        if self.history.pin() is not None:
            self.registry.be_brief()  # what is pinned serves without it
        open_row = self.history.open_row()
        if open_row is not None:
            what = f"finish promotion {open_row.id} of version {open_row.to_version}"
        else:
            try:
                world = self.world()
                want = decide(world)
            except RegistryError as error:
                if self.history.last() is not None:
                    raise
                return PromoteResult("idle", f"nothing was promoted yet, and the model registry is not there: {error}")
            if isinstance(want, Idle):
                self._refuse_what_cannot_serve()
                return PromoteResult("idle", want.reason, self.serving.served_tag())
            what = f"{want.action} version {want.version}: {want.reason}"
            if dry_run and (held := self._would_hold(world, want)):
                what = f"wait for `churn approve {want.version}`: {held}"
        if dry_run:
            return PromoteResult("dry_run", f"would {what}", self.serving.served_tag())
        try:
            with lease(self.settings, "promote", wait=wait):
                return self._work()
        except Held as held:
            return PromoteResult("held", str(held), self.serving.served_tag())

    def _refuse_older_database(self) -> None:
        """Raise if the served tag was written by a promotion that the record does not know: a restored backup."""
        if said := older_database(self.history, self.serving):
            raise PromotionFailed(said, interrupted=True)

    def _refuse_what_cannot_serve(self) -> None:
        """Raise if what should be served never will be: promoted while nothing served, so that nobody noticed."""
        rollout = self.serving.rollout()
        if rollout.failure and not any(pod.ready for pod in rollout.pods):
            raise PromotionFailed(f"{rollout.served_tag} cannot serve: {rollout.failure}; `churn rollback` goes back")

    def _work(self) -> PromoteResult:
        result: PromoteResult | None = None
        open_row = self.history.open_row()  # looked at again: now nobody else writes
        if open_row is not None:
            log.info("promotion %d was left open (version %s); going on with it", open_row.id, open_row.to_version)
            result = self._carry_out(open_row)
        for _ in range(3):  # a pin set meanwhile, or an alias moved, is obeyed at once
            world = self.world()
            want = decide(world)
            if isinstance(want, Idle):
                return result or PromoteResult("idle", want.reason, self.serving.served_tag())
            if self._held(world, want):
                continue
            result = self._carry_out(self._open(want))
        return result or PromoteResult("idle", "nothing to do", self.serving.served_tag())

    def _held(self, world: World, want: Want) -> bool:
        """Whether the candidate has to wait for a person, because it would decide too much otherwise."""
        candidate, served_tag = world.candidate, self._compared_with(world, want)
        if candidate is None or served_tag is None:
            return False
        try:
            tag = ensure_bento(self.settings, self.engine, self.registry, candidate)
        except ModelRefused:
            return False  # the promotion says it, and marks the version
        reason = self._objection(served_tag, tag)
        if reason is None:
            return False
        self.registry.set_tags(candidate.version, {HELD: reason[:4900], HELD_AGAINST: world.held_against})
        self.serving.tell("PromotionHeld", f"version {candidate.version}: {reason}", warning=True)
        return True

    def _would_hold(self, world: World, want: Want) -> str | None:
        """Why it would have to wait, if its bento is there to be asked: a look packages nothing."""
        candidate, served_tag = world.candidate, self._compared_with(world, want)
        if candidate is None or served_tag is None:
            return None
        tag = expected_tag(candidate)
        return self._objection(served_tag, tag) if bento_of(self.engine, tag) else None

    def _compared_with(self, world: World, want: Want) -> str | None:
        """The tag of the model that the candidate would replace; None if there is none worth comparing with."""
        candidate, last = world.candidate, world.last
        if want.action != "promote" or candidate is None or last is None:
            return None
        if "approved_by" in candidate.tags or not self.settings.replay_requests:
            return None
        auc = realised_auc(self.engine, last.to_version)
        if auc is None:
            auc = self._gate_auc(candidate)
        if auc is not None and auc < self.settings.champion_floor:
            log.info("version %d guesses (AUC %.3f): nothing is compared with it", last.to_version, auc)
            return None
        return last.to_tag

    def _objection(self, served_tag: str, tag: str) -> str | None:
        """What a replay has against a candidate's bento beside the one that serves."""
        if not is_whole(self.engine, served_tag):
            return f"the stored archive of {served_tag} is gone or damaged, so that nothing can be compared with it"
        found = replay(self.settings, self.engine, served_tag, tag)
        log.info("%s beside %s: %s", tag, served_tag, found)
        objections = found.objections(self.settings)
        return f"{found} ({'; '.join(objections)})" if objections else None

    def _gate_auc(self, candidate: ModelVersion) -> float | None:
        """The AUC that the gate found for the champion the candidate was judged against last; None if there is none."""
        told = candidate.tags.get("champion_auc")  # gate.json is of the first judgement, and may be of another champion
        if told is None:
            gate = json.loads(self.registry.artifact(candidate.run_id, "gate.json").read_text())
            told = gate["metrics"].get("champion_auc")
        return float(told) if told else None

    def _open(self, want: Want) -> Promotion:
        if want.action == "pin" and self.history.pin() is None:  # somebody changed the tag itself
            self.history.set_pin(Pin(want.version, str(want.tag), want.reason, self.by, datetime.now(UTC)))
        last = self.history.last(good=True)
        row = self.history.open(
            now=datetime.now(UTC),
            action=want.action,
            from_version=last.to_version if last else None,
            from_tag=last.to_tag if last else None,
            to_version=want.version,
            to_tag=want.tag,
            reason=want.reason,
            by=self.by,
        )
        log.info(
            "promotion %d opened: %s version %s -> %s (%s)",
            row.id,
            want.action,
            row.from_version,
            want.version,
            want.reason,
        )
        failpoint("promote.opened")
        return row

    def _carry_out(self, row: Promotion) -> PromoteResult:
        try:
            self._obey_pin(row)
            tag = self._to_tag(row)
            failpoint("promote.built")
            self._obey_pin(row)
            self._set_aliases(row)
            failing = self._set_served_tag(row, tag)
            try:
                self._watch(row, tag)
            except _ModelFault as fault:
                if failing:
                    raise _WorldFault(f"{fault}; they failed before, too: {failing}") from fault
                raise
            failpoint("promote.settled")
            self._probe(tag)
            failpoint("promote.probed")
        except _Yielded as yielded:
            self._undo(row, "interrupted", str(yielded), yields=yielded.to_pin)
            return PromoteResult("idle", str(yielded), self.serving.served_tag())
        except (_ModelFault, ModelRefused) as fault:
            self._undo(row, "failed", str(fault))
            raise PromotionFailed(f"version {row.to_version} was not promoted: {fault}") from fault
        except Exception as fault:  # a database, a disk, a registry: whatever it is, nothing half done may stay
            self._undo(row, "interrupted", str(fault))
            raise PromotionFailed(
                f"promotion of version {row.to_version} was interrupted: {fault}", interrupted=True
            ) from fault
        return self._close(row, tag)

    def _to_tag(self, row: Promotion) -> str:
        if row.to_tag and is_whole(self.engine, row.to_tag):
            return row.to_tag
        version = self.registry.version(row.to_version)
        if version is None:
            raise _ModelFault(f"the registry has no version {row.to_version}")
        if row.action == "pin" and expected_tag(version) != row.to_tag:  # only the code that built it could build it
            lost = f"the stored archive of {row.to_tag} is gone or damaged"
            raise _ModelFault(f"{lost}; to serve version {row.to_version} all the same, move alias {PRODUCTION} to it")
        tag = ensure_bento(self.settings, self.engine, self.registry, version)
        self.history.set_target(row, tag)
        return tag

    def _obey_pin(self, row: Promotion) -> None:
        pin = self.history.pin()
        if pin is not None and (pin.version, pin.bento_tag) != (row.to_version, row.to_tag or pin.bento_tag):
            raise _Yielded(f"yields to the pin on {pin.bento_tag} by {pin.by}", to_pin=True)
        if pin is None and row.action == "pin":
            raise _Yielded(f"the pin on {row.to_tag} was taken back before it served everywhere", to_pin=False)

    def _set_aliases(self, row: Promotion) -> None:
        try:
            aliases = self.registry.aliases()
            before = aliases.get(PRODUCTION)
            if before not in (row.from_version, row.to_version, None) and row.action != "pin":
                raise _WorldFault(f"alias {PRODUCTION} was moved to version {before} meanwhile")
            number = row.from_version if before in (None, row.to_version) else before
            left = None
            if number not in (None, row.to_version):
                left = self._from(row) if number == row.from_version else self.registry.version(number)
            if left is not None:
                self.registry.set_alias(PREVIOUS, left.version)
                if row.action in ("pin", "follow"):
                    self.registry.set_tags(left.version, {"rolled_back": f"{row.opened_at:%Y-%m-%dT%H:%M:%SZ}"})
            failpoint("promote.previous_set")
            if row.action == "pin" and version_of(self.engine, self.registry, row.to_version, row.to_tag) is None:
                log.warning("the model registry has no version %s of %s: no alias names it", row.to_version, row.to_tag)
                if left is not None:
                    self.registry.drop_alias(PRODUCTION)
            else:
                self.registry.set_alias(PRODUCTION, row.to_version)
            failpoint("promote.production_set")
            if aliases.get(CANDIDATE) == row.to_version:
                self.registry.drop_alias(CANDIDATE)
            if row.action in ("promote", "follow"):
                self.registry.set_tags(row.to_version, {"promoted_at": f"{row.opened_at:%Y-%m-%dT%H:%M:%SZ}"})
            failpoint("promote.tagged")
        except RegistryError as error:
            if row.action != "pin":
                raise
            log.warning("aliases follow when the model registry answers again: %s", error)

    def _from(self, row: Promotion) -> ModelVersion | None:
        """The version that a promotion replaces, if the registry still has it."""
        if row.from_version is None:
            return None
        return version_of(self.engine, self.registry, row.from_version, row.from_tag)

    def _set_served_tag(self, row: Promotion, tag: str) -> str | None:
        """Patch the tag; why new pods were failing before, while old ones served: then no model is at fault.

        A candidate waits for the end of that. What a person wants, and a rebuild, may be the remedy.
        """
        served, failing = self.serving.served_tag(), None
        if served != tag:
            if served not in (row.from_tag, None) and row.action not in ("pin", "follow", "restore"):
                raise _WorldFault(f"the served tag was changed to {served} meanwhile")
            before = self.serving.rollout()
            if any(pod.ready and pod.bento_tag == served for pod in before.pods):
                failing = before.failure
            if failing and row.action == "promote":
                raise _WorldFault(f"new pods fail already with {served}, which serves: {failing}")
            log.info("served_tag %s -> %s", served, tag)
            self.serving.set_served_tag(old=served, new=tag, fence=row.id, soak=self._soak(served, tag))
        failpoint("promote.patched")
        return failing

    def _soak(self, served: str | None, tag: str) -> timedelta:
        """How long a new pod must stay up beside the old: not at all if there is none, or the tag has served before."""
        new = served is not None and not self.history.has_served(tag)
        return self.settings.promotion_soak if new else timedelta(0)

    def _watch(self, row: Promotion, tag: str) -> None:
        """Wait until every pod serves the tag, or it is clear that none will."""
        patience = (self.settings.promotion_deadline + self.settings.promotion_soak).total_seconds()
        end, best = time.monotonic() + patience, 0  # as long as one pod after the other gets ready it goes on
        seen, next_look, template = "nothing", 0.0, None
        canary = None if row.action == "pin" else Canary(self.settings, tag)  # who rolls back knows why
        while True:
            rollout = self.serving.rollout()
            template = rollout.template if template is None else template
            if not rollout.running:
                log.warning("nothing serves (no `churn serve`, or 0 replicas): whatever starts next serves %s", tag)
                return
            if rollout.served_tag != tag:
                raise _WorldFault(f"the served tag was changed to {rollout.served_tag} meanwhile")
            if rollout.failure and rollout.template != template:
                raise _WorldFault(f"the Deployment was changed by somebody else meanwhile: {rollout.failure}")
            if rollout.failure:
                raise (_WorldFault if rollout.worlds_fault else _ModelFault)(rollout.failure)
            if time.monotonic() > next_look or rollout.settled:
                if canary is not None and (worse := canary.look(rollout.pods)):
                    raise _ModelFault(worse)
                self._obey_pin(row)
                next_look = time.monotonic() + 1
            if rollout.settled:
                return
            ready = sum(pod.ready and pod.bento_tag == tag for pod in rollout.pods)
            if ready > best:
                end, best = time.monotonic() + patience, ready
            seen = "; ".join(
                f"{p.name} {p.bento_tag} {'ready' if p.ready else p.message or 'not ready'}" for p in rollout.pods
            )
            if time.monotonic() > end:
                deadline = f"{patience:.0f} s"
                started = any(p.bento_tag == tag and p.address for p in rollout.pods) or "/readyz" in seen
                fault = _ModelFault if started else _WorldFault  # one that was never started is not to blame
                raise fault(f"pods were not ready within {deadline}; last seen: {seen or 'no pods'}")
            time.sleep(5 * POLL if self.settings.deployment else POLL)

    def _probe(self, tag: str) -> None:
        """Ask until all agree: proxies take a moment to learn of pods, and a pod may be moved just now."""
        end = time.monotonic() + PROBE_FOR
        while True:
            try:
                return self._ask_all(tag)
            except _WorldFault:
                if time.monotonic() > end:
                    raise
            time.sleep(POLL)

    def _ask_all(self, tag: str) -> None:
        """Ask each pod who it is, and the service for a golden row's score."""
        rollout = self.serving.rollout()
        if not rollout.running:
            return
        ready = [pod for pod in rollout.pods if pod.ready and pod.address]  # others may have come since
        if not ready:
            raise _WorldFault("no pod is ready any more")
        for pod in ready:
            found = ask(f"{pod.address}/info").get("bento_tag")
            if found != tag:
                raise _ModelFault(f"{pod.name} says it serves {found}; expected {tag}")
        answer, score = ask_golden(self.settings, self.serving.url, tag)
        if answer.get("bento_tag") != tag:
            raise _WorldFault(f"{self.serving.url} is still answered by {answer.get('bento_tag')}")
        if not abs(float(answer["churn_probability"]) - score) <= GOLDEN_TOLERANCE:
            raise _ModelFault(f"a golden row scored {answer.get('churn_probability')} by {tag}; expected {score}")

    def _close(self, row: Promotion, tag: str) -> PromoteResult:
        result: Literal["promoted", "rolled_back"] = "rolled_back" if row.action == "pin" else "promoted"
        now = datetime.now(UTC)
        try:
            since = {"bento_tag": tag, "served_since": now.isoformat(timespec="seconds")}
            if version_of(self.engine, self.registry, row.to_version, tag) is not None:
                self.registry.set_tags(row.to_version, {**since, "promotion_failed": None, "rolled_back": None})
        except RegistryError as error:  # aliases are right and it serves; to undo that for a note would be worse
            log.warning("version %d serves, but its tags could not be written: %s", row.to_version, error)
        self.history.close(row, now=now, result=result, reason=row.reason)
        failpoint("promote.closed")
        log.info("result=%s served_tag=%s", result, tag)
        told = f"version {row.from_version or '-'} -> {row.to_version} ({tag}): {row.reason}"
        try:
            self.serving.tell(TOLD[row.action], told)
            in_use = {tag, row.from_tag or tag, *self.serving.tags_in_use()}
            prune_bentos(self.engine, keep=self.settings.bentos_kept, in_use=in_use)
        except Exception as error:  # an API server that is away: what was asked for is done all the same
            log.warning("no Event and no old bento removed: %s", error)
        return PromoteResult(result, row.reason, tag, row.from_version, row.to_version)

    # ---- undoing -----------------------------------------------------------------------------------------

    def _undo(self, row: Promotion, result: str, reason: str, *, yields: bool = False) -> None:
        """Put aliases and served tag back, if they are still ours, and close the row with the reason.

        One that yields to a pin leaves the served tag to the pin, and its version counts as rolled back. Where the
        registry has lost what served before, no alias names that any more.
        """
        log.error("promotion %d is undone (%s): %s", row.id, result, reason)
        row = next(r for r in self.history.rows() if r.id == row.id)
        served = self.serving.served_tag()
        if not yields and served == row.to_tag and served is not None and row.from_tag != served:
            try:
                self.serving.set_served_tag(old=served, new=row.from_tag, fence=row.id, soak=timedelta(0))
            except (ServedTagChanged, StaleFence) as theirs:
                log.warning("the served tag is not put back: %s", theirs)
        failpoint("undo.tag_put_back")
        pin = self.history.pin()
        if row.action == "pin" and result == "failed" and pin is not None and pin.bento_tag == row.to_tag:
            self.history.clear_pin(pin)  # what cannot be served cannot be pinned
        try:
            self._put_aliases_back(row, result, reason, yields=yields)
        except RegistryError as error:
            if not yields:
                reason = f"{reason}; aliases could not be put back yet: {error}"
                raise PromotionFailed(reason, interrupted=True) from error
            log.warning("aliases follow with the pin: %s", error)
        failpoint("undo.alias_put_back")
        self.history.close(row, now=datetime.now(UTC), result=result, reason=reason)
        what = "PromotionFailed" if result == "failed" else "PromotionInterrupted"
        self.serving.tell(what, f"version {row.to_version} ({row.to_tag or 'no bento'}): {reason}", warning=True)

    def _put_aliases_back(self, row: Promotion, result: str, reason: str, *, yields: bool) -> None:
        """Say in the registry that what served before is what serves, and of the version that was to, why not."""
        asked_by_hand = row.action == "follow" and result == "interrupted"  # the alias stays: it is tried again
        was, production = self._from(row), self.registry.aliases().get(PRODUCTION)
        dropped = production is None and row.action == "pin"  # because no version is left that it could name
        if (production == row.to_version or dropped) and not asked_by_hand:
            if row.from_version != row.to_version:
                self._put_previous_back(row)
            if was is None:
                self.registry.drop_alias(PRODUCTION)
            else:
                self.registry.set_alias(PRODUCTION, was.version)
        if row.action in ("promote", "follow") and self.registry.version(row.to_version) is not None:
            mark = {"promotion_failed": reason[:4900]} if result == "failed" else {}
            if yields:
                mark = {"rolled_back": f"{row.opened_at:%Y-%m-%dT%H:%M:%SZ}"}
            self.registry.set_tags(row.to_version, {"promoted_at": None, **mark})
            if result == "interrupted" and row.action == "promote" and CANDIDATE not in self.registry.aliases():
                self.registry.set_alias(CANDIDATE, row.to_version)
        if row.action in ("pin", "follow") and was is not None:
            self.registry.set_tags(was.version, {"rolled_back": None})

    def _put_previous_back(self, row: Promotion) -> None:
        before = self.history.last(good=True)
        number = before.from_version if before and before.from_version != row.from_version else None
        if number is not None and self.registry.version(number) is not None:
            self.registry.set_alias(PREVIOUS, number)
        elif self.registry.aliases().get(PREVIOUS) == row.from_version:
            self.registry.drop_alias(PREVIOUS)


class _Yielded(Exception):
    """A person said something else meanwhile: set a pin, which has precedence, or took back the one this is for."""

    def __init__(self, reason: str, *, to_pin: bool) -> None:
        super().__init__(reason)
        self.to_pin = to_pin


def ask(url: str, body: object = None, *, token: str = "") -> dict[str, Any]:
    """What a service answers in JSON; no answer is the world's fault, an error of its own the model's."""
    headers = {"Content-Type": "application/json", "X-Churn-Source": "probe"}
    if token:
        headers["X-Churn-Probe-Token"] = token
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, headers=headers, data=data)
        with DIRECT.open(request, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        fault = _WorldFault if error.code in (401, 408, 429, 502, 503, 504) else _ModelFault
        hint = "; CHURN_PROBE_TOKEN has to be the service's" if error.code == 401 else ""
        raise fault(f"{url} answered {error.code}: {error.read(300).decode('utf-8', 'replace')}{hint}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _WorldFault(f"{url} did not answer: {error}") from error


def ask_golden(settings: Settings, url: str, tag: str) -> tuple[dict[str, Any], float]:
    """What the service answers for a golden row of that bento, and the score that was stored for it."""
    features, score = golden_row(settings, tag)
    token = settings.probe_token.get_secret_value()
    return ask(f"{url}/predict", {"features": features}, token=token), score


def promote(
    settings: Settings, *, serving: Serving | None = None, dry_run: bool = False, by: str = "promote"
) -> PromoteResult:
    """Bring what is served into line with the registry, once; see Promoter."""
    await_answer(settings.database, DATABASE_WITHIN)
    return Promoter(settings, serving, by=by).run(dry_run=dry_run)
