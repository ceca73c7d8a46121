#!/usr/bin/env bash
# Photo boards on one GPU: alignment, model without images, attention tower, gate, two seeds of `plus`, evaluation.
#
#   experiments/real/photos_gpu.sh           # everything, into runs/photos_gpu; started again, it resumes
#   experiments/real/photos_gpu.sh images    # only the parts without the language model: questions, features, attention
#
# Each stage has its own log in runs/photos_gpu and a time limit [s] that environment variables can change. If a stage fails
# or exceeds its limit, only the stages that depend on it are skipped. KEEP=DIR: the results are copied there after each
# stage, as archives.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${RUN:=runs/photos_gpu}" "${CONFIG:=experiments/real/photos_gpu.yaml}" "${KEEP:=}"
: "${ALIGN_LIMIT:=220}" "${TRAIN_LIMIT:=180}" "${EVAL_LIMIT:=170}" "${TRAIN_TIME:=00:00:01:30}"
: "${GATE_LIMIT:=150}" "${TRAIN_BOARDS:=240}" "${VAL_BOARDS:=30}" "${TEST_BOARDS:=170}" "${SEEDS:=0 1}" "${MORE:=}"
: "${ATTENTION_STEPS:=1500}" "${GATE:=--boards 80 --each 5}"
FREE=uniform_stride,average_pool,tome,divprune,cls_attention,hired,prumerge,prumerge_plus,visionzip,vispruner
FREE_CONTEXT=random_tokens+context,uniform_stride+context,divprune+context,cls_attention+context,hired+context
LLM=fastv,sparsevlm,pyramiddrop,dart
LLM_CONTEXT=fastv+context,sparsevlm+context,dart+context
real="python3 -m experiments.real.evocomp_real"
mkdir -p "$RUN"

# stage NAME LIMIT COMMAND...: runs the command, writes its output to RUN/NAME.log, prints its duration and exit code
stage() {
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout -k 10 "$limit" "$@" >>"$RUN/$name.log" 2>&1 || code=$?
  echo "$(date +%T) $name: $((SECONDS - begin)) s, exit $code"
  keep
  return "$code"
}

# copies results to KEEP; errors here do not fail a stage
keep() {
  [ -n "$KEEP" ] || return 0
  (
    flock 8
    cd "$RUN" || exit
    find . \( -name '*.log' -o -name '*.json' -o -name '*.jsonl' -o -name '*.csv' -o -name '*.yaml' -o -name '*.md' \) \
      -not -path './questions/*' -not -path './model*' -size -4M | tar czf "$KEEP/figures.tgz.part" -T -
    mv "$KEEP/figures.tgz.part" "$KEEP/figures.tgz"
    pack eyes lora projector.safetensors
    pack attention attention/tower.safetensors attention/gate.json
    for seed in $SEEDS; do pack "compressor_$seed" "plus_$seed/compressor" "plus_$seed/trained.json"; done
  ) 8>"$RUN/keep.lock" 2>/dev/null
}

# pack NAME FILE...: makes an archive once the last of these files, which is written last, exists
pack() {
  local archive=$KEEP/$1.tgz
  shift
  [ ! -e "$archive" ] && [ -e "${!#}" ] && tar czf "$archive.part" "$@" && mv "$archive.part" "$archive"
}

# questions NAME SEED BOARDS PER_BOARD SPLIT; a folder without data.json is from an interrupted run
questions() {
  local folder=$RUN/questions/$1
  [ -f "$folder/data.json" ] && return
  rm -rf "$folder"
  stage "questions_$1" 120 python3 -m experiments.real.data --config "$CONFIG" --out "$folder" \
    --seed "$2" --count "$3" --per-scene "$4" --split "$5"
}

images() {
  questions train 31 "$TRAIN_BOARDS" 8 train && questions val 32 "$VAL_BOARDS" 4 selection &&
    questions test 33 "$TEST_BOARDS" 4 test
  # without these features align.py makes them
  [ -f "$RUN/features.done" ] || { stage features 200 python3 -m experiments.real.features --config "$CONFIG" &&
    touch "$RUN/features.done"; }
}

aligned() { [ -f "$RUN/model/config.json" ] && [ -f "$RUN/gate.json" ]; }

blind() {
  [ -f "$RUN/blind/gate.json" ] || stage blind 150 python3 -m experiments.real.align --config "$CONFIG" --out "$RUN" --blind
}

attention() {
  [ -f "$RUN/attention/gate.json" ] ||
    stage attention 150 python3 -m experiments.real.attention train --config "$CONFIG" --out "$RUN" --steps "$ATTENTION_STEPS"
}

attach() {
  [ -f "$RUN/model_cls/config.json" ] || stage attach 60 python3 -m experiments.real.attention attach --config "$CONFIG" --out "$RUN"
}

# shellcheck disable=SC2086
train() {
  [ -f "$RUN/plus_$1/compressor/config.json" ] && return
  stage "plus_$1" "$TRAIN_LIMIT" $real train --config experiments/real/plus.yaml \
    --config experiments/real/photos_plus.yaml --run_dir="$RUN/plus_$1" --seed="$1" --model.name="$model" \
    --data.source="$RUN/questions/train" --data.val_source="$RUN/questions/val" \
    --data.test_source="$RUN/questions/test" --trainer.max_time="$TRAIN_TIME" --data.test_samples=20 --eval.beside="[$beside]" $MORE
}

panel() {
  stage "panel_$1" "$EVAL_LIMIT" $real eval --run "$RUN/plus_$first" --panel "$2" --out "$RUN/judged/$1" \
    --questions $((4 * TEST_BOARDS))
}

with_lock() { # two runs of this script at the same time would draw the same boards
  exec 9>"$RUN/lock" && flock 9
}

if [ "${1:-all}" = images ]; then
  with_lock
  images
  attention
  exit
fi
stage language_model 120 python3 -m experiments.real.smollm2 & # converts the language model once
with_lock
images
attention
exec 9>&-
wait
aligned || stage align "$ALIGN_LIMIT" python3 -m experiments.real.align --config "$CONFIG" --out "$RUN"
grep -aE "^(projector|a step|[0-9]+ steps|step|gate)" "$RUN/align.log"
aligned || { tail -n 20 "$RUN/align.log"; exit 1; }
model=$RUN/model
attach && model=$RUN/model_cls
(blind; stage gate "$GATE_LIMIT" python3 -m experiments.real.gate --config "$CONFIG" --out "$RUN" $GATE) &
first=${SEEDS%% *} beside=
for seed in $SEEDS; do [ "$seed" = "$first" ] || beside=${beside:+$beside,}$RUN/plus_$seed; done
for seed in $SEEDS; do train "$seed" & done
wait
grep -a -A60 '"conditions"' "$RUN/gate.log"
panel free "$FREE,$FREE_CONTEXT,vispruner+context" & panel llm "$LLM,$LLM_CONTEXT" &
wait
python3 -m experiments.real.results --report "$RUN"/judged/*/report.json --out "$RUN/panel_photos.csv" | tee "$RUN/panel.log"
keep
