#!/usr/bin/env bash
# The 2-bit study on SmolLM2-135M: two ranks and a budget, with the text that comes with the package. Stop it at any
# time and start it again: it goes on.
set -euo pipefail
out=${1:-study}
model=$(python -c "from gptqmodel_eora_ext.evaluate.models import smollm2; print(smollm2())")
texts=$(python -c "from gptqmodel_eora_ext.evaluate.demo import demo_text; print(demo_text('calibration').parent)")
eora study "$model" "$out" --bits 2 --group-size 64 --iters 50 --samples 64 --seqlen 256 \
    --calibration "$texts/calibration.txt" --text "$texts/heldout.txt" --max-windows 16 \
    --rank 32 --rank 64 --budget 0.5bpw
