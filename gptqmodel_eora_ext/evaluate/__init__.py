"""Measuring a model: loss and perplexity, size, and the demonstration on a real model."""
