"""A registered device: it registers for a job and plans for it, then trains and scores under that plan.

    device = RegisteredDevice(home, PlannedWork(...), report)
    outcome = device.answer(request)            # a payload, or a Refusal with the reason

It executes only installed code, and no error in a message ends the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import psutil  # type: ignore[import-untyped]

from fedtune.client.device import Device
from fedtune.client.live.device_home import ClientHome, JobMemory
from fedtune.client.live.device_status import DeviceReport
from fedtune.client.message_handlers import handle_in_the_clear, handle_under_secure_aggregation
from fedtune.client.owner_bounds import Bounds
from fedtune.client.plan.device_plan import Outcome
from fedtune.client.plan.eligibility import Sensors, not_now
from fedtune.client.plan.machine import sense
from fedtune.client.plan.planned_work import PlannedWork
from fedtune.client.plan.planner import NoPlanError
from fedtune.client.secure_rounds import Credentials
from fedtune.core.errors import DataError, InputError, ModelError, PeerError, PolicyError, UpdateError
from fedtune.core.host.private_files import write_private
from fedtune.core.job.settings import PrivacySettings
from fedtune.core.manifest.fleet_log import Fleet
from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.joining import fingerprint
from fedtune.core.privacy.budget import rho_of_round
from fedtune.core.privacy.guarantee import OWNER_DELTA, largest_rho
from fedtune.core.protocol.messages import EVALUATE, OPEN, TRAIN, VOTE, Handler, Refusal, Request, decode, encode, query
from fedtune.core.protocol.registration import (
    ACTION,
    MAX_REGISTRATION_BYTES,
    PROTOCOL_VERSION,
    Registration,
    RegistrationReply,
    two_digits,
)
from fedtune.core.secagg import Policy
from fedtune.core.text import counted

_NAMED = 5  # devices in a line
LEAST_MEASURED_BYTES = 50_000  # smallest answer that measures the link's bandwidth


class RegisteredDevice:
    """One device and the job that it is registered for.

    Args:
        home: the folder, whose lock this process holds.
        planned: the device's base models and data.
        report: receives plans, training and problems.
        sensors: reads the device's current sensors.
        now: returns seconds since 1970.
    """

    def __init__(
        self,
        home: ClientHome,
        planned: PlannedWork,
        report: DeviceReport,
        sensors: Callable[[], Sensors] = sense,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._planned, self._report, self._sensors, self._now = home, planned, report, sensors, now
        self._memory = JobMemory(home.path / "jobs")
        self._planned.uplink = self._uplink_before()
        self._make_handlers()

    def answer(self, request: Request) -> bytes | Refusal:
        """Returns the payload, or a refusal whose reason reveals nothing about the device's data."""
        try:
            return self._answer(request)
        except PolicyError as error:
            bounds = self._home.config.bounds.shown
            problem = reason = f"{error}; the owner of this device set {bounds} in its device.json, for its next start"
        except (PeerError, UpdateError, NoPlanError) as error:
            problem, reason = str(error), str(error)
        except (ModelError, DataError, InputError) as error:
            problem, reason = str(error), f"{type(error).__name__}: the device's own status says more"
        except OSError as error:
            return self.cannot_store(request.action, error)
        except Exception as error:  # torch may raise any exception; a message never ends the process
            cause = error.__cause__ or error
            problem, reason = f"{type(cause).__name__}: {cause}", f"{type(cause).__name__} on the device"
        self._report.problem(f"{request.action}: {problem}")
        return Refusal(reason)

    def cannot_store(self, action: str, error: OSError) -> Refusal:
        """Reports a failure to write or read files, and refuses the message."""
        self._report.problem(f"{action}: {error.strerror} ({error.filename or self._home.path})")
        return Refusal(f"the device cannot write or read its files: {error.strerror}")

    def sent(self, action: str, size: int, seconds: float) -> None:
        """Stores the upload rate; smaller answers measure delay rather than bandwidth."""
        if action == TRAIN and size >= LEAST_MEASURED_BYTES:
            self._planned.uplink = size / max(seconds, 1e-3)
            write_private(self._home.path / "uplink", f"{self._planned.uplink:.0f}\n")

    def _answer(self, request: Request) -> bytes | Refusal:
        if request.action == ACTION:
            return self._register(decode(request.parts[0], Registration, limit=MAX_REGISTRATION_BYTES))
        terms = self._planned.terms
        if terms is None:  # registered by an earlier process
            terms = JobManifest.read(self._memory.manifest, self._home.fleet.key, self._now()).terms
            self._take_on(terms)
        secure, name = terms.job.secure_aggregation.enabled, self._home.config.name
        handler = self._secure_handler if secure else self._clear_handler
        if request.action == (query(OPEN) if secure else TRAIN) and (condition := self._sits_out()):
            self._report.problem(f"{request.action}: sits out: {condition}")
            return Refusal(f"sits out: {condition}", sits_out=True)
        if request.action == EVALUATE and not self._home.config.scores:
            return Refusal("this device scores nothing for a server; its owner may join with --scores")
        if request.action == query(VOTE):
            return self._vote(handler, request, terms.digest)
        if request.action != TRAIN:
            return handler(name, request)
        with self._planned.watched():
            payload = handler(name, request)
        self._report.tell(plan=self._planned.to_json())
        self._report.show(f"trained for {self._planned.took.seconds or 0.0:.1f} s")
        return payload

    def _register(self, registration: Registration) -> bytes:
        before, after = self._home.renew_fleet(registration.fleet, self._now())
        if line := _difference(before, after):
            self._report.show(line)
        manifest = JobManifest.read(registration.manifest, after.key, self._now())
        terms = manifest.terms
        if not (terms.job.secure_aggregation.enabled or self._home.config.allow_clear):
            raise UpdateError(
                "this device takes part in secure aggregation only; its owner may join with --allow-clear"
            )
        if self._home.config.bounds.max_epsilon is not None and terms.job.privacy.mode != "distributed":
            raise PolicyError("devices add no noise in this job, and max_epsilon asks for it")
        self._memory.begin(terms.digest, manifest.data)
        outcome = self._take_on(terms)
        reply = RegistrationReply(
            version=PROTOCOL_VERSION,
            software=version("fedtune"),
            fleet_number=after.number,
            cores=os.cpu_count() or 0,
            memory_mb=psutil.virtual_memory().total >> 20,
            accelerator=outcome.machine.gpus[0].name if outcome.machine.gpus else "",
            sits_out=self._sits_out(),
            rank=outcome.plan.tier,
            weights=outcome.plan.choices.weights,
            sequence_length=outcome.plan.sequence_length,
            peak_mb=max(1, round(two_digits(outcome.plan.memory.peak / 1e6))),
            seconds=two_digits(outcome.seconds_per_round),
        )
        return encode(reply)

    def _take_on(self, terms: JobTerms) -> Outcome:
        """Plans for a job, and ends the open rounds of the job before it."""
        try:
            return self._planned.take_on(terms)
        finally:
            if self._planned.must_reload:
                self._make_handlers()
            self._report.tell(plan=self._planned.to_json())

    def _make_handlers(self) -> None:
        planned = self._planned
        device = Device(
            planned.open_trainer,
            planned.load_examples,
            self._memory,
            planned.share,
            agreed=lambda: planned.terms,
        )
        self._secure_handler = handle_under_secure_aggregation(device, self._credentials)
        self._clear_handler = handle_in_the_clear(device)  # reached only where the owner allows it, see `_register`

    def _vote(self, handler: Handler, request: Request, job: str) -> bytes:
        """Votes for a sum, and warns the owner once if it is of nearly the same clients as the one before."""
        earlier = self._home.round_log.of(job).survivors
        payload = handler(self._home.config.name, request)
        latest = self._home.round_log.of(job).survivors[-1]
        apart = len(set(latest).symmetric_difference(earlier[-1])) if earlier else 0
        if 0 < apart < self._home.config.bounds.min_cohort and not self._report.status.warning:
            warning = (
                f"two sums of a job are of clients that differ by {apart}: their difference is about those alone; see "
                "min_difference in docs/secure-aggregation.md"
            )
            self._report.show(warning)
            self._report.tell(warning=warning)
        return payload

    def _sits_out(self) -> str:
        """Returns the owner's condition that keeps the device from training now, or ""."""
        obstacle = not_now(self._sensors(), self._home.config.requirements)
        self._report.tell(sits_out=obstacle.reading if obstacle else "")
        return obstacle.condition if obstacle else ""

    def _credentials(self, client: str) -> Credentials:
        del client  # a device has one client
        home = self._home
        return Credentials(
            home.identity, home.fleet.roster, policy_of(home.config.bounds, self._planned.terms), home.round_log
        )

    def _uplink_before(self) -> float | None:
        try:
            return float(max(1, int((self._home.path / "uplink").read_text())))
        except (OSError, ValueError):
            return None


def policy_of(bounds: Bounds, terms: JobTerms | None) -> Policy:
    """Returns the policy for secure rounds that follows from an owner's bounds, and from a job's privacy budget."""
    privacy = terms.job.privacy if terms else PrivacySettings()
    allowed = [bounds.max_rounds, privacy.participations if privacy.mode != "off" else None]
    return Policy(
        bounds.max_corrupt,
        bounds.min_cohort,
        max_sums=min((most for most in allowed if most is not None), default=None),
        min_difference=bounds.min_difference,
        rho=rho_of_round(privacy) if privacy.mode == "distributed" else 0.0,
        most_rho=None if bounds.max_epsilon is None else largest_rho(bounds.max_epsilon, OWNER_DELTA),
    )


def _difference(before: Fleet, after: Fleet) -> str:
    """Returns a line for the owner of the device about what changed in the fleet, or ""."""
    if before.number == after.number:
        return ""
    joined, left = sorted(after.devices.keys() - before.devices), sorted(before.devices.keys() - after.devices)
    parts = [f"{what}: {_some(names)}" for what, names in (("joined", joined), ("revoked", left)) if names]
    if before.number and before.key != after.key:
        parts.append(f"the owner's key is now {fingerprint(after.key)}")
    changes = "; ".join(parts) or "renewed"
    return f"fleet, entry {after.number}: {counted(len(after.devices), 'device')}; {changes}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
