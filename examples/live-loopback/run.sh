#!/usr/bin/env bash
# A live federation on this machine: a server and three devices, each a process of its own, over TLS on loopback. Then
# the same job is simulated, and the two adapters are compared: they are the same, bit for bit.
#
#     examples/live-loopback/run.sh [FOLDER]          # with fedtune on the PATH; one to two minutes on two cores
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$(mktemp -d)}
port=${FEDTUNE_PORT:-9443}
mkdir -p "$folder"
cd "$folder"
processes=()

finish() {  # by the pids that were started here, and no others
    status=$?
    for pid in "${processes[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${processes[@]}"; do wait "$pid" 2>/dev/null || true; done
    exit "$status"
}
trap finish EXIT INT TERM

cp "$here/job.toml" job.toml
"$(dirname "$(command -v fedtune)")/python" - <<'PYTHON'
from pathlib import Path

from fedtune.demo import write_federation

write_federation(Path("data"), 3, 0, 60)  # three households, seed 0, 60 examples each
PYTHON

echo "== the cloud: a server with its own certificate authority; this machine plays the fleet's owner too"
export FEDTUNE_FLEET_HOME=owner
fedtune server init --home cloud --address "127.0.0.1:$port" --listen 127.0.0.1
fedtune server start --home cloud >server.log 2>&1 &
processes+=($!)

echo "== the edge: each device makes its keys, joins with its own data, and starts"
for name in 000 001 002; do
    # Without --no-try a device also checks its plan with one real training step; for three at once that takes a while.
    fedtune client join cloud/invitation.json --name "$name" --data "data/clients/$name.jsonl" --home "device-$name" --no-try
    fedtune client start --home "device-$name" >"device-$name.log" 2>&1 &
    processes+=($!)
done

echo "== the owner approves the devices"
fedtune fleet approve --all --server-home cloud

echo "== a job"
fedtune server submit job.toml --name first --home cloud --wait
fedtune server status --home cloud
fedtune server stop --home cloud

echo "== the same job, simulated"
fedtune simulate job.toml --out simulated --quiet
digest() { sed -n 's/^ *"adapter_digest": "\([0-9a-f]*\)".*/\1/p' "$1/summary.json"; }
live=$(digest cloud/runs/first)
simulated=$(digest simulated)
echo "adapter, live:      $live"
echo "adapter, simulated: $simulated"
[ "$live" = "$simulated" ]
echo "the same, bit for bit"
