"""The command line: help with examples, mistakes in one line, exit status 0, 1, 2 or 130."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from fedtune.core.errors import RunError, install_line
from fedtune.core.job.job_file import load_job
from fedtune.core.job.settings import BUNDLED, Job
from fedtune.demo import BASE_DIRECTORY, JOB
from fedtune.model.adapted_model import adapter_layout
from fedtune.model.base_model import load_base
from fedtune.server import cli
from fedtune.server.export.request import ExportRequest
from fedtune.server.run_display import Display


def run(*arguments: str, programs: cli.Programs | None = None) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments, programs)
    return int(caught.value.code or 0)


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every command of the tree, with the words that call it."""
    yield path, command
    for name, part in getattr(command, "commands", {}).items():
        yield from commands(part, *path, name)


@pytest.mark.parametrize(("path", "command"), list(commands(typer.main.get_command(cli.app))), ids=str)
def test_every_command_explains_itself_and_all_that_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: tuple[str, ...], command: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run(*path, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage: " in shown
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no help"
        assert parameter.help.replace("`", "")[:20] in shown


def test_help_explains_arguments_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--help") == 0
    assert "The directory of a finished run" in capsys.readouterr().out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["simulate", "none.toml"], "none.toml: cannot be read"),
        (["simulate", "--set", "federation.rounds=many"], "federation.rounds: expected a valid integer"),
        (
            ["simulate", "--set", "training.learning_rate=1e15"],
            "training.learning_rate: expected less than or equal to 1000",
        ),
        (["plan", "--no-try", "--set", "adapter.rank=300"], "adapter.rank is 300, but"),
        (["plan", "--no-try", "--set", 'adapter.target_modules=["zzz"]'], "zzz matches no linear layer"),
        (["simulate", "--set", "model.base=/nowhere"], "/nowhere: not a directory"),
        (["simulate", "--set", "data.train=/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
        (["resume", "/nowhere"], "/nowhere: not a run directory"),
        (["report", "/nowhere"], "/nowhere: not a run directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_mistyped_command_has_one_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("simulat",), ("server", "submi"), ("fleet", "sig"), ("client", "joi"), ("privacy", "pla")):
        assert run(*words) == 2
        assert capsys.readouterr().err.count("Did you mean") == 1


def test_the_shell_can_complete_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_FEDTUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fedtune fleet si")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setattr(sys, "argv", ["fedtune"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.split() == ["sign"]


@pytest.mark.parametrize("command", [("simulate",), ("server", "submit"), ("fleet", "sign")], ids=" ".join)
def test_an_adapter_that_does_not_fit_is_refused_before_the_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.setenv("FEDTUNE_SERVER_HOME", str(tmp_path / "server"))
    monkeypatch.setenv("FEDTUNE_FLEET_HOME", str(tmp_path / "owner"))
    run("server", "init", "--address", "localhost:8443")
    base = tmp_path / "base"  # has a configuration, and no weights
    base.mkdir()
    shutil.copy(BASE_DIRECTORY / "config.json", base)
    (tmp_path / "job.toml").write_text("")
    demo = ["--set", "data.train=demo", "--set", "data.evaluation=demo"]
    chosen = [str(tmp_path / "job.toml"), *demo, "--set", f"model.base={base}", "--set", "adapter.rank=300"]
    assert run(*command, *chosen) == 2
    assert capsys.readouterr().err.startswith("adapter.rank is 300, but")


def test_a_failed_run_is_exit_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fail(*arguments: Any) -> dict[str, Any]:
        raise RunError("the disk is full")

    assert run("simulate", "--out", str(tmp_path / "run"), programs=cli.Programs(simulate=fail)) == 1
    assert capsys.readouterr().err == "the disk is full\n"


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    assert run("simulate", "--out", str(tmp_path / "run"), programs=cli.Programs(simulate=fail)) == 2
    said = capsys.readouterr()
    assert said.err == f"this command needs the package torch. Install it with: {install_line('server')}\n"
    assert said.out == ""


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def interrupt(job: object, directory: Path, *arguments: Any) -> dict[str, Any]:
        directory.mkdir()
        (directory / "job.toml").touch()
        raise KeyboardInterrupt

    assert run("simulate", "--out", str(tmp_path / "run"), programs=cli.Programs(simulate=interrupt)) == 130
    assert f"go on with: fedtune resume {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(("made", "left"), [(False, "nothing was exported"), (True, "what is in {out}/int4 is whole")])
def test_ctrl_c_in_an_export_says_what_is_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made: bool, left: str
) -> None:
    def interrupt(request: ExportRequest, display: Display) -> list[Any]:
        if made:
            (request.out / "int4").mkdir(parents=True)
        raise KeyboardInterrupt

    out = tmp_path / "onnx"
    programs = cli.Programs(export=interrupt)
    assert run("export", "runs/first", "--format", "int4,fp32", "--out", str(out), programs=programs) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"interrupted; {left.format(out=out)}, and the run in runs/first is unchanged")
    assert error.endswith("An export cannot go on: give the same command again\n")


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    programs = cli.Programs(simulate=lambda *arguments: {"status": "finished"})
    assert run("simulate", "--json", "--out", str(tmp_path / "run"), programs=programs) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "finished"}


@pytest.mark.parametrize("command", ["simulate", "resume"])
def test_a_live_page_is_served_while_the_run_goes_on_and_its_address_is_beside_the_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    pages = []

    def look(display: Display) -> dict[str, Any]:
        display.begin(0, 3, 2, 0)
        (url,) = capsys.readouterr().err.removeprefix("live page at ").split()
        pages.append((url, httpx.get(url).status_code))
        return {"status": "finished"}

    programs = cli.Programs(
        simulate=lambda job, path, display, force, profile: look(display),
        resume=lambda path, display, profile: look(display),
    )
    where = ("--out", str(tmp_path / "run")) if command == "simulate" else (str(tmp_path / "run"),)
    assert run(command, "--page", "--json", *where, programs=programs) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "finished"}
    ((url, status),) = pages
    assert status == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


@pytest.mark.parametrize("override", ["adapter.kind=core", "adapter.kind=lora", "federation.aggregation=alternating"])
def test_a_plan_of_noise_counts_the_values_that_a_round_trains(
    capsys: pytest.CaptureFixture[str], override: str
) -> None:
    private = ["privacy.mode=distributed", "privacy.participations=2", "federation.clients_per_round=100", override]
    settings = [word for each in private for word in ("--set", each)]
    assert run("privacy", "plan", "--clients", "1000", "--json", *settings) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    job = load_job(JOB, private)
    layout = adapter_layout(load_base(job.model, precision="fp32"), job.adapter)
    trained = {"adapter.kind=core": "r", "adapter.kind=lora": "ab"}.get(override, "b")
    segment = layout.segment(trained)  # type: ignore[arg-type]
    assert values == segment.stop - segment.start


def test_runs_are_numbered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    chosen: list[Path] = []

    def note(job: object, directory: Path, *arguments: Any) -> dict[str, Any]:
        chosen.append(directory)
        return {}

    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    run("simulate", "--quiet", programs=cli.Programs(simulate=note))
    assert chosen == [Path("runs/demo-2")]


def test_a_simulation_is_profiled_only_where_that_is_asked_for(tmp_path: Path) -> None:
    profiled: list[bool] = []

    def note(job: Job, directory: Path, display: Display, force: bool, profile: bool) -> dict[str, Any]:
        profiled.append(profile)
        return {}

    def note_rest(directory: Path, display: Display, profile: bool) -> dict[str, Any]:
        profiled.append(profile)
        return {}

    programs = cli.Programs(simulate=note, resume=note_rest)
    for options in ((), ("--profile",)):
        run("simulate", "--quiet", "--out", str(tmp_path), *options, programs=programs)
        run("resume", "--quiet", str(tmp_path), *options, programs=programs)
    assert profiled == [False, False, True, True]


def test_a_path_on_the_command_line_starts_at_the_job_s_folder_or_without_one_at_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "job.toml").write_text('[model]\nbase = "demo"\n')
    jobs: list[Job] = []

    def note(job: Job, *arguments: Any) -> dict[str, Any]:
        jobs.append(job)
        return {}

    for named in ((), ("jobs/job.toml",)):
        run("simulate", *named, "--quiet", "--set", "data.train=mine.jsonl", programs=cli.Programs(simulate=note))
    assert [job.data.train for job in jobs] == [str(tmp_path / "mine.jsonl"), str(tmp_path / "jobs" / "mine.jsonl")]


@pytest.mark.parametrize("fleet", ["bundled", "mine.toml"])
def test_a_fleet_is_a_file_or_the_bundled_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fleet: str) -> None:
    monkeypatch.chdir(tmp_path)
    jobs: list[Job] = []

    def note(job: Job, *arguments: Any) -> dict[str, Any]:
        jobs.append(job)
        return {}

    run("simulate", "--quiet", "--fleet", fleet, programs=cli.Programs(simulate=note))
    assert [job.simulation.fleet for job in jobs] == [fleet if fleet == BUNDLED else str(tmp_path / fleet)]
