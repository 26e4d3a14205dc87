"""A photograph through image-to-image at several strengths, and through inpainting with a drawn mask.

    python examples/edit_photo.py PHOTO [--model sd15] [--output sheet.png]

Without a model: the one in the box, some 30 seconds on two CPU cores. The sheet shows the photograph, strengths
0.25, 0.5 and 0.75, and a disc in the middle regenerated with the rest of the photograph untouched.
"""

import argparse

from PIL import Image, ImageDraw

import sdjax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", help="a picture of any size and format")
    parser.add_argument("--model", help="anything that sdjax.load takes")
    parser.add_argument("--prompt", default="a marble statue")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="sheet.png")
    options = parser.parse_args()

    pipe = sdjax.load(options.model)
    photo = Image.open(options.photo).convert("RGB")
    results = [photo]
    for strength in (0.25, 0.5, 0.75):
        results += pipe.image_to_image(options.prompt, photo, strength=strength, steps=options.steps)
    mask = Image.new("L", photo.size)
    left, top, size = photo.width // 4, photo.height // 4, min(photo.size) // 2
    ImageDraw.Draw(mask).ellipse((left, top, left + size, top + size), fill=255)
    results += pipe.inpaint(options.prompt, photo, mask, steps=options.steps)

    sheet = Image.new("RGB", (photo.width * len(results), photo.height))
    for i, picture in enumerate(results):
        sheet.paste(picture, (i * photo.width, 0))
    sheet.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
