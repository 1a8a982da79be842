"""What `test_kept_sweep.py` runs in two processes: a survey that ends, in all of them, after one layer."""

from __future__ import annotations

import sys
from typing import Any

import torch

from gptqmodel_eora_ext.system.distributed import joined

from .test_kept_sweep import surveyed


def one_layer(title: str) -> Any:
    def wrap(items: Any) -> Any:
        for item in items:
            yield item
            raise KeyboardInterrupt

    return wrap


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as group:
        try:
            surveyed(one_layer, "relative")
        except KeyboardInterrupt:
            assert group is not None
            group.barrier("the other has kept its layer, too")
            sys.exit()
