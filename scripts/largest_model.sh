#!/usr/bin/env bash
# The largest model that trains for three steps under a cap on memory: Unisono with its exact state, with the bf16 state,
# and TRL at its defaults, one process each, 8 rows a step. Layers are searched; all else is fixed.
#
#   scripts/largest_model.sh CAP_GIB DATA.jsonl [--unisono target/release/unisono] [--hidden 1024] [--most 1000] \
#       [--trl SCRIPT.py --python PYTHON] [--only fp32,bf16,trl]
#
# Unisono says what it needs before it loads anything: `unisono check`, run under the cap, finds the most layers, and a real
# run confirms them. TRL has to be tried: layers are bisected until one more does not train, or to within 2 %. DATA has the
# columns question and answer. SCRIPT.py takes: bf16 MODEL DATA --steps 3 --batch 8.
# Needs a control group to write to (as root; version 1 or 2). A limit on address space would be no substitute: libtorch
# maps far more than it touches, so it would measure mappings. Swap must be off, or it would count as memory.
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 2 ] || usage
cap=$(($1 << 30)) data=$(realpath "$2"); shift 2
unisono=target/release/unisono hidden=1024 most=1000 trl="" python=python3 only=fp32,bf16,trl
while [ $# -gt 1 ]; do
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
  empty_group
  for _ in 1 2 3 4 5 6 7 8 9 10; do rmdir "$group" 2>/dev/null && break; sleep 0.3; done
  rm -rf "$scratch"
}
trap finish EXIT

# within CMD...: runs it in the group.
within() { bash -c 'echo $$ > "$0/cgroup.procs"; exec "$@"' "$group" "$@"; }

empty_group() {
  for _ in $(seq 50); do
    local pids; pids=$(cat "$group/cgroup.procs")
    [ -n "$pids" ] || break
    kill -9 $pids 2>/dev/null || true
    sleep 0.1
  done
  # What files left in the cache belongs to the next trial no more than to the last one.
  echo 1 > "$group/memory.force_empty" 2>/dev/null || echo "$cap" > "$group/memory.reclaim" 2>/dev/null || true
}

# model LAYERS: makes it and prints its parameters.
model() {
  rm -rf "$scratch/model"
  "$unisono" init-model "$scratch/model" --data "$data" --field question --field answer --vocab 8192 --dtype bf16 \
    --hidden "$hidden" --heads $((hidden / 64)) --layers "$1" --max-positions 2048 > /dev/null
  parameters "$scratch/model"
}

parameters() {
  "$python" -c 'import json, struct, sys
f = open(sys.argv[1] + "/model.safetensors", "rb"); n = struct.unpack("<Q", f.read(8))[0]
h = json.loads(f.read(n)); print(sum(v["data_offsets"][1] - v["data_offsets"][0] for k, v in h.items() if k[0] != "_") // 2)' "$1"
}

# sketch LAYERS: the same model in $scratch/sketch, with a hole where its weights would be: enough to be planned.
sketch() {
  [ -d "$scratch/one" ] || { model 1 > /dev/null; mv "$scratch/model" "$scratch/one"; }
  rm -rf "$scratch/sketch"; cp -r "$scratch/one" "$scratch/sketch"
  "$python" - "$scratch/sketch" "$1" <<'PYTHON'
import json, pathlib, struct, sys
path, layers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
config = json.loads((path / "config.json").read_text())
(path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
weights = path / "model.safetensors"
data = weights.read_bytes()
header = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])
entries, offset = {}, 0
for name, entry in sorted(header.items()):
    if name == "__metadata__":
        continue
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    names = [name.replace(".layers.0.", f".layers.{i}.") for i in range(layers)] if ".layers.0." in name else [name]
    for name in names:
        entries[name] = {**entry, "data_offsets": [offset, offset + size]}
        offset += size
text = json.dumps(entries).encode()
text += b" " * (-len(text) % 8)
with weights.open("wb") as out:
    out.write(struct.pack("<Q", len(text)) + text)
    out.truncate(8 + len(text) + offset)
PYTHON
}

template='data.template=Question: {{ question }}\nAnswer:||| {{ answer }}'
# settings STATE: of all of our runs.
settings() {
  printf '%s\n' --data "$data" --workers 1 --set "$template" --set eval.every=0 --set train.steps=3 \
    --set train.global_batch_size=8 --set split.validation=0 --set split.test=0 --set "train.optimizer_state=$1"
}

# planned STATE LAYERS: whether the plan fits under the cap.
planned() {
  local keys; mapfile -t keys < <(settings "$1")
  sketch "$2"
  within "$unisono" check --json --model "$scratch/sketch" "${keys[@]}" > "$scratch/check" 2> "$scratch/words" || true
  empty_group
  grep '"event":"memory"' "$scratch/check" > "$scratch/memory" || { cat "$scratch/words" >&2; exit 3; }
  grep -q '"fits":true' "$scratch/memory"
}

# ours STATE: whether three steps of Unisono come out. What it saves at the end is not waited for.
ours() {
  local keys; mapfile -t keys < <(settings "$1")
  rm -rf "$scratch/run"
  within timeout 1200 "$unisono" train --json --model "$scratch/model" "${keys[@]}" --run-dir "$scratch/run" \
    --set cluster.restarts=0 > "$scratch/events" 2> "$scratch/words" &
  local pid=$!
  while kill -0 $pid 2>/dev/null; do
    grep -q '"event":"step","step":3' "$scratch/events" && break
    sleep 0.2
  done
  local steps; steps=$(grep -c '"event":"step"' "$scratch/events" || true)
  grep '"event":"memory"' "$scratch/events" | tail -1 > "$scratch/memory" || true
  empty_group; wait $pid 2>/dev/null || true
  [ "$steps" -ge 3 ] || { tail -2 "$scratch/words" | cut -c1-400 >&2; return 1; }
}

peer() {
  local code=0
  (cd "$scratch" && OMP_NUM_THREADS=2 within timeout 1200 "$python" "$trl" bf16 "$scratch/model" "$data" --steps 3 --batch 8) \
    > "$scratch/words" 2>&1 || code=$?
  empty_group
  return $code
}

# search TEST FIRST SLACK: sets fits and beyond, doubling from FIRST until TEST fails, then halving in between, to SLACK.
search() {
  local layers=$2
  fits=0 beyond=0
  while [ $beyond -eq 0 ] || [ $((beyond - fits)) -gt $((1 + fits * $3 / 100)) ]; do
    [ $beyond -eq 0 ] || layers=$(((fits + beyond) / 2))
    if $1 $layers; then
      fits=$layers
      [ $beyond -ne 0 ] || { layers=$((layers * 2)); [ $layers -le "$most" ] || break; }
    else
      beyond=$layers
      [ $beyond -gt 1 ] || break
    fi
  done
}

try_peer() {
  local n outcome="does not train"; n=$(model "$1")
  if peer; then outcome=trains; fi
  echo "trl: $1 layers, $n parameters: $outcome" >&2
  [ "$outcome" = trains ]
}

for who in ${only//,/ }; do
  rm -f "$scratch/memory"
  if [ "$who" = trl ]; then
    [ -n "$trl" ] || continue
    # Sixteen bytes for each parameter, and a gibibyte: a first guess only.
    first=$(((cap - (1 << 30)) / 16 / (12 * hidden * hidden)))
    search try_peer $((first > 2 ? first * 3 / 4 : 2)) 2
    layers=$fits
    n=$(model "$layers")
  else
    search "planned $who" 8 0
    layers=$fits
    echo "$who: planned: $layers layers fit" >&2
    while [ "$layers" -gt 0 ]; do
      n=$(model "$layers")
      if ours "$who"; then
        echo "$who: $layers layers, $n parameters: trains $(cat "$scratch/memory")" >&2
        break
      fi
      echo "$who: $layers layers, $n parameters: planned, and does not train" >&2
      layers=$((layers - 1 - layers / 50))
    done
  fi
  echo "{\"cap_bytes\":$cap,\"who\":\"$who\",\"hidden\":$hidden,\"layers\":$layers,\"parameters\":$n}"
done
