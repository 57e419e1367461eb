#!/usr/bin/env bash
# The largest model that trains for three steps under a cap on memory: Unisono with its exact state, with the bf16 state,
# and TRL at its defaults, one process each, 8 rows a step. Layers are found by bisection; all else is fixed.
#
#   scripts/largest_model.sh CAP_GIB DATA.jsonl [--unisono target/release/unisono] [--hidden 1024] [--most 400] \
#       [--trl SCRIPT.py --python PYTHON] [--only fp32,bf16,trl]
#
# DATA has the columns question and answer. SCRIPT.py takes: bf16 MODEL DATA --steps 3 --batch 8.
# Needs a control group to write to (as root; version 1 or 2). A limit on address space would be no substitute: libtorch
# maps far more than it touches, so it would measure mappings. Swap must be off, or it would count as memory.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 2 ] || usage
cap=$(($1 << 30)) data=$(realpath "$2"); shift 2
unisono=target/release/unisono hidden=1024 most=400 trl="" python=python3 only=fp32,bf16,trl
while [ $# -gt 0 ]; do
  case $1 in
    --unisono) unisono=$2 ;; --hidden) hidden=$2 ;; --most) most=$2 ;;
    --trl) trl=$(realpath "$2") ;; --python) python=$2 ;; --only) only=$2 ;;
    *) usage ;;
  esac
  shift 2
done
unisono=$(realpath "$unisono")
[ -z "$(swapon --noheadings --show 2>/dev/null)" ] || { echo "swap is on; turn it off with swapoff -a" >&2; exit 2; }

# A group of our own, with the cap.
if [ -w /sys/fs/cgroup/memory ]; then
  group=/sys/fs/cgroup/memory/unisono-largest-$$
  mkdir "$group"
  echo "$cap" > "$group/memory.limit_in_bytes"
  echo 0 > "$group/memory.swappiness" 2>/dev/null || true
elif [ -f /sys/fs/cgroup/cgroup.controllers ] && [ -w /sys/fs/cgroup/cgroup.subtree_control ]; then
  echo +memory > /sys/fs/cgroup/cgroup.subtree_control
  group=/sys/fs/cgroup/unisono-largest-$$
  mkdir "$group"
  echo "$cap" > "$group/memory.max"
  echo 0 > "$group/memory.swap.max" 2>/dev/null || true
else
  echo "no control group for memory can be written here; run this as root on a machine with cgroups" >&2
  exit 2
fi
scratch=$(mktemp -d)
finish() {
  while read -r pid; do kill -9 "$pid" 2>/dev/null || true; done < "$group/cgroup.procs" || true
  for _ in 1 2 3 4 5 6 7 8 9 10; do rmdir "$group" 2>/dev/null && break; sleep 0.3; done
  rm -rf "$scratch"
}
trap finish EXIT

# within CMD...: runs it in the group.
within() { bash -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group" "$@"; }

empty_group() {
  while read -r pid; do kill -9 "$pid" 2>/dev/null || true; done < "$group/cgroup.procs"
  for _ in $(seq 50); do [ -s "$group/cgroup.procs" ] && [ -n "$(cat "$group/cgroup.procs")" ] && sleep 0.1; done
  # What files left in the cache belongs to the next trial no more than to the last one.
  echo 1 > "$group/memory.force_empty" 2>/dev/null || echo "$cap" > "$group/memory.reclaim" 2>/dev/null || true
}

# model LAYERS: makes it and prints its parameters.
model() {
  rm -rf "$scratch/model"
  "$unisono" init-model "$scratch/model" --data "$data" --field question --field answer --vocab 8192 --dtype bf16 \
    --hidden "$hidden" --heads $((hidden / 64)) --layers "$1" --max-positions 2048 > /dev/null
  "$python" -c 'import json, struct, sys
f = open(sys.argv[1] + "/model.safetensors", "rb"); n = struct.unpack("<Q", f.read(8))[0]
h = json.loads(f.read(n)); print(sum(v["data_offsets"][1] - v["data_offsets"][0] for k, v in h.items() if k[0] != "_") // 2)' \
    "$scratch/model"
}

# ours STATE: whether three steps of Unisono come out. What it saves at the end is not waited for.
ours() {
  rm -rf "$scratch/run"
  within timeout 900 "$unisono" train --json --model "$scratch/model" --data "$data" --run-dir "$scratch/run" --workers 1 \
    --set 'data.template=Question: {{ question }}\nAnswer:||| {{ answer }}' --set eval.every=0 \
    --set train.steps=3 --set train.global_batch_size=8 --set split.validation=0 --set split.test=0 \
    --set "train.optimizer_state=$1" --set cluster.restarts=0 > "$scratch/events" 2> "$scratch/words" &
  local pid=$!
  while kill -0 $pid 2>/dev/null; do
    grep -q '"event":"step","step":3' "$scratch/events" && break
    sleep 0.2
  done
  local steps; steps=$(grep -c '"event":"step"' "$scratch/events" || true)
  grep '"event":"memory"' "$scratch/events" | tail -1 > "$scratch/memory" || true
  empty_group; wait $pid 2>/dev/null || true
  [ "$steps" -ge 3 ] || { tail -2 "$scratch/words" | cut -c1-300 >&2; return 1; }
}

peer() {
  (cd "$scratch" && OMP_NUM_THREADS=1 within timeout 900 "$python" "$trl" bf16 "$scratch/model" "$data" --steps 3 --batch 8) \
    > "$scratch/words" 2>&1
  local code=$?
  empty_group
  return $code
}

trial() { case $1 in fp32 | bf16) ours "$1" ;; trl) peer ;; esac; }

for who in ${only//,/ }; do
  [ "$who" != trl ] || [ -n "$trl" ] || continue
  fits=0 parameters=0 beyond=0 layers=8
  # Doubled until it does not fit, then halved in between.
  while [ $beyond -eq 0 ] || [ $((beyond - fits)) -gt 1 ]; do
    [ $beyond -eq 0 ] || layers=$(((fits + beyond) / 2))
    n=$(model $layers)
    if trial "$who"; then
      fits=$layers parameters=$n
      echo "$who: $layers layers, $n parameters: trains $(cat "$scratch/memory" 2>/dev/null || true)" >&2
      [ $beyond -ne 0 ] || layers=$((layers * 2))
      [ $layers -le "$most" ] || break
    else
      beyond=$layers
      echo "$who: $layers layers, $n parameters: does not" >&2
    fi
    rm -f "$scratch/memory"
  done
  echo "{\"cap_bytes\":$cap,\"who\":\"$who\",\"hidden\":$hidden,\"layers\":$fits,\"parameters\":$parameters}"
done
