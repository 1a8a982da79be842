"""Saving and loading: a GPTQModel checkpoint that names its adapter, with this plugin or without.

The checkpoint's `quantize_config.json` gets ``"adapter": {"name": "lora", "path": "eora", "rank": r}``: the name is
`lora` because GPTQModel without the plugin knows no other, and what is in the folder is a plain LoRA. With the plugin,
a folder that holds `eora.json` is loaded as `EoRA`.
"""

from .load import adapters_off

__all__ = ["adapters_off"]
