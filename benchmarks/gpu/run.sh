#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under ten minutes; one table at the end.
#   benchmarks/gpu/run.sh [--tiny]     --tiny tries the same on a CPU with tiny models
# PYTHON names the interpreter (default: .venv/bin/python, else python3); results and logs go to
# $OUT (default: a new temporary folder). Parts that cannot run say so and the others go on.
set -uo pipefail
cd "$(dirname "$0")/../.."
tiny=${1:-}
if [[ -n $tiny && $tiny != --tiny ]]; then
    echo "usage: $0 [--tiny]" >&2
    exit 2
fi
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-$(mktemp -d)}
results=$OUT/results.jsonl
rm -f "$results"
export PYTHONPATH=$PWD:$PWD/plugins:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}
failed=()
# A CPU takes longer, all the more when it is shared.
patience=$([[ -n $tiny ]] && echo 5 || echo 1)

part() { # NAME LIMIT_S COMMAND...: one part of the run; its failure does not end the others
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout $((limit * patience)) "$@" 2>&1 | tee "$OUT/${name// /-}.log" | tail -n 40; then
        echo "-- $name: $((SECONDS - start)) s"
    else
        echo "-- $name FAILED after $((SECONDS - start)) s; log: $OUT/${name// /-}.log"
        failed+=("$name")
    fi
}

if [[ -z $tiny ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch finds no CUDA device; --tiny runs the same on a CPU" >&2
    exit 1
fi
"$PYTHON" - <<'END'
import platform, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
for module in ("triton", "transformers", "vllm"):
    try:
        print(module, __import__(module).__version__)
    except ImportError as error:
        print(f"{module}: {error}")
END

part "kernel tests" 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/vllm/test_window_attention.py \
    tests/vllm/test_key_pages.py
if "$PYTHON" -c 'import vllm' 2>"$OUT/vllm-import.log"; then
    # On a GPU the tests' engines are compiled and use CUDA graphs.
    part "parity suite" 240 "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" \
        tests/vllm/test_parity.py
    if [[ -n $tiny ]]; then presets=(tiny-llama tiny-qwen); else
        presets=(CASA-Helium1-VL-2B CASA-Qwen2_5-VL-3B)
    fi
    for preset in "${presets[@]}"; do
        part "vllm $preset" 150 "$PYTHON" benchmarks/gpu/bench_vllm.py "$results" "$preset" $tiny
    done
else
    echo "== vLLM cannot be imported ($(tail -n 1 "$OUT/vllm-import.log")):"
    echo "   no parity suite and no engine figures; eager model, kernels and CUDA graphs alone"
fi
part "standalone" 150 "$PYTHON" benchmarks/gpu/bench_standalone.py "$results" $tiny

echo
[[ -z $tiny ]] || echo "TINY MODELS ON A CPU: these times mean nothing."
"$PYTHON" benchmarks/gpu/report.py "$results" $tiny || failed+=(report)
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]} (logs in $OUT)"
    exit 1
fi
