"""Checkpoints that transformers loads and no other host here made: pruned ones, and those of other quantisers."""
