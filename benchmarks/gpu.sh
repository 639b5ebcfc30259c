#!/usr/bin/env bash
# Kernel tests, kernel times, the bench and the training bench on one GPU, in under 25 minutes; everything that was measured ends in
# benchmarks/results/<device>.json. Results are written as they come, so that a run that is cut leaves what it has.
#
#   benchmarks/gpu.sh                       on the GPU
#   benchmarks/gpu.sh --device cpu          the same steps at tiny size, to try the script
#
# PYTHON names the interpreter, .venv/bin/python by default.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
device=cuda
out=benchmarks/results
while (($#)); do
    case $1 in
        --device) device=${2:?--device needs cpu or cuda}; shift 2 ;;
        --output) out=${2:?--output needs a folder}; shift 2 ;;
        *) echo "gpu.sh: unknown argument '$1': expected --device cpu|cuda or --output FOLDER" >&2; exit 2 ;;
    esac
done

case $device in
    # 4 + 3 + 11 + 4 minutes at most, and what starting up takes
    cuda) size=base dtype=bfloat16 batches=1,8,64 repeats=3 train_batch=64 limits=(240 180 11 4) ;;
    cpu) size=tiny dtype=float32 batches=1,2 repeats=1 train_batch=2 limits=(240 180 2 1) ;;
    *) echo "gpu.sh: device '$device': expected cpu or cuda" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

run() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

run "tests of the kernels" timeout "${limits[0]}" "$python" -m pytest -q tests/kernels
run "times of the kernels" timeout "${limits[1]}" "$python" benchmarks/kernel_times.py --device "$device" --dtype "$dtype" \
    --repeats "$((repeats * 3))" --output "$work/kernels.json"
run "generation" "$python" -m vargen.cli.main bench --device "$device" --dtype "$dtype" --size "$size" --batch-sizes "$batches" \
    --repeats "$repeats" --seconds 15 --minutes "${limits[2]}" --output "$work/generation.json"
run "training" "$python" -m vargen.cli.main bench --training --device "$device" --dtype "$dtype" --size "$size" \
    --batch-sizes "$train_batch" --repeats "$repeats" --minutes "${limits[3]}" --output "$work/training.json"
mkdir -p "$out"
"$python" -m vargen.bench.report "$work" "$out" "${failed[@]}"
