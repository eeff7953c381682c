"""The device's side loads no model library before a trainer is opened."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "fedtune.client.device",
    "fedtune.client.secure_rounds",
    "fedtune.client.client_store",
    "fedtune.client.trainer",
    "fedtune.client.client_commands",
    "fedtune.client.plan.backend",
    "fedtune.client.plan.step_costs",
    "fedtune.client.plan.device_plan",
    "fedtune.client.plan.eligibility",
    "fedtune.client.plan.machine",
    "fedtune.client.plan.plan_table",
    "fedtune.client.plan.planned_work",
    "fedtune.client.plan.planner",
    "fedtune.client.plan.step_costs",
    "fedtune.client.live.device_loop",
    "fedtune.core.job.settings",
    "fedtune.data.batches",
    "fedtune.data.examples",
    "fedtune.model.shape",
)


def test_devices_and_plans_are_imported_without_torch_and_transformers() -> None:
    program = f"""
import importlib, sys
for name in {MODULES!r}:
    importlib.import_module(name)
    loaded = {{"torch", "transformers", "peft"}} & set(sys.modules)
    assert not loaded, f"{{name}} imports {{loaded}}"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
