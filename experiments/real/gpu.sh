#!/usr/bin/env bash
# The whole example on one GPU: questions, features, alignment, gate, labels and both compressors, panel.
#
#   experiments/real/gpu.sh              # everything, into runs/real_gpu; started again, it goes on where it was
#   experiments/real/gpu.sh pictures     # only what needs no language model: questions and features
#
# Each stage has a time limit [s] that can be set from outside; a stage that ends late or badly stops what needs it.
# Expect on an H100 (estimate): 6 minutes; 16 processes draw scenes.
set -uo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/real_gpu CONFIG=experiments/real/gpu.yaml
: "${ALIGN_LIMIT:=260}" "${TRAIN_LIMIT:=220}" "${EVAL_LIMIT:=200}" "${TRAIN_TIME:=00:00:01:20}"
: "${TRAIN_SCENES:=400}" "${VAL_SCENES:=30}" "${TEST_SCENES:=210}" "${QUESTIONS:=1050}"
RIVALS=uniform_stride,average_pool,tome,divprune,cls_attention,visionzip
LLM_RIVALS=fastv,sparsevlm,pyramiddrop,dart
mkdir -p "$RUN"

# stage NAME LIMIT COMMAND...: runs it, keeps its output in RUN/NAME.log, says how long it took and how it ended
stage() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout -k 10 "$limit" "$@" >>"$RUN/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - begin)) s, exit $code"
  return "$code"
}

# questions NAME SEED SCENES PER_SCENE; a folder without data.json is one that was interrupted
questions() {
  local folder=$RUN/questions/$1
  [ -f "$folder/data.json" ] && return
  rm -rf "$folder"
  stage "questions_$1" 300 python3 -m experiments.real.data --config "$CONFIG" --out "$folder" \
    --seed "$2" --count "$3" --per-scene "$4"
}

pictures() {
  if [ ! -f "$RUN/features.done" ]; then  # else align.py makes them
    stage features 300 python3 -m experiments.real.features --config "$CONFIG" && touch "$RUN/features.done" &
  fi
  questions train 31 "$TRAIN_SCENES" 10 && questions few 31 "$TRAIN_SCENES" 2 &&
    questions val 32 "$VAL_SCENES" 4 && questions test 33 "$TEST_SCENES" 5
  wait
}

aligned() { grep -qs '"passed": true' "$RUN/gate.json" && [ -f "$RUN/model/config.json" ]; }

# both recipes at once: neither of them keeps a GPU busy alone; the second is the one that must not fail
compressors() {
  local recipe
  for recipe in published plus; do
    stage "$recipe" "$TRAIN_LIMIT" python3 -m experiments.real.evocomp_real train \
      --config "experiments/real/$recipe.yaml" --trainer.max_time="$TRAIN_TIME" --data.test_samples=20 &
  done
  wait
  [ -f "$RUN/plus/compressor/config.json" ]
}

panel() {
  stage "panel_$1" "$EVAL_LIMIT" python3 -m experiments.real.evocomp_real eval --run "$RUN/plus" --panel "$2" \
    --questions "$QUESTIONS" --out "$RUN/judged/$1"
}

with_lock() {  # two at once (one that prepares, one that goes on) would draw the same scenes
  exec 9>"$RUN/lock" && flock 9
}

if [ "${1:-all}" = pictures ]; then
  with_lock
  pictures
  exit
fi
stage language_model 120 python3 -m experiments.real.smollm2 &  # converts it, once
with_lock
pictures
exec 9>&-
wait
aligned || stage align "$ALIGN_LIMIT" python3 -m experiments.real.align --config "$CONFIG"
grep -E "^(projector|a step|[0-9]+ steps|step|gate)" "$RUN/align.log"
aligned || { tail -n 20 "$RUN/align.log"; exit 1; }
compressors || { tail -n 20 "$RUN/plus.log"; exit 1; }
panel rivals "$RIVALS" & panel llm_rivals "$LLM_RIVALS"
wait
stage ship 60 python3 -m experiments.real.ship --run "$RUN" --out "$RUN/weights"
python3 -m experiments.real.results --report "$RUN"/judged/*rivals/report.json --out "$RUN/panel_real.csv"
