#!/usr/bin/env bash
# The quickstart over three seeds (data, model, warm start and SC-SDPO alike), from the repository root after `make install`.
set -euo pipefail
cd "$(dirname "$0")/../.."
for seed in 1 2 3; do
    out=runs/seed-$seed
    .venv/bin/python tools/make_quickstart.py "$out/start" --seed "$seed"
    .venv/bin/megasd train configs/quickstart_warmup.yaml run.seed="$seed" model.path="$out/start/model" \
        data.train="$out/start/warmup.jsonl" run.dir="$out/warmup" run.overwrite=true >"$out/warmup.log"
    .venv/bin/megasd train configs/quickstart.yaml run.seed="$seed" model.path="$out/warmup/hf" \
        data.train="$out/start/train.jsonl" data.eval="$out/start/eval.jsonl" run.dir="$out/sc_sdpo" run.overwrite=true >"$out/sc_sdpo.log"
    echo "seed $seed"
    tail -n 5 "$out/sc_sdpo.log"
done
