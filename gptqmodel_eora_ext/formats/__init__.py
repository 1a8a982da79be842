"""Byte layouts, each drawn in its file's docstring: tensors in, tensors out; no host, no kernel."""
