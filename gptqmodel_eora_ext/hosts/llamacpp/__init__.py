"""llama.cpp: adapters for GGUF models.

llama.cpp itself is no dependency. What is made here are files: its own programs, and whatever embeds them, load those.
"""
