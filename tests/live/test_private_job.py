"""A private job in real processes: devices add the noise, count what it spends, and refuse what is beyond it."""

from __future__ import annotations

import pytest
from live_helpers import Fleet, MakeFleet
from lone_device import device_of, manifest

from fedtune.client.live.device_home import ClientHome
from fedtune.core.job.settings import PrivacySettings
from fedtune.core.privacy.budget import rho_of_round
from fedtune.core.protocol.messages import Refusal, encode
from fedtune.core.protocol.registration import ACTION, PROTOCOL_VERSION, Registration
from fedtune.server.live.enrolled_devices import Devices
from fedtune.server.run_directory import read_summary

PRIVATE = ("privacy.mode=distributed", "privacy.epsilon=60", "privacy.participations=2", "privacy.delta=1e-3")


def test_devices_count_every_round_of_a_private_job(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(3)
    fleet.join()
    run = fleet.submit(*PRIVATE, "federation.clients_per_round=1.0")
    fleet.start_server()
    fleet.start_devices()
    rounds = fleet.finished(run)
    assert [line["survivors"] for line in rounds] == [fleet.names, fleet.names]
    assert [line["train_loss"] for line in rounds] == [None, None]
    summary = read_summary(run)["privacy"]
    assert (summary["participations"], round(summary["epsilon"], 6)) == (2, 60.0)
    share = rho_of_round(PrivacySettings("distributed", 60.0, 1e-3, 2))
    for name in fleet.names:
        assert ClientHome(fleet.client_home(name)).round_log.rho == pytest.approx(2 * share)


def test_a_device_whose_owner_bounds_epsilon_takes_no_job_without_noise(make_fleet: MakeFleet) -> None:
    fleet: Fleet = make_fleet(2)
    fleet.join()
    device, honest = device_of(fleet, fleet.names[0]), manifest(fleet)
    config = ClientHome(fleet.client_home(fleet.names[0])).path / "device.json"
    config.write_text(config.read_text().replace('"max_epsilon": null', '"max_epsilon": 2.0'))
    device = device_of(fleet, fleet.names[0])
    registration = Registration(PROTOCOL_VERSION, "0.1", honest.data, Devices.load(fleet.home).log)
    outcome = device.ask(ACTION, encode(registration))
    assert isinstance(outcome, Refusal)
    assert "devices add no noise in this job" in outcome.reason
    assert "max_epsilon 2.0" in outcome.reason
