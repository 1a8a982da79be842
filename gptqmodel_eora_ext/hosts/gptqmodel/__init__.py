"""GPTQModel: the `EoRA` adapter type in its quantise, save, load and generate flows. `seams.py` lists the seams."""

# The host is imported before any module of this package. Importing it installs the plugin, and that imports modules of
# this package; if one of them were half imported at that moment, the install would fail.
import gptqmodel  # noqa: F401
