"""The functions of a batch as compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

from sdjax.config import ModelConfig
from sdjax.devices.placement import Placement, Program, spread
from sdjax.pipeline.functions import Batch, begin, condition, develop, paint, paint_row, time_tables


class Programs(NamedTuple):
    """The functions above by name, compiled for one model and placement; parameters are still arguments."""

    condition: Callable[[int | None], Program]  # of clip_skip
    time_rows: Program
    begin: Program
    paint: Program
    paint_row: Program
    develop: Program


@lru_cache(maxsize=64)
def programs(config: ModelConfig, placement: Placement) -> Programs:
    """The programs of a model; None marks what all pictures share, a number the axis that they lie along."""
    batch = Batch(kv=1, known=0, mask=0, concat=0)

    @lru_cache
    def conditions(skip: int | None) -> Program:
        return spread(partial(condition, config=config, skip=skip), (None, None, 1), 1, placement)

    return Programs(
        condition=conditions,
        time_rows=spread(partial(time_tables, config=config), (None, 1), 1, placement),
        begin=spread(begin, (0,) * 7, 0, placement),
        paint=spread(partial(paint, config=config), (None, batch, 1, 0, 0, 0), 0, placement),
        paint_row=spread(partial(paint_row, config=config), (None, batch, 0, 0, 0, None), 0, placement),
        develop=spread(partial(develop, config=config), (None, 0), 0, placement),
    )
