"""One small training of every part: its settings, and eight pictures to learn."""

import json

from PIL import Image, ImageDraw

from sdjax.config import CLIPVisionConfig
from sdjax.train.settings import Settings
from tests.small import COLOURS

VISION = CLIPVisionConfig(image_size=16, patch=8, width=16, layers=1, heads=2, mlp_width=32, projection=16)


SETTINGS = Settings(
    steps=24, batch=8, learning_rate=1e-2, warmup=2, decay=8, ema=0.9, save_every=12, sample_every=24, sigma=0.5
)


def write_pictures(folder):
    """Eight pictures: a disc and a square in each of four colours."""
    rows = []
    for colour in COLOURS:
        for shape in ("disc", "square"):
            picture = Image.new("RGB", (16, 16), "white")
            draw = ImageDraw.Draw(picture)
            (draw.ellipse if shape == "disc" else draw.rectangle)((3, 3, 12, 12), fill=colour)
            picture.save(folder / f"{colour}-{shape}.png")
            rows.append({"file_name": f"{colour}-{shape}.png", "text": [f"{colour} {shape}", f"a {colour} {shape}"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
