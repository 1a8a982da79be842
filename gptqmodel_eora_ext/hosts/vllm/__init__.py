"""vLLM: checkpoints in GPTQ layout served with their adapters, by the package's own kernels.

vLLM is no dependency. It finds the plugin by its entry point `vllm.general_plugins`, in each of its processes, and
calls `plugin.register`. `seams.py` lists every place where it is touched.
"""
