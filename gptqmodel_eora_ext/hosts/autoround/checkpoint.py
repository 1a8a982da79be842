from pathlib import Path
def name_adapter(checkpoint, folder, factors): pass
