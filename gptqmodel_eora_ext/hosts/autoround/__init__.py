"""EoRA in AutoRound's own block loop. `seams.py` lists the seams."""

# First of all: its import installs the plugin, which needs modules of this package whole.
import auto_round  # noqa: F401
