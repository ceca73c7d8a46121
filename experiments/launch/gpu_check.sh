#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests of the kernels, then benchmarks at the sizes of real models with random
# weights (nothing is downloaded). Needs 40 GB of GPU memory.
#   experiments/launch/gpu_check.sh runs/gpu_check [SECONDS, default 600] [STAGE...]
# EVOCOMP_COMMIT: the commit, if the sources are not a git checkout. TESTS: tests to run instead of all kernel tests.
# Every stage has its own time limit, and a failed stage does not stop the next one. Logs and CSV files are in the folder.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="$(mkdir -p "$1" && cd "$1" && pwd)"
total="${2:-600}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

stage() { # NAME LIMIT COMMAND...
    local name="$1" limit="$2" began="$SECONDS" left=$((total - SECONDS)) code
    shift 2
    ((left < 10)) && { echo "== $name: skipped, no time left"; return; }
    timeout -k 3 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - began)) s: $(tail -n 1 "$out/$name.log" | cut -c 1-100)"
    ((code == 0)) || tail -n 12 "$out/$name.log" | cut -c 1-300
}

bench() { # STAGE KIND LIMIT [SHAPE]
    stage "$1" "$3" python3 -m evocomp bench "$2" --out "$out" ${4:+--shape "$4"}
}

one() { # run the stage of this name
    case "$1" in
        ops) bench ops ops 60 ;;
        tests) # in two processes: after an error on the device its process cannot use the device any more
            stage tests_torch 45 python3 -m pytest -m gpu --durations 5 tests/bench/test_bench_scorer.py tests/ops
            stage tests 75 python3 -m pytest -m "not slow" --durations 5 "${parallel[@]}" ${TESTS:-tests/ops_triton} ;;
        score) bench score label-search 75 llava15_7b ;;
        prefill) bench prefill inference 75 llava_next_7b ;;
        score_qwen) bench score_qwen label-search 50 qwen25_vl_7b ;;
        score_next) bench score_next label-search 60 llava_next_7b ;;
        train) bench train training 40 ;;
        prefill_15) bench prefill_15 inference 30 llava15_7b ;;
        prefill_qwen) bench prefill_qwen inference 30 qwen25_vl_7b ;;
        tiny) for name in tiny_llava tiny_llava_next tiny_qwen; do # the same code on any machine
            bench "score_$name" label-search 60 "$name"
            bench "prefill_$name" inference 60 "$name"
            bench "ops_$name" ops 60 "$name"
        done ;;
    esac
}

parallel=()
python3 -c "import xdist" 2>/dev/null && parallel=(-n "${WORKERS:-8}")
shift $(($# < 2 ? $# : 2))
for name in "${@:-ops tests score prefill score_qwen score_next train prefill_15 prefill_qwen}"; do
    for part in $name; do one "$part"; done
done
cat "$out"/*.log >"$out/logs.txt" && rm "$out"/*.log
compgen -G "$out/*.csv" >/dev/null && python3 -m evocomp.bench.record "$out"/*.csv
