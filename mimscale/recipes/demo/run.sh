#!/usr/bin/env bash
# The main job on real data, on this machine: each command that it shows can be given by hand.
set -euo pipefail
demo=${1:-demo}
started=$SECONDS

# What the demo takes at most: the largest drop of the memory that is free for use, looked at twice a second.
available_kb() { awk '/^MemAvailable:/ {print $2}' /proc/meminfo; }
memory=$(mktemp)
(
  before=$(available_kb)
  least=$before
  while sleep 0.5; do
    now=$(available_kb)
    if [ "$now" -lt "$least" ]; then
      least=$now
      echo $(((before - least) / 1024)) >"$memory"
    fi
  done
) &
watcher=$!
trap 'kill $watcher 2>/dev/null; rm -f "$memory"' EXIT

show() { printf '\n\033[1m[%4d s] $ %s\033[0m\n' "$((SECONDS - started))" "$*"; }
run() {
  show "$@"
  "$@"
}

run mimscale cohort out="$demo/cohort" subjects=8 seed=1
run mimscale ingest demo/ingest sources="$demo/cohort/dataset.json" out="$demo/store"
run mimscale inspect "$demo/store" --verify

# Pretraining, interrupted once on purpose: USR2 is what Slurm sends before it takes a node away.
pretrain=(mimscale submit pretrain demo/pretrain store="$demo/store" run_dir="$demo/pretrain" --wait)
last_step() { tail -n 1 "$demo/pretrain/metrics.jsonl" 2>/dev/null | sed -E 's/.*"step": ([0-9]+).*/\1/'; }
if [ ! -e "$demo/pretrain/outcome.json" ]; then
  show "${pretrain[@]}" "&"
  "${pretrain[@]}" &
  job=$!
  until [ "$(last_step || true)" ] && [ "$(last_step)" -ge 150 ]; do
    kill -0 $job 2>/dev/null || wait $job # it ended before its time: leave with its exit code
    sleep 0.5
  done
  run kill -USR2 $job # submit hands it on to the processes of the job
  code=0
  wait $job || code=$?
  [ $code = 75 ] || { echo "expected exit code 75 (interrupted, everything saved), got $code"; exit 1; }
fi
run "${pretrain[@]}"

finetune=(mimscale submit finetune demo/finetune store="$demo/store" --wait)
run "${finetune[@]}" run_dir="$demo/finetune" init_from="$demo/pretrain"
run "${finetune[@]}" run_dir="$demo/scratch"

run mimscale evaluate run_dir="$demo/pretrain" store="$demo/store"
for arm in finetune scratch; do
  run mimscale evaluate run_dir="$demo/$arm" store="$demo/store" overlap=0.25
done
run mimscale report "$demo/pretrain" "$demo/finetune" "$demo/scratch" out="$demo/report"
printf '\nDone in %d s, at most %d MiB of memory. Open %s in a browser.\n' "$((SECONDS - started))" "$(cat "$memory")" "$demo/report/index.html"
