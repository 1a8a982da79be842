"""EoRA in AutoRound's own block loop. `seams.py` lists the seams."""

# The host is imported before any module of this package. Importing it installs the plugin, and that imports modules of
# this package; if one of them were half imported at that moment, the install would fail.
import auto_round  # noqa: F401
