"""The results of a device, as digests and numbers, to be compared between machines of different kinds.

    python benchmarks/edge/portable.py PACK MODEL > here.json        # an edge pack and an int4 export of the demo
    python benchmarks/edge/portable.py --compare here.json there.json

The codec, the noise and the masks must agree to the bit. A local round of training and an exported model compute with
other instructions on another processor: the update must agree up to rounding, and the answers word by word.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.client.inference.exported_model import ExportedModel, Sampling, read
from fedtune.client.onnx.onnx_trainer import open_trainer
from fedtune.client.trainer import LocalTask
from fedtune.core.codec.downlink import encode_change, rounded
from fedtune.core.codec.update_forms import FORMS
from fedtune.core.codec.uplink import factor_terms
from fedtune.core.job.local_work import TrainingSettings, local_work
from fedtune.core.job.settings import AdapterSettings
from fedtune.core.protocol.messages import Uplink
from fedtune.core.secagg.masking import add_masks
from fedtune.data.examples import load_examples
from fedtune.demo import write_federation

ADAPTER = AdapterSettings(kind="core", rank=24, alpha=32.0)
PROMPTS = ("turn on the kitchen light", "water the lavender", "bake for 25 minutes at 180 degrees")
TOLERANCE = 2e-2  # of the update's norm: AdamW steps as far along a tiny gradient, whose sign rounding may decide


def computed(pack: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Returns the results of every part, and its seconds."""
    found: dict[str, Any] = {"machine": platform.machine(), "seconds": {}}

    def part(name: str, compute: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found[name] = compute()
        found["seconds"][name] = time.perf_counter() - start
        return found[name]

    write_federation(folder, 1, 0, 40, 4)
    trainer = open_trainer(pack, ADAPTER)
    layout = trainer.layout
    update = (np.random.default_rng(0).standard_normal(layout.size) * 1e-3).astype(np.float32)
    examples, _ = load_examples(folder / "clients" / "000.jsonl", trainer.tokenizer, 64)
    work = local_work(TrainingSettings(local_steps=5, learning_rate=0.01, batch_tokens=288), layout.factors)
    received = layout.initial(1)

    def payload(form: str, rho: float = 0.0) -> str:
        uplink = Uplink(form, 4, 0.05, False, 100, (0.5,), form == "ring", (), rho, (80,) if rho else ())
        (terms,) = factor_terms(uplink, layout, layout.factors, 7, 1)
        return _digest(FORMS[form].encode(update, terms, 3))

    def mask() -> str:
        words = np.zeros(10_000, dtype=np.uint16)
        add_masks(words, [bytes(range(32))])
        return _digest(words.tobytes())

    part("first adapter", lambda: _digest(received.tobytes()))
    part("fixed factors", lambda: layout.fixed_digest)
    for form in sorted(FORMS):
        part(f"update, {form}", partial(payload, form))
    part("update, ring with noise", lambda: payload("ring", 0.01))
    held = rounded(layout, received, received + update, 4)
    part("downlink", lambda: _digest(encode_change(received, held)))
    part("masks", mask)
    result = part("local round", lambda: trainer.train(examples, received, LocalTask(1, work)).update.tolist())
    assert np.any(result)
    part("evaluation", lambda: trainer.evaluate(received, examples[:10]).loss)
    part("answers", lambda: _answers(model))
    return found


def _answers(directory: Path) -> list[str]:
    model = ExportedModel(directory, threads=1)
    texts = []
    for prompt in PROMPTS:
        ids = model.encode(prompt)
        generator = model.generator(len(ids), Sampling(max_tokens=32))
        read(generator, ids)
        found: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        texts.append(model.decode(found))
    return texts


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compare(here: dict[str, Any], there: dict[str, Any]) -> bool:
    """Prints a table of both, and returns whether everything agrees."""
    print(f"| part | agreement | {here['machine']}, s | {there['machine']}, s |\n| --- | --- | --- | --- |")
    good = True
    for name in here["seconds"]:
        mine, other = here[name], there[name]
        if name in ("local round", "evaluation"):
            first, second = np.atleast_1d(mine), np.atleast_1d(other)
            gap = float(np.linalg.norm(first - second) / np.linalg.norm(first))
            same, said = gap < TOLERANCE, f"within {gap:.0e}"
        else:
            same = mine == other
            said = "equal" if same else f"DIFFERENT: {mine} and {other}"
        good = good and same
        print(f"| {name} | {said} | {here['seconds'][name]:.3f} | {there['seconds'][name]:.3f} |")
    return good


def main() -> None:
    if sys.argv[1] == "--compare":
        here, there = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[2:])
        sys.exit(0 if compare(here, there) else 1)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(computed(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder))))


if __name__ == "__main__":
    main()
