"""`sdjax warmup`: programs ahead of time."""

from __future__ import annotations

import argparse

from sdjax.cli.model import load_model, placement_of, progress_bars
from sdjax.config import ModelConfig
from sdjax.request import Request, check_positive, check_request, parse_size


def warmup(options: argparse.Namespace) -> int:
    """Compiles every program for one size and number of pictures."""
    from sdjax.devices.compilation import kept_in
    from sdjax.pipeline.warmup import warm_up

    check_positive(count=options.count)
    size = (None, None) if options.size is None else parse_size(options.size)
    request = Request("", width=size[0], height=size[1])

    def check(config: ModelConfig) -> None:
        check_request(request, config, options.model or config.name)

    with progress_bars(options.model) as (on_convert, _):
        pipe = load_model(options, on_convert, placement=placement_of(options), on_config=check)
    width, height = size[0] or pipe.config.image_size, size[1] or pipe.config.image_size
    seconds = warm_up(pipe, width, height, options.count)
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value >= 0.1:
            print(f"{value:7.1f} s  {name}")
    folder = kept_in()
    where = "not kept" if folder is None else f"kept in {folder}"
    print(f"{sum(seconds.values()):7.1f} s  {len(seconds)} programs; {where}")
    return 0
