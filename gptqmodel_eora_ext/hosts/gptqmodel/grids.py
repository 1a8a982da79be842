"""How GPTQModel will round a module's weights."""

from __future__ import annotations

from typing import Any

from gptqmodel.quantization.config import METHOD, RTNConfig

from ...solve import Grid


def module_grid(config: Any, name: str) -> Grid:
    """How GPTQModel will round a module's weights, by its `QuantizeConfig`."""
    # AWQ searches where to clip, by the squared error.
    mse = 2.0 if config.method == METHOD.AWQ else config.dynamic_get(name, "mse", getattr(config, "mse", None))
    return Grid(
        config.dynamic_get(name, "group_size", config.group_size),
        bool(config.dynamic_get(name, "sym", config.sym)),
        float(mse or 0.0),
    )


def spreads_errors(config: Any) -> bool:
    """Whether the quantiser spreads rounding errors over later columns: GPTQ and QQQ do, AWQ and nearest not."""
    return config.method in (METHOD.GPTQ, METHOD.QQQ) and not isinstance(config, RTNConfig)
