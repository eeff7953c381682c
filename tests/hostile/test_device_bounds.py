"""A live device enforces bounds by itself against its server, across `leave` and a new `join`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from fedtune.client.client_commands import leave, status
from fedtune.client.live.device_home import ROUNDS, ClientHome
from fedtune.client.live.device_status import DeviceReport
from fedtune.client.live.registered_device import RegisteredDevice, policy_of
from fedtune.client.owner_bounds import DEFAULT_BOUNDS, Bounds
from fedtune.client.plan.eligibility import Consent
from fedtune.core.errors import InputError, PolicyError
from fedtune.core.host.clock import SYSTEM_CLOCK
from fedtune.core.job.job_file import load_job
from fedtune.core.manifest.job_terms import JobTerms
from fedtune.core.manifest.joining import Invitation, JoinRequest, PrivateKeys
from fedtune.core.privacy.budget import rho_of_round
from fedtune.core.privacy.guarantee import largest_rho
from fedtune.core.protocol.messages import PROTOCOL_VERSION, VOTE, Base, Refusal, Request, encode, query
from fedtune.core.protocol.registration import ACTION, Registration
from fedtune.core.secagg import Identity, Policy, RoundMark, Served
from fedtune.server.fleet.owner_home import OwnerHome

BASE = Base("demo", "0" * 64, "nf4", 40, 32.0, ("all-linear",), 256, "core", "1" * 64)

INVITATION = Invitation("localhost:8443", "", Identity(b"\x01" * 32).public)
OTHER_FLEET = replace(INVITATION, fleet_key=Identity(b"\x02" * 32).public)


def joined(
    folder: Path, name: str = "ada", invitation: Invitation = INVITATION, bounds: Bounds = DEFAULT_BOUNDS
) -> ClientHome:
    data = folder / "mine.jsonl"
    data.write_text('{"text": "a"}\n')
    return ClientHome.join(folder / "device", invitation, name, data, consent=Consent(bounds=bounds))


def test_a_device_that_leaves_and_joins_its_fleet_again_knows_what_it_has_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = joined(tmp_path)
    first.round_log.record("job", Served().masked(3))
    leave(first.path)
    assert f"kept {first.path / ROUNDS}" in capsys.readouterr().out
    assert [each.name for each in first.path.iterdir()] == [ROUNDS]
    again = joined(tmp_path, "bob")
    assert again.round_log.of("job").last > RoundMark(3, 0)
    leave(again.path)
    assert joined(tmp_path, invitation=OTHER_FLEET).round_log.of("job") == Served()


def test_a_device_that_served_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = joined(tmp_path)
    assert home.round_log.of("job") == Served()
    leave(home.path)
    assert not home.path.exists()
    assert "kept" not in capsys.readouterr().out
    with pytest.raises(InputError, match="there is no device here"):
        leave(home.path)


def test_a_folder_that_cannot_be_read_can_be_left_and_stays_a_log(tmp_path: Path) -> None:
    home = joined(tmp_path)
    home.round_log.record("job", Served().masked(3))
    (home.path / "device.json").write_text("{}")
    with pytest.raises(InputError, match="leave and join again"):
        ClientHome(home.path)
    leave(home.path)
    assert joined(tmp_path).round_log.of("job").sums == 1


def test_a_fleet_that_grows_beyond_its_owners_bound_is_refused_with_the_remedy(tmp_path: Path) -> None:
    owner = OwnerHome.create(tmp_path / "owner")
    home = joined(tmp_path, "ada", Invitation("localhost:8443", "", owner.first_key), Bounds(max_devices=2))
    assert home.request is not None
    owner.approve([home.request, JoinRequest.make("bob", PrivateKeys.generate())])
    home.renew_fleet(owner.log, time.time())
    held = home.fleet
    owner.approve([JoinRequest.make("ghost", PrivateKeys.generate())])
    with pytest.raises(PolicyError, match="3 devices, more than max_devices = 2"):
        home.renew_fleet(owner.log, time.time())
    assert home.fleet == held
    planned: Any = SimpleNamespace(open_trainer=None, load_examples=None, share=None, terms=None)
    report = DeviceReport(home.path, "ada", "localhost:8443", lambda line: None, SYSTEM_CLOCK)
    registration = encode(Registration(PROTOCOL_VERSION, "0.1", b"", owner.log))
    outcome = RegisteredDevice(home, planned, report).answer(Request(ACTION, "1", (registration,)))
    assert isinstance(outcome, Refusal)
    assert "3 devices, more than max_devices = 2" in outcome.reason
    assert "in its device.json" in outcome.reason


def test_a_fleets_log_is_replayed_when_it_has_changed_and_not_before(tmp_path: Path) -> None:
    owner = OwnerHome.create(tmp_path / "owner")
    home = joined(tmp_path, "ada", Invitation("localhost:8443", "", owner.first_key))
    assert home.request is not None
    owner.approve([home.request])
    _, after = home.renew_fleet(owner.log, time.time())
    assert home.fleet is after
    assert home.renew_fleet(owner.log, time.time()) == (after, after)
    owner.approve([JoinRequest.make("bob", PrivateKeys.generate())])
    ClientHome(home.path).renew_fleet(owner.log, time.time())  # another process
    assert sorted(home.fleet.devices) == ["ada", "bob"]
    (home.path / "fleet.jsonl").write_bytes(owner.log[:-2])
    with pytest.raises(InputError, match="cut off"):
        _ = home.fleet


def test_a_jobs_privacy_budget_is_the_policy_of_a_device_and_its_owners_may_be_smaller() -> None:
    private = ["privacy.mode=distributed", "privacy.participations=3"]
    terms = JobTerms(load_job(None, [*private, "training.learning_rate=0.01"]), BASE)
    policy = policy_of(Bounds(max_epsilon=2.0), terms)
    assert (policy.max_sums, policy.rho) == (3, rho_of_round(terms.job.privacy))
    assert policy.most_rho == largest_rho(2.0, 1e-6)
    assert policy_of(Bounds(max_rounds=2), terms).max_sums == 2
    central = JobTerms(load_job(None, ["privacy.mode=central", "training.learning_rate=0.01"]), BASE)
    assert policy_of(Bounds(), central).rho == 0.0


def test_an_owners_bounds_are_the_policy_of_its_device_and_in_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = Bounds(5, 0.3, 20, 7, 4)
    home = joined(tmp_path, bounds=bounds)
    assert ClientHome(home.path).config.bounds == bounds
    assert policy_of(bounds, None) == Policy(0.3, 5, max_sums=7, min_difference=4)
    assert policy_of(Bounds(), None) == Policy()
    planned: Any = SimpleNamespace(open_trainer=None, load_examples=None, share=None, terms=None)
    report = DeviceReport(home.path, "ada", "localhost:8443", lambda line: None, SYSTEM_CLOCK)
    assert RegisteredDevice(home, planned, report)._credentials("ada").policy == policy_of(bounds, None)
    with pytest.raises(typer.Exit):
        status(home=home.path)
    shown = "min_cohort 5, max_corrupt 0.3, max_devices 20, max_rounds 7, min_difference 4, max_epsilon none"
    assert f"bounds: {shown}" in capsys.readouterr().out


def test_two_sums_in_a_row_that_differ_by_few_clients_are_a_warning_to_the_owner_once(tmp_path: Path) -> None:
    home, lines = joined(tmp_path), list[str]()
    terms = SimpleNamespace(digest="job", job=SimpleNamespace(secure_aggregation=SimpleNamespace(enabled=True)))
    planned: Any = SimpleNamespace(open_trainer=None, load_examples=None, share=None, terms=terms)
    report = DeviceReport(home.path, "ada", "localhost:8443", lines.append, SYSTEM_CLOCK)
    work = RegisteredDevice(home, planned, report)

    def vote(*survivors: str) -> None:
        def handler(name: str, request: Request) -> bytes:
            home.round_log.record("job", home.round_log.of("job").voted({name, *survivors}, keep=False))
            return b"vote"

        work._secure_handler = handler
        assert work.answer(Request(query(VOTE), "1", ())) == b"vote"

    vote("bob", "cid")
    vote("bob", "cid")
    vote("dan", "eve", "fay")
    assert (lines, report.status.warning) == ([], "")
    vote("dan", "eve")
    vote("dan", "eve", "fay")
    assert len(lines) == 1
    assert "two sums of a job are of clients that differ by 1" in report.status.warning


@pytest.mark.parametrize("wrong", [{"min_cohort": 2}, {"max_corrupt": 1.0}, {"max_rounds": True}, {"more": 1}])
def test_bounds_that_are_none_are_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = joined(tmp_path).path / "device.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "bounds": {**asdict(Bounds()), **wrong}}))
    with pytest.raises(InputError, match="damaged, or of another release; leave and join again"):
        ClientHome(path.parent)


def test_a_device_of_a_release_without_bounds_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = joined(tmp_path).path / "device.json"
    content = json.loads(path.read_text())
    del content["bounds"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="of another release; leave and join again"):
        ClientHome(path.parent)
