"""How long does it take to load a base model quantized, beside transformers with bitsandbytes?

    python benchmarks/random_llama.py /tmp/llama --tokenizer SmolLM2-135M --size 1.1B
    python benchmarks/loading/run.py --base /tmp/llama

Each way loads in a process of its own, after its libraries, and once before without being measured, so that the file is
in memory. Seconds are the shortest of all repetitions; peak memory is the process's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("fedtune, packed", "fedtune, dequantized", "transformers + bitsandbytes, packed", "transformers, not quantized")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the base model's directory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measured(options.way, options.base, options.device, options.threads)))
        return
    print("| way | seconds | peak memory, MB |\n| --- | --- | --- |")
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        runs = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            for _ in range(1 + options.repeat)
        ][1:]
        seconds, peak = min(run["seconds"] for run in runs), max(run["peak"] for run in runs)
        print(f"| {way} | {seconds:.2f} | {peak / 1e6:.0f} |", flush=True)


def measured(way: str, base: Path, device: str, threads: int) -> dict[str, float]:
    """Loads once in this process, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.llama import modeling_llama  # noqa: F401

    from fedtune.core.job.settings import ModelSettings
    from fedtune.model.base_model import load_base

    torch.set_num_threads(threads)
    torch.zeros(1, device=device)
    start = time.perf_counter()
    if way.startswith("fedtune"):
        held = "packed" if way.endswith("packed") else "dequantized"
        load_base(ModelSettings(str(base)), weights=held, precision="bf16", device=device)  # type: ignore[arg-type]
    else:
        quantized = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.bfloat16,
            device_map=device,
            quantization_config=quantized if way.endswith("packed") else None,
        )
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


if __name__ == "__main__":
    main()
