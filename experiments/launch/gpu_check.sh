#!/usr/bin/env bash
# What only an NVIDIA GPU can show: the kernels' tests on it, then the benches at the sizes of real models with random
# weights (nothing is downloaded). Needs 40 GB of GPU memory for all of it.
#   experiments/launch/gpu_check.sh runs/gpu_check [SECONDS, default 600]
# Every stage has a limit of its own and the next one follows whatever happened; logs and CSVs lie in the folder.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="$(mkdir -p "$1" && cd "$1" && pwd)"
total="${2:-600}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

stage() { # NAME LIMIT COMMAND...
    local name="$1" limit="$2" began="$SECONDS" left=$((total - SECONDS)) code
    shift 2
    ((left < 10)) && { echo "== $name: left out, no time"; return; }
    timeout $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - began)) s"
    ((code == 0)) || tail -n 12 "$out/$name.log" | cut -c 1-300
}

bench() { # KIND LIMIT [SHAPES]
    stage "bench-$1${3:+-${3%%,*}}" "$2" python3 -m evocomp bench "$1" --out "$out" ${3:+--shape "$3"}
}

parallel=()
python3 -c "import xdist" 2>/dev/null && parallel=(-n "${WORKERS:-8}")
bench ops 60
stage tests 75 python3 -m pytest -m "not slow" --durations 5 "${parallel[@]}" tests/ops_triton tests/bench/test_bench_scorer.py \
    tests/ops/test_ops_top_r_compact.py::test_does_not_synchronise_a_gpu
bench label-search 60 "${SHAPES:-llava15_7b}"
bench inference 60 "${SHAPES:-llava_next_7b}"
bench label-search 60 "${SHAPES:-qwen25_vl_7b,llava_next_7b}"
bench training 30
bench inference 60 "${SHAPES:-llava15_7b,qwen25_vl_7b}"
cat "$out"/bench-*.log >"$out/benches.log" && rm "$out"/bench-*.log
python3 -m evocomp.bench.record "$out"/*.csv
