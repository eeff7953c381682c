#!/bin/sh
# Installs what a lock names and then fedtune itself, with pip, into the environment of a Python program:
#
#     sh locked.sh /opt/fedtune/bin/python deploy/locks/client.txt "fedtune[client] @ file:///src"
#     sh locked.sh --extra-index-url URL [--torch-hash sha256:HEX] PYTHON LOCK REQUIREMENT
#
# Every file has to have one of the hashes in the lock, and nothing is built but fedtune, with a builder from
# build.txt beside the lock. pip's ordinary index serves all of it. Another index, and another hash, are for torch
# alone: builds for the CPU are not in the ordinary index, and do without the lock's CUDA libraries.
set -eu

fail() {
    printf 'locked.sh: %s\n' "$1" >&2
    exit 2
}

index='' torch_hash=''
while [ $# -gt 3 ]; do
    case $1 in
    --extra-index-url) index=$2 ;;
    --torch-hash) torch_hash=$2 ;;
    *) fail "$1: unknown option" ;;
    esac
    shift 2
done
[ $# -eq 3 ] || fail "expected PYTHON LOCK REQUIREMENT"
python=$1 lock=$2 requirement=$3
[ -r "$lock" ] || fail "$lock: cannot be read"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

pip_install() { # only what is named, whatever that asks for in turn: a lock is complete
    "$python" -m pip install --quiet --disable-pip-version-check --upgrade --no-deps "$@"
}

locked() { pip_install --require-hashes --only-binary :all: "$@"; }

if [ -z "$index$torch_hash" ]; then
    locked --requirement "$lock"
else
    awk '/^[^ \t]/ { theirs = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/ } !theirs' "$lock" >"$scratch/others.txt"
    locked --requirement "$scratch/others.txt"
    torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$lock")
    [ -n "$torch" ] || fail "$lock: names no torch"
    set --
    [ -z "$index" ] || set -- --extra-index-url "$index"
    if [ -n "$torch_hash" ]; then
        printf '%s --hash=%s\n' "$torch" "$torch_hash" >"$scratch/torch.txt"
        locked "$@" --requirement "$scratch/torch.txt"
    else
        printf 'locked.sh: %s is not checked by hash; give --torch-hash\n' "$torch" >&2
        pip_install --only-binary :all: "$@" "$torch"
    fi
fi
case $requirement in
*.whl) pip_install "$requirement" ;;
*)
    locked --requirement "$(dirname -- "$lock")/build.txt"
    pip_install --no-build-isolation "$requirement"
    ;;
esac
