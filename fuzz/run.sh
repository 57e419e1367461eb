#!/usr/bin/env bash
# Fuzzes each parser in turn, one process at a time at lowest priority, and keeps count over all runs.
#
#     cargo install cargo-fuzz && rustup toolchain install nightly
#     fuzz/run.sh 600          # 600 s for each target; 0: round after round of 5 minutes each, until Ctrl-C
#     fuzz/run.sh 600 row      # one target
#     fuzz/run.sh table        # the time and the findings of all runs so far
#
# BUILD=no takes the binaries as they are: building takes many minutes.
#
# Builds, grown corpora, findings and the log lie in $UNISONO_FUZZ (default: unisono/fuzz in the user's cache).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

home=${UNISONO_FUZZ:-${XDG_CACHE_HOME:-$HOME/.cache}/unisono/fuzz}
log=$home/log.jsonl
targets=(safetensors manifest row template config)

table() {
    [ -f "$log" ] || { echo "nothing was fuzzed yet"; return; }
    python3 - "$log" <<'PYTHON'
import json, sys
from collections import defaultdict
rows = defaultdict(lambda: [0, 0, 0, 0])
for line in open(sys.argv[1]):
    entry = json.loads(line)
    row = rows[entry["target"]]
    row[0] += entry["seconds"]
    row[1] += entry["inputs"]
    row[2] += entry["findings"]
    row[3] = entry["covered"]
print("| target | time | inputs tried | edges covered | findings |\n|---|---|---|---|---|")
for target, (seconds, inputs, findings, covered) in sorted(rows.items()):
    print(f"| `{target}` | {seconds / 60:.0f} min | {inputs:,} | {covered:,} | {findings} |")
PYTHON
}

# One target for so many seconds; returns when it is over or something was found.
round() {
    local target=$1 seconds=$2 found=$home/findings/$1 corpus=$home/corpus/$1 words=$home/$1.log
    mkdir -p "$found" "$corpus"
    local before begun=$SECONDS
    before=$(find "$found" -type f ! -name "slow-unit-*" | wc -l)
    nice -n 19 "$home/target/x86_64-unknown-linux-gnu/release/$target" "$corpus" "fuzz/corpus/$target" \
        -max_total_time="$seconds" -rss_limit_mb=1024 -timeout=60 -report_slow_units=60 -max_len=4096 -use_value_profile=1 \
        -print_final_stats=1 -artifact_prefix="$found/" >"$words" 2>&1 || true
    local after inputs covered
    after=$(find "$found" -type f ! -name "slow-unit-*" | wc -l)
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$words" | tail -n 1)
    covered=$(grep -oE 'cov: [0-9]+' "$words" | tail -n 1 | cut -d ' ' -f 2 || true)
    printf '{"target":"%s","at":"%s","commit":"%s","seconds":%d,"inputs":%d,"covered":%d,"findings":%d}\n' \
        "$target" "$(date -u +%FT%TZ)" "$commit" "$((SECONDS - begun))" "${inputs:-0}" "${covered:-0}" \
        "$((after - before))" >>"$log"
    [ "$after" -eq "$before" ] || printf '%s: found something, see %s and %s\n' "$target" "$found" "$words"
}

if [ "${1:-}" = table ]; then
    table
    exit
fi
seconds=${1:-600}
[ "$#" -lt 2 ] || targets=("${@:2}")
mkdir -p "$home"
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ "${BUILD:-yes}" = no ] || PATH=$home/tools/bin:$PATH cargo +nightly fuzz build -O --debug-assertions --target-dir "$home/target"
while :; do
    for target in "${targets[@]}"; do
        round "$target" "$([ "$seconds" -eq 0 ] && echo 300 || echo "$seconds")"
    done
    [ "$seconds" -eq 0 ] || break
done
table
