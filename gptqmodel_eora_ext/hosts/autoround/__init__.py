"""EoRA in AutoRound's own block loop, and AutoRound's checkpoints in GPTQModel's terms."""
