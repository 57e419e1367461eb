#!/usr/bin/env bash
# Tokens per second on GSM8K: ours and, if given, what one would use instead, in turn and in one sitting.
#
#     scripts/bench_gsm8k.sh MODEL TRAIN_JSONL [PEERS]
#
# MODEL is a Hugging Face directory, TRAIN_JSONL has "question" and "answer" in every row. PEERS is a directory with
# trl_sft.py and torch_eager.py; PYTHON names an interpreter with torch, transformers and trl. ROUNDS (2), STEPS (12),
# ROWS (8 per step), MICRO_BATCHES (2) and WORKERS (2) can be set. Real tokens are counted, never padding; the first quarter of the steps
# is left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
model=$(realpath "$1") data=$(realpath "$2") peers=${3:+$(realpath "$3")}
rounds=${ROUNDS:-2} steps=${STEPS:-12} rows=${ROWS:-8} workers=${WORKERS:-2} micro=${MICRO_BATCHES:-2} python=${PYTHON:-python3}
unisono=${UNISONO:-${CARGO_TARGET_DIR:-target}/release/unisono}
[ -x "$unisono" ] || { echo "$unisono is not built: run make build" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

ours() {
    "$unisono" train --model "$model" --data "$data" --workers "$1" --run-dir "$scratch/run-$2-$1" --json \
        --set 'data.template=Question: {{ question }}\nAnswer:||| {{ answer }}' \
        --set model.compute=bf16 --set train.global_batch_size="$rows" --set train.micro_batches="$micro" --set train.steps="$steps" \
        --set train.learning_rate=1e-3 --set train.schedule=constant --set split.validation=0 --set split.test=0 \
        --set eval.every=0 2>"$scratch/log" |
        python3 -c '
import json, sys
steps = [e for e in map(json.loads, sys.stdin) if e["event"] == "step"]
late = steps[len(steps) // 4:]
print("unisono, %s workers: %.0f tokens/s" % (sys.argv[1], sum(s["tokens"] for s in late) / sum(s["seconds"] for s in late)))' "$1" ||
        { cat "$scratch/log" >&2; exit 1; }
}

peer() {
    local name=$1
    shift
    "$@" 2>"$scratch/log" | python3 -c '
import json, sys
lines = [line for line in sys.stdin if line.startswith("{\"peer\"")]
print("%s: %.0f tokens/s" % (sys.argv[1], json.loads(lines[-1])["tokens_per_second"]))' "$name" || { tail -5 "$scratch/log" >&2; exit 1; }
}

echo "$(uname -m), $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(date -u +%F)"
for round in $(seq "$rounds"); do
    ours "$workers" "$round"
    [ -n "$peers" ] || continue
    peer "TRL, one process, 2 threads" env OMP_NUM_THREADS=2 "$python" "$peers/trl_sft.py" bf16 "$model" "$data" --steps "$steps" --batch "$rows"
    ours "$workers" "$round-b"
    peer "TRL, two processes" env OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc-per-node 2 "$peers/trl_sft.py" bf16 "$model" "$data" --steps "$steps" --batch $((rows / 2))
    ours "$workers" "$round-c"
    peer "PyTorch, hand-written eager loop, no padding" "$python" "$peers/torch_eager.py" "$model" --tokens 1536 --steps "$steps"
    peer "the same with torch.compile" "$python" "$peers/torch_eager.py" "$model" --tokens 1536 --steps "$steps" --compile
done
