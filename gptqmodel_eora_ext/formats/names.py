"""Names of files and of their fields, as GPTQModel, PEFT and this package write them."""

# GPTQModel's description of a checkpoint's quantisation.
QUANTIZE_CONFIG = "quantize_config.json"
# Key in that file's `meta` which says that a plan of this package chose the bits: its kernels serve such a checkpoint
# without being asked, with an adapter or without.
PLAN_MARK = "eora_plan"
# transformers' description of a model.
MODEL_CONFIG = "config.json"
# PEFT's two files of an adapter.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What this package tells of an adapter beside that: objective, calibration, versions, errors per module.
ADAPTER_DETAILS = "eora.json"
# What a recipe leaves beside a checkpoint's own files: the plan that it ran, and what was asked of it.
PLAN_FILE, RECIPE_FILE = "plan.json", "recipe.json"
# How a model was pruned, in its own folder. Hosts do not read it.
PRUNING_DETAILS = "pruning.json"
