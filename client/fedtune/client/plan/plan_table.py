"""A table of a plan for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fedtune.client.plan.device_plan import Outcome
from fedtune.client.plan.planner import megabytes
from fedtune.client.plan.step_costs import PACK_WEIGHTS
from fedtune.core.text import counted


def print_plan(console: Console, outcome: Outcome) -> None:
    """Prints the device, the plan, the prediction, and the measurements of a trial step."""
    machine, plan, choices = outcome.machine, outcome.plan, outcome.plan.choices
    table = Table(title=f"plan for {outcome.shape.name}", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("")
    table.add_row(
        "processor", f"{machine.processor}, {counted(machine.cores, 'core')} ({', '.join(machine.instructions)})"
    )
    for gpu in machine.gpus:
        capability = ".".join(map(str, gpu.capability))
        table.add_row("GPU", f"{gpu.name}, {megabytes(gpu.free)} of {megabytes(gpu.total)} free, {capability}")
    source = "" if machine.memory_source == "machine" else f" ({machine.memory_source})"
    table.add_row("memory", f"{megabytes(machine.memory_free)} of {megabytes(machine.memory_total)} free{source}")
    table.add_row("disk", f"{megabytes(machine.disk_free)} free")
    table.add_row("battery", "none" if machine.battery is None else _battery(machine.battery, machine.charging))
    table.add_row("temperature", "not exposed" if machine.temperature is None else f"{machine.temperature:.0f} °C")
    table.add_section()
    table.add_row("trainer", outcome.trainer)
    table.add_row("weights", _weights(outcome))
    table.add_row("arithmetic", f"{choices.precision}, {counted(choices.threads, 'thread')}")
    table.add_row("rank", f"{plan.tier} of {choices.rank}")
    longest = f"{choices.sequence_length} tokens, the longest example"
    cut = f"{plan.sequence_length} tokens, to which examples are cut"
    table.add_row("sequence length", longest if choices.sequence_length < plan.sequence_length else cut)
    table.add_row("micro-batch", f"{choices.tokens} tokens, {plan.accumulation} of them a step")
    table.add_row("gradient checkpointing", "on" if choices.checkpointing else "off")
    table.add_section()
    memory = plan.memory
    parts = (("weights", memory.weights), ("adapter", memory.adapter), ("activations", memory.activations))
    listed = ", ".join(f"{name} {megabytes(size)}" for name, size in (*parts, ("working", memory.working)) if size)
    table.add_row("predicted memory", f"{megabytes(memory.training)}: {listed}")
    table.add_row("while loading", megabytes(memory.loading))
    if memory.mapped:
        table.add_row("beside that", f"{megabytes(memory.mapped)} of weights mapped from a file; dropped where tight")
    table.add_row("allowed", f"{megabytes(plan.budget)} beside {megabytes(outcome.runtime)} of program")
    table.add_row(
        "predicted time", f"{outcome.seconds_per_step:.2f} s a step, {outcome.seconds_per_round:.1f} s a round"
    )
    table.add_row("bytes a round", f"{plan.bytes_up:,} up, {plan.bytes_down:,} down")
    if outcome.measured and outcome.predicted_measured:
        peak, seconds = outcome.predicted_measured
        measured = outcome.measured
        table.add_section()
        table.add_row(
            "one real step, memory",
            f"predicted {megabytes(peak)}, measured {megabytes(measured.peak)} ({peak / measured.peak - 1:+.0%})",
        )
        table.add_row(
            "one real micro-batch, time", f"predicted {seconds:.2f} s, measured {measured.step_seconds:.2f} s"
        )
    console.print(table)


def _weights(outcome: Outcome) -> str:
    choices = outcome.plan.choices
    if choices.weights in PACK_WEIGHTS:
        use = "mapped" if choices.weights == "mapped" else "unpacked once"
        return f"{choices.quantization}, {use} from an edge pack"
    if choices.quantization == "none":
        return "as they are"
    if choices.weights == "dequantized":
        return f"{choices.quantization}, dequantized once"
    unpacking = "bitsandbytes" if outcome.native_unpacking else "torch"
    if choices.quantization == "nf4" and not outcome.native_unpacking:
        unpacking += " (bitsandbytes does not work here)"
    return f"{choices.quantization}, packed, unpacked by {unpacking}"


def _battery(percent: float, charging: bool | None) -> str:
    return f"{percent:.0f}%, {'charging' if charging else 'not charging'}"
