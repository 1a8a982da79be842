"""Prune a model by llm-compressor; run by `pruning.py` in an environment of its own, where this package is not.

python pruning_peer.py MODEL WINDOWS.json OUT METHOD PATTERN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM


def main() -> None:
    model, windows, out, method, pattern = sys.argv[1:]
    if method == "sparsegpt":
        from llmcompressor.modifiers.pruning import SparseGPTModifier as Modifier
    else:
        from llmcompressor.modifiers.pruning import WandaPruningModifier as Modifier
    ids = json.loads(Path(windows).read_text())
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    recipe = Modifier(sparsity=0.5, mask_structure=pattern, targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=len(ids[0]), num_calibration_samples=len(ids))
    # Without this package's own layout, which nothing reads any more.
    loaded.save_pretrained(out, save_compressed=False)


if __name__ == "__main__":
    main()
