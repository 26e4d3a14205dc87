"""Draws the six programs that make a picture, with the shapes of what goes between them.

    python examples/draw_programs.py examples/pictures/programs.png

Shapes are worked out from the functions themselves, for Stable Diffusion 1.5 at its own size; nothing is computed.
"""

import argparse
from functools import partial
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdjax.config import SD15
from sdjax.models.params import abstract_params
from sdjax.pipeline import functions
from sdjax.pipeline.batching import assemble, conditioned, initial, state_of
from sdjax.pipeline.prepare import prepare
from sdjax.request import Request
from sdjax.text.prompt import Words
from sdjax.text.tokenizer import clip_tokenizer

PICTURES = 5  # a number of pictures that is no other axis; shown as b
WIDTH, BOX, LEFT, ROW = 1180, 330, 40, 118
INK, PAPER, FILL, EDGE = "#1d2733", "#ffffff", "#eaf1f8", "#35618e"


def shape(leaf: Any) -> str:
    """f32[b, 64, 64, 4], with b for the pictures."""
    name = "key" if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).name
    short = name.replace("float", "f").replace("uint", "u").replace("int", "i")
    return f"{short}[{', '.join('b' if size == PICTURES else str(size) for size in leaf.shape)}]"


def steps() -> list[tuple[str, str, str, str]]:
    """Of every program: its name, what goes in, what it does, what comes out."""
    params, config = abstract_params(SD15), SD15
    words = Words(clip_tokenizer(), config.clip.length, config.clip.vocab_size)
    latents = np.zeros((1, 64, 64, 4), np.float32)
    one = prepare(Request("", steps=25), config, "", words=words, encode=lambda _: latents, sources={})
    batch = assemble([one] * PICTURES, config)
    given = conditioned(partial(jax.eval_shape, partial(functions.condition, config=config)), params, batch)
    carry = initial(partial(jax.eval_shape, functions.initial_latents), batch)
    state = state_of(batch, carry, given)
    after = jax.eval_shape(partial(functions.sample, config=config), params, state)
    picture = jax.ShapeDtypeStruct((PICTURES, 512, 512, 3), np.float32)
    encoded = jax.eval_shape(partial(functions.encode, config=config), params, picture)
    decoded = jax.eval_shape(partial(functions.decode, config=config), params, after.carry.x)
    conditioning, held = given
    kv = jax.tree.leaves(held["unet"])
    rows = f"{state.rows.scale.shape[1]} rows of the sampler's table"
    return [
        (
            "encode",
            f"pictures {shape(picture)}",
            "VAE encoder; for img2img and inpainting",
            f"latents {shape(encoded)}",
        ),
        (
            "condition",
            f"token ids {shape(batch.prompts.ids)} with weights, {rows}",
            "CLIP text encoder, weights of the prompt, keys and values, timesteps",
            f"texts {shape(conditioning.contexts)}, {len(kv)} keys and values such as {shape(kv[0])}, shifts",
        ),
        (
            "initial_latents",
            f"{shape(batch.key)}, sigma {shape(batch.sigma)}, known {shape(batch.known)}",
            "noise of each picture's own seed, around the known picture if there is one",
            f"x {shape(carry.x)}",
        ),
        (
            "sample",
            f"State: x {shape(carry.x)}, index {shape(state.index)}, rows, conditioning",
            "the UNet, guidance, one row of each picture's own sampler; one lax.scan",
            f"x {shape(after.carry.x)}, index {shape(after.index)}",
        ),
        (
            "admit",
            f"State, and places {shape(np.zeros(PICTURES, np.int32))} of finished pictures",
            "the next pictures take the places of those that are finished",
            "State",
        ),
        ("decode", f"latents {shape(after.carry.x)}", "VAE decoder", f"pictures {shape(decoded)}"),
    ]


def drawn(rows: list[tuple[str, str, str, str]]) -> Image.Image:
    """A row for every program: what goes in, the box, what comes out."""
    image = Image.new("RGB", (WIDTH, ROW * len(rows) + 70), PAPER)
    draw = ImageDraw.Draw(image)
    name, text = ImageFont.load_default(26), ImageFont.load_default(17)
    for i, (title, before, what, after) in enumerate(rows):
        top = 20 + ROW * i
        box = (LEFT, top, LEFT + BOX, top + ROW - 34)
        draw.rounded_rectangle(box, 12, FILL, EDGE, 3)
        draw.text((LEFT + BOX // 2, (box[1] + box[3]) // 2), title, INK, name, anchor="mm")
        for line, said in enumerate((f"in:   {before}", what, f"out: {after}")):
            draw.text((LEFT + BOX + 30, top + 4 + 29 * line), said, EDGE if line == 1 else INK, text)
        if i + 1 < len(rows):
            x, y = LEFT + BOX // 2, box[3]
            draw.line((x, y, x, y + 34), EDGE, 3)
            draw.polygon([(x - 7, y + 24), (x + 7, y + 24), (x, y + 34)], EDGE)
    loop = 20 + ROW * 3 + 40, 20 + ROW * 4 + 40  # sample and admit take turns
    draw.line([(LEFT, loop[1]), (LEFT - 22, loop[1]), (LEFT - 22, loop[0]), (LEFT, loop[0])], EDGE, 3)
    draw.polygon([(LEFT - 12, loop[0] - 7), (LEFT - 12, loop[0] + 7), (LEFT, loop[0])], EDGE)
    draw.text(
        (LEFT, ROW * len(rows) + 28),
        "b: pictures, always the first axis. Parameters are one tree {text, vae, unet}, an argument of every program.",
        INK,
        text,
    )
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="programs.png")
    options = parser.parse_args()
    drawn(steps()).save(options.output, optimize=True)
    print(options.output)


if __name__ == "__main__":
    main()
