"""GPTQModel: the `EoRA` adapter type in its quantise, save, load and generate flows. `seams.py` lists the seams."""
