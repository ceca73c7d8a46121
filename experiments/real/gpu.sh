#!/usr/bin/env bash
# The complete example on one GPU: questions, features, alignment, gate, labels and both compressors, evaluation.
#
#   experiments/real/gpu.sh              # everything, into runs/real_gpu; started again, it resumes
#   experiments/real/gpu.sh pictures     # only the parts without the language model: questions and features
#
# Each stage has a time limit [s] that environment variables can change. If a stage fails or exceeds its limit, only the
# stages that depend on it are skipped. Estimated time on an idle host with an H100: 6 minutes; 16 processes draw scenes.
# Measured on a machine shared with 14 other jobs: language model 80 s, alignment 203 s; the labels exceeded their time
# limit (README.md), and later stages never ran.
set -uo pipefail
cd "$(dirname "$0")/../.."
RUN=runs/real_gpu CONFIG=experiments/real/gpu.yaml
: "${ALIGN_LIMIT:=260}" "${TRAIN_LIMIT:=220}" "${EVAL_LIMIT:=200}" "${TRAIN_TIME:=00:00:01:20}"
: "${TRAIN_SCENES:=120}" "${VAL_SCENES:=30}" "${TEST_SCENES:=210}" "${QUESTIONS:=1050}"
RIVALS=uniform_stride,average_pool,tome,divprune,cls_attention,visionzip
LLM_RIVALS=fastv,sparsevlm,pyramiddrop,dart
mkdir -p "$RUN"

# stage NAME LIMIT COMMAND...: runs the command, writes its output to RUN/NAME.log, prints its duration and exit code
stage() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout -k 10 "$limit" "$@" >>"$RUN/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - begin)) s, exit $code"
  return "$code"
}

# questions NAME SEED SCENES PER_SCENE; a folder without data.json is from an interrupted run
questions() {
  local folder=$RUN/questions/$1
  [ -f "$folder/data.json" ] && return
  rm -rf "$folder"
  stage "questions_$1" 300 python3 -m experiments.real.data --config "$CONFIG" --out "$folder" \
    --seed "$2" --count "$3" --per-scene "$4"
}

pictures() {
  if [ ! -f "$RUN/features.done" ]; then  # without these features align.py makes them
    stage features 300 python3 -m experiments.real.features --config "$CONFIG" && touch "$RUN/features.done" &
  fi
  questions train 31 "$TRAIN_SCENES" 10 && questions few 31 "$TRAIN_SCENES" 2 &&
    questions val 32 "$VAL_SCENES" 4 && questions test 33 "$TEST_SCENES" 5
  wait
}

aligned() { grep -qs '"passed": true' "$RUN/gate.json" && [ -f "$RUN/model/config.json" ]; }

# both recipes in parallel, because one alone does not use the full GPU; only `plus` is required to succeed
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

with_lock() {  # two runs of this script at the same time would draw the same scenes
  exec 9>"$RUN/lock" && flock 9
}

if [ "${1:-all}" = pictures ]; then
  with_lock
  pictures
  exit
fi
stage language_model 120 python3 -m experiments.real.smollm2 &  # converts the language model once
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
