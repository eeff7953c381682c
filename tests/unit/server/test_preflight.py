"""A simulation that cannot begin is refused from its job and files alone."""

from __future__ import annotations

from fedtune.core.job.job_file import load_job
from fedtune.data.job_inputs import JobInputs
from fedtune.server.preflight import simulation_problems


def test_a_private_job_whose_clients_take_part_too_rarely_is_refused_before_a_base_is_loaded() -> None:
    job = load_job(None, ["privacy.mode=distributed"])
    (problem,) = simulation_problems(JobInputs(job))
    assert "privacy.participations is" in str(problem)
    enough = load_job(None, ["privacy.mode=distributed", f"privacy.participations={job.federation.rounds}"])
    assert list(simulation_problems(JobInputs(enough))) == []
