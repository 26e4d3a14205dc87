"""A photograph through image-to-image at several strengths, and through inpainting with drawn masks.

    python examples/edit_photo.py PHOTO [--model sd15] [--output sheet.png]

Without a model: the one in the box, about a minute on two CPU cores. The sheet shows the photograph, strengths
0.25, 0.5 and 0.75, and a disc in the middle regenerated with the rest of the photograph untouched; the same disc with
the region around it alone at the model's own size; more of the photograph changed from left to right; and the
photograph extended to the right by half of its width.
"""

import argparse

from PIL import Image, ImageDraw

import sdjax


def ramp(size: tuple[int, int]) -> Image.Image:
    """A mask that is black on the left, white on the right, and grey between."""
    return Image.linear_gradient("L").rotate(90).resize(size)


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
    results += pipe.inpaint(options.prompt, photo, mask, steps=options.steps, only_masked=photo.width // 16, feather=4)
    results += pipe.inpaint(options.prompt, photo, ramp(photo.size), steps=options.steps, soft_mask="differential")
    results += pipe.inpaint(options.prompt, photo, outpaint=f"right={photo.width // 2}", steps=options.steps)

    sheet, left = Image.new("RGB", (sum(picture.width for picture in results), photo.height)), 0
    for picture in results:
        sheet.paste(picture, (left, 0))
        left += picture.width
    sheet.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
