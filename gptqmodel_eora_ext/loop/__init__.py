"""One run over a model's layers, apart from any host."""
