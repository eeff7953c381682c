#!/usr/bin/env bash
# Measures on a machine with one GPU, python, torch and transformers, and without a network: the tests for a GPU, loading,
# and training beside Trainer + PEFT and the published pattern. Prints tables as they come.
#
#     bash benchmarks/simulation/gpu.sh WHEELS SMOLLM2      # the folder of wheels, and the model's directory
#
# WHEELS has the packages that the machine lacks, for its Python, fetched elsewhere in a clone:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --dest WHEELS \
#         --constraint constraints.txt flwr bitsandbytes peft msgspec cryptography typer pydantic pytest hypothesis psutil
#
# and so on, until `pip check` on that machine names no other.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=$1 small=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv --system-site-packages "$folder/venv"
python="$folder/venv/bin/python"
"$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
"$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
"$python" -m pytest -m cuda tests/gpu || echo "a test for the GPU failed"
"$python" benchmarks/random_llama.py "$folder/large" --tokenizer "$small" --size 1.1B
"$python" benchmarks/loading/run.py --base "$folder/large" --device cuda --repeat 2
for base in "$small" "$folder/large"; do
    timeout 170 "$python" benchmarks/simulation/gpu.py --base "$base" --clients 2 || echo "out of time"
done
