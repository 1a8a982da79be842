"""`python -m gptqmodel_eora_ext.cli`: the command where no script was installed."""

from . import app

app()
