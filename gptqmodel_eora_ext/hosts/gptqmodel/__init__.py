"""GPTQModel: the `EoRA` adapter type in its quantise, save, load and generate flows. `seams.py` lists the seams."""

# First of all: its import installs the plugin, which needs modules of this package whole.
import gptqmodel  # noqa: F401
