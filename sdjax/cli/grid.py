"""`sdjax grid`: one prompt over two or three settings, as pictures and as one labelled sheet."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.cli.job import check_of, do_job, line_settings
from sdjax.cli.model import conversion_of
from sdjax.cli.terminal import note
from sdjax.request import check_positive

if TYPE_CHECKING:
    from PIL import Image

SHEET = "grid.png"


def grid(options: argparse.Namespace) -> int:
    """The pictures of a grid, and its sheet; exit status 1 if some could not be made."""
    # What is asked for
    check_positive(batch=options.batch)
    texts = [text for text in (options.x, options.y, options.z) if text is not None]
    if options.z is not None and options.y is None:
        raise ValueError("a grid with z needs y, too; y are its rows, z further blocks of them")

    from sdjax.jobs import grid as grids
    from sdjax.jobs import run as jobs
    from sdjax.jobs.processes import ALONE
    from sdjax.jobs.sheet import draw, layout_of, refuse_other, save_sheet
    from sdjax.load import configuration, library_of

    asked = [grids.written(text, options.request) for text in texts]
    out, kind = Path(options.output), options.request
    jobs.check_output(out, None)
    refuse_other(out / SHEET)
    config = configuration(options.model or None, **conversion_of(options))
    fields: dict[str, Any] = {"prompt": options.prompt, **line_settings(options)}
    fields |= {name: value for name, value in (("init_image", options.image), ("mask", options.mask)) if value}
    grids.refuse_too_many([each.total for each in asked], grids.shared_size(fields, config))
    axes = [each.axis() for each in asked]
    library = library_of(options.lora_dir)
    check = check_of(options.model, config, library)
    text, lines = grids.lines_of(fields, axes, check, kind)
    sizes = [grids.picture_size(line.request, config) for line in lines]
    layout = layout_of(axes, sizes)

    # What it will be
    counts = " x ".join(f"{len(each.labels)} {each.name}" for each in axes)
    weight = grids.in_bytes(sum(3 * width * height for width, height in sizes))
    of_sheet = f"{layout.width}x{layout.height}, up to {grids.in_bytes(3 * layout.width * layout.height)}"
    print(f"{len(lines)} pictures ({counts}), up to {weight}; {SHEET} {of_sheet}")
    if layout.scale < 1:
        note(f"{SHEET} shows the pictures at {100 * layout.scale:.0f} % of their size; those in {out} are whole")

    def finish() -> None:
        with open(out / "manifest.jsonl", encoding="utf-8") as file:
            entries = {entry["id"]: entry for entry in map(json.loads, file)}

        def pictures() -> Iterator[Image.Image | None]:
            for line in lines:
                entry = entries.get(line.id)
                yield None if entry is None else _opened(out / entry["file"])

        made = [entries[line.id]["settings"] for line in lines if line.id in entries]
        shared = grids.shared_texts(made, axes, kind)
        as_made = layout_of(axes, [(one["width"], one["height"]) for one in made] or sizes)
        save_sheet(out / SHEET, draw(as_made, shared, pictures()), shared)

    status = do_job(
        options,
        lambda: io.StringIO(text),
        ".jsonl",
        config=config,
        check=check,
        library=library,
        defaults={},
        share=ALONE,
        on_done=finish,
    )
    if not options.dry_run:
        print(out / SHEET)
    return status


def _opened(path: Path) -> Image.Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
