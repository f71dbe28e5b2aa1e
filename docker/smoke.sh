#!/usr/bin/env bash
# Whether an image holds together: imports of both environments, a config checked whole, then `megasd doctor`.
#   docker run --rm --gpus all --shm-size=16g IMAGE /smoke/smoke.sh
# --build: as a step of docker build, where neither GPU nor shared memory is that of a run; doctor's verdict is printed and not heeded.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if python -c 'import megatron.core' 2>/dev/null; then
    python -W ignore -c 'import torch, megatron.core, transformers, megasd; print("trainer:", torch.__version__, "megatron-core", megatron.core.__version__)'
    if nvidia-smi >/dev/null 2>&1; then
        python -c 'import transformer_engine.pytorch, flash_attn; print("TransformerEngine and flash-attention import")'
    fi
    python "$here/make_quickstart.py" "$work/data" >/dev/null
    megasd train "$here/quickstart.yaml" model.path="$work/data/model" data.train="$work/data/train.jsonl" \
        data.eval="$work/data/eval.jsonl" run.dir="$work/run" --dry-run >"$work/plan.yaml"
    echo "dry run: $(grep -c . "$work/plan.yaml") lines"
fi

engine=${MEGASD_ENGINE_PYTHON:-python}
"$engine" -c 'import importlib.metadata as m, torch; print("engine: sglang", m.version("sglang"), "torch", torch.__version__)'
"$engine" -c 'import megasd.cli, megasd.engine.serve' # where MEGASD_ENGINE_PYTHON is set, without Megatron

if [ "${1:-}" = --build ]; then
    megasd doctor || true
else
    megasd doctor
fi
