"""Whole federations in this process: the promises of a run and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation_helpers import EVALUATION, FinishedRun, Simulate, run, small_job

from fedtune.core.errors import DataError, InputError, ModelError, RunDirectoryError, RunError
from fedtune.core.protocol.messages import Handler, Request
from fedtune.server.run_directory import read_rounds, read_summary


def test_the_same_job_gives_the_same_adapter_bit_for_bit(whole: FinishedRun, simulate: Simulate) -> None:
    first, second = whole.summary, simulate(name="second")
    assert first["adapter_digest"] == second["adapter_digest"]
    assert first["eval_after"] == second["eval_after"]
    assert simulate("training.seed=1", name="other")["adapter_digest"] != first["adapter_digest"]


def test_a_run_leaves_what_the_design_promises(whole: FinishedRun) -> None:
    path, summary = whole.path, whole.summary
    assert read_summary(path) == summary
    lines = read_rounds(path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert summary["bytes"]["total"] == sum(line["bytes"]["up"] + line["bytes"]["down"] for line in lines)
    assert summary["fp32_fedavg_bytes"] == 4 * summary["adapter_parameters"] * (3 + 3) * 4
    assert [line["eval"] is not None for line in lines] == [False, True, False, True]
    assert len(lines[-1]["client_evaluations"]) == 4
    for name in ("job.toml", "report.html", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        assert (path / name).stat().st_size > 0
    assert f"base_digest = {summary['base_digest']}" in (path / "job.toml").read_text()
    assert sorted(directory.name for directory in (path / "checkpoints").iterdir()) == ["000003", "000004"]
    assert len(summary["answers"]) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Makes a run that trains long enough to learn something."""
    path = tmp_path_factory.mktemp("trained") / "run"
    return FinishedRun(path, run(small_job("training.local_steps=4"), path))


def test_training_lowers_the_loss(trained: FinishedRun) -> None:
    summary = trained.summary
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]


def test_a_ring_learns_in_the_clear(simulate: Simulate) -> None:
    summary = simulate("compression.form=ring", "training.local_steps=4")
    assert summary["eval_after"]["loss"] < summary["eval_before"]["loss"]


@pytest.mark.parametrize("aggregation", ["alternating", "fedavg"])
def test_alternating_moves_half_of_what_fedavg_sends_up(simulate: Simulate, aggregation: str, tmp_path: Path) -> None:
    one_round = ("federation.rounds=1", "data.evaluation=", "data.holdout=0")
    summary = simulate(f"federation.aggregation={aggregation}", "compression.preset=none", *one_round)
    up = read_rounds(tmp_path / "run")[0]["bytes"]["up_per_client"]
    share = up / (4 * summary["adapter_parameters"])
    assert share == pytest.approx(1.0 if aggregation == "fedavg" else 0.5, abs=0.15)


def test_balanced_training_changes_the_adapter_and_no_count_of_a_client(simulate: Simulate, tmp_path: Path) -> None:
    for client in range(2):
        rows = [
            {"prompt": f"{client} lamp {row} =>", "completion": " on", "kind": "rare" if row < 3 else "usual"}
            for row in range(15)
        ]
        (tmp_path / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (f"data.train={tmp_path}/*.jsonl", "federation.rounds=1", "data.evaluation=", "data.holdout=0.2")
    plain = simulate(*small, name="plain")
    one, other = (simulate(*small, "data.balance=kind", name=name) for name in ("one", "other"))
    assert one["adapter_digest"] == other["adapter_digest"] != plain["adapter_digest"]
    for name in ("plain", "one"):
        [line] = read_rounds(tmp_path / name)
        assert [client["examples"] for client in line["clients"]] == [12, 12]


def test_clients_that_vanish_or_raise_are_written_down_and_the_run_goes_on(simulate: Simulate, tmp_path: Path) -> None:
    summary = simulate("simulation.dropout=0.3", "simulation.failing=0.3", "federation.rounds=6", "data.evaluation=")
    assert summary["status"] == "finished"
    reasons = [
        client["dropped"] for line in read_rounds(tmp_path / "run") for client in line["clients"] if client["dropped"]
    ]
    assert any("the client vanished" in reason for reason in reasons)
    assert any("InjectedError: the client failed" in reason for reason in reasons)


def test_a_round_with_too_few_survivors_changes_nothing(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none of 2 rounds gave an aggregate.*6 times a client dropped out: .*vanished"):
        simulate("simulation.dropout=1.0", "federation.rounds=2")
    lines, summary = read_rounds(tmp_path / "run"), read_summary(tmp_path / "run")
    assert summary["status"] == "failed"
    assert all(line["aborted"] == "0 of 3 clients survived; at least 1 must" for line in lines)
    assert summary["eval_after"]["loss"] == summary["eval_before"]["loss"]
    assert summary["bytes"]["up"] > 0  # the last evaluation by clients still happens


def test_a_late_client_is_left_behind_at_the_deadline(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no answer before the deadline"):
        simulate(
            "simulation.slow=1.0", "simulation.slow_seconds=2", "federation.deadline=0.2", "federation.rounds=1",
            "federation.clients_per_round=1", "data.holdout=0",
        )  # fmt: skip
    assert read_rounds(tmp_path / "run")[0]["clients"][0]["dropped"] == "no answer before the deadline"


def test_an_existing_run_is_replaced_only_by_force(whole: FinishedRun, tmp_path: Path) -> None:
    path, job = whole.copied(tmp_path / "run"), small_job("federation.rounds=1")
    with pytest.raises(RunDirectoryError, match="exists already; choose another --out, or replace it with --force"):
        run(job, path)
    assert read_summary(path) == whole.summary
    run(job, path, force=True)
    assert read_summary(path)["rounds"] == 1


def test_a_directory_that_is_no_run_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="it is not a run directory"):
        run(small_job(), tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_data_never_leaves_a_client(simulate: Simulate, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    canary = "zanzibar-7419-canary"
    (tmp_path / "clients").mkdir()
    for name in ("ann", "bob"):
        rows = [{"prompt": f"{canary} {index} =>", "completion": f"{canary} {index}"} for index in range(8)]
        (tmp_path / "clients" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sent: list[bytes] = []

    def listening(handler: Handler) -> Handler:
        def handle(client: str, request: Request) -> bytes:
            sent.extend(request.parts)
            sent.append(handler(client, request))
            return sent[-1]

        return handle

    simulate(
        f"data.train={tmp_path}/clients/*.jsonl",
        "federation.clients_per_round=2",
        "simulation.failing=0.3",
        wrap=listening,
    )
    output = capfd.readouterr()
    needle = canary.encode()
    assert sent
    assert not any(needle in part for part in sent)
    assert canary not in output.out + output.err
    for path in (tmp_path / "run").rglob("*"):
        assert not (path.is_file() and needle in path.read_bytes()), path


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file; expected a data file"),
        ("", "empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"ann\.jsonl:2: "),
        ('{"question": "a"}\n', r"ann\.jsonl:1: "),
    ],
)
def test_bad_client_data_is_told_before_anything_is_written(
    tmp_path: Path, content: str | None, complaint: str
) -> None:
    path = tmp_path / "clients" / "ann.jsonl"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        run(small_job(f"data.train={tmp_path}/clients/*.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("partition", ["by-file", "iid"])
def test_bad_lines_that_are_skipped_are_counted(tmp_path: Path, partition: str) -> None:
    (tmp_path / "clients").mkdir()
    for name in ("ann", "ben", "cho"):
        good = [json.dumps({"prompt": f"{name} {number} =>", "completion": " yes"}) for number in range(4)]
        (tmp_path / "clients" / f"{name}.jsonl").write_text("\n".join([*good, "no JSON", ""]))
    data = (f"data.train={tmp_path}/clients/*.jsonl", f"data.partition={partition}", "data.clients=3")
    summary = run(small_job(*data, "data.skip_bad=true", "federation.rounds=1"), tmp_path / "run")
    assert (summary["records"]["read"], summary["records"]["bad"], summary["records"]["kept"]) == (15, 3, 12)


def test_a_base_that_is_no_model_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        run(small_job(f"model.base={tmp_path}/none"), tmp_path / "run")
    with pytest.raises(ModelError, match="matches no linear layer"):
        run(small_job('adapter.target_modules=["nope"]'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_adapter_loads_in_peft_and_reproduces_the_evaluation(trained: FinishedRun, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from fedtune.demo import BASE_DIRECTORY

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        BASE_DIRECTORY, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, trained.path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIRECTORY)
    losses = []
    for row in map(json.loads, EVALUATION.read_text().splitlines()):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            losses.append((float(model(input_ids=ids, labels=labels).loss), len(target)))
    theirs = np.average([loss for loss, _ in losses], weights=[count for _, count in losses])

    from fedtune.core.adapter.adapter_files import load_adapter
    from fedtune.data.examples import prepare
    from fedtune.data.population import evaluation_records
    from fedtune.model.scoring import evaluate
    from fedtune.server.simulation.simulation_context import SimulationContext

    job = small_job()
    ours = SimulationContext.begin(job, tmp_path / "clients").model
    ours.load(load_adapter(trained.path / "adapter", ours.layout))
    examples, _ = prepare(evaluation_records(job.data), ours.base.tokenizer, job.data.sequence_length)
    score = evaluate(ours, examples).loss
    assert score == pytest.approx(theirs, rel=1e-3)
    assert score == pytest.approx(trained.summary["eval_after"]["loss"], rel=1e-6)


def test_a_missing_evaluation_file_is_told_before_anything_is_written(simulate: Simulate, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        simulate(f"data.evaluation={missing}")
    assert not (tmp_path / "run").exists()
