"""Four pictures of one prompt, side by side, with a line for every step.

    python examples/text_to_image.py [--model v1-5-pruned-emaonly.ckpt] [--output sheet.png]

Without a model: the one in the box, some 20 seconds on two CPU cores, a sheet of 4 pictograms (256 x 64).
"""

import argparse

from PIL import Image

import sdjax


def show(done: int, total: int, x0_hat: object) -> None:
    print(f"step {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="anything that sdjax.load takes")
    parser.add_argument("--prompt", default="a lighthouse at dusk, oil painting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="sheet.png")
    options = parser.parse_args()

    pipe = sdjax.load(options.model)
    pictures = pipe.text_to_image(options.prompt, "blurry", steps=options.steps, seed=0, count=4, progress=show)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * width, 0))
    sheet.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
