"""A lying server and a live device: without the owner's manifest, or beside it, the device does nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from live_helpers import Fleet, MakeFleet
from lone_device import Device, device_of, manifest
from owner import owner_of

from fedtune.core.manifest.job_manifest import JobManifest
from fedtune.core.protocol.messages import OPEN, Refusal, encode, query
from fedtune.core.protocol.registration import ACTION, PROTOCOL_VERSION, Registration
from fedtune.core.secagg.identity import Identity
from fedtune.server.live.enrolled_devices import Devices


@pytest.fixture
def fleet(make_fleet: MakeFleet) -> Fleet:
    fleet = make_fleet(2)
    fleet.join()
    return fleet


def offered(device: Device, fleet: Fleet, data: bytes) -> bytes | Refusal:
    """Returns the device's answer to a registration with this manifest."""
    roster = Devices.load(fleet.home).log
    return device.ask(ACTION, encode(Registration(PROTOCOL_VERSION, "0.1", data, roster)))


def test_a_job_that_the_owner_has_not_signed_is_refused(fleet: Fleet) -> None:
    device, terms = device_of(fleet, fleet.names[0]), manifest(fleet).terms
    forged = JobManifest.sign(Identity.generate(), "job", terms, time.time() + 60)
    outcome = offered(device, fleet, forged.data)
    assert isinstance(outcome, Refusal)
    assert outcome.reason == "the job manifest is not signed with this fleet's key"
    assert device.planned.terms is None


def test_a_manifest_that_has_expired_ends_the_job_also_for_a_device_that_starts_again(fleet: Fleet) -> None:
    name, key, honest = fleet.names[0], owner_of(fleet.home).key, manifest(fleet)
    late = JobManifest.sign(key, "job", honest.terms, time.time() - 1)
    outcome = offered(device_of(fleet, name), fleet, late.data)
    assert isinstance(outcome, Refusal)
    assert "has expired" in outcome.reason
    soon = JobManifest.sign(key, "job", honest.terms, time.time() + 5)
    assert not isinstance(offered(device_of(fleet, name), fleet, soon.data), Refusal)
    again = device_of(fleet, name, now=lambda: time.time() + 60)
    assert "has expired" in again.refusal(query(OPEN), b"", b"").reason


def test_the_terms_that_hold_are_those_of_the_manifest_and_not_of_one_without_a_signature(
    fleet: Fleet,
) -> None:
    device, honest = device_of(fleet, fleet.names[0]), manifest(fleet)
    assert not isinstance(offered(device, fleet, honest.data), Refusal)
    training = replace(honest.terms.job.training, learning_rate=1e-30)
    idle = replace(honest.terms, job=replace(honest.terms.job, training=training))
    spliced = JobManifest.sign(Identity.generate(), "job", idle, time.time() + 60)
    assert isinstance(offered(device, fleet, spliced.data), Refusal)
    assert device.planned.terms is not None
    assert device.planned.terms.digest == honest.terms.digest


def test_a_server_that_gives_a_job_another_name_finds_the_device_s_memory_of_it(fleet: Fleet) -> None:
    """The name that a server chose was the key of the round log, so another name began a known job again."""
    device, honest = device_of(fleet, fleet.names[0]), manifest(fleet)
    renamed = JobManifest.sign(owner_of(fleet.home).key, "another name", honest.terms, time.time() + 60)
    folders = []
    for data in (honest.data, renamed.data):
        assert not isinstance(offered(device, fleet, data), Refusal)
        folders.append(sorted(path.name for path in (fleet.client_home(fleet.names[0]) / "jobs").iterdir()))
    assert folders[0] == folders[1] == [honest.terms.digest[:24]]
