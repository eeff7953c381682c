#!/bin/sh
# Runs what a device without torch runs on emulated 64-bit Arm, and compares it with this machine:
#
#     fedtune edge pack demo --out packs/demo                 # and an int4 export, as a run of the demo leaves it
#     sudo sh benchmarks/edge/aarch64.sh /tmp/arm packs/demo runs/demo-1/onnx/int4
#
# Needs Debian's debootstrap and qemu-user-static, uv, and about half an hour, most of it in the emulator. The folder
# keeps the Debian system and the packages for a second run.
set -eu
folder=$(realpath -m -- "$1") pack=$(realpath -- "$2") model=$(realpath -- "$3")
repository=$(cd -- "$(dirname -- "$0")/../.." && pwd)
root=$folder/root
python=$repository/.venv/bin/python

if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    zeros='\x00\x00\x00\x00\x00\x00\x00\x00' ones='\xff\xff\xff\xff\xff\xff\xff'
    printf '%s' ":qemu-aarch64:M::\\x7fELF\\x02\\x01\\x01\\x00$zeros\\x02\\x00\\xb7\\x00:$ones\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:/usr/bin/qemu-aarch64-static:F" |
        cat >/proc/sys/fs/binfmt_misc/register # in one write
fi
if [ ! -e "$root/usr/bin/python3" ]; then
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,ca-certificates bookworm "$root"
    chroot "$root" /debootstrap/debootstrap --second-stage
fi

rm -rf "$root/site" "$root/repository"
(cd "$repository" && "$repository/.venv/bin/uv" pip install --quiet --no-config --python-version 3.11 \
    --python-platform aarch64-manylinux_2_34 --only-binary :all: --no-binary fedtune --target "$root/site" \
    --constraint constraints.txt ".[edge,inference]" pytest hypothesis)
mkdir -p "$root/repository" "$root/pack" "$root/model"
(cd "$repository" && git archive HEAD tests tools benchmarks/edge pyproject.toml) | tar -x -C "$root/repository"
cp -r "$pack/." "$root/pack" && cp -r "$model/." "$root/model"

finish() { umount "$root/proc"; }
trap finish EXIT
mount --bind /proc "$root/proc" # onnxruntime reads it; with this machine's /sys as well, it crashes in the emulator
arm() { chroot "$root" /usr/bin/env PYTHONPATH=/site OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 /bin/sh -c "cd /repository && $1"; }
arm 'uname -m && python3 --version'
OMP_NUM_THREADS=1 "$python" "$repository/benchmarks/edge/portable.py" "$pack" "$model" >"$folder/here.json"
arm 'python3 benchmarks/edge/portable.py /pack /model' >"$folder/there.json"
"$python" "$repository/benchmarks/edge/portable.py" --compare "$folder/here.json" "$folder/there.json"
arm 'python3 -m pytest -q -p no:cacheprovider --hypothesis-profile=ci tests/unit/codec tests/unit/core tests/unit/manifest tests/unit/secagg'
