"""The recipe of a picture: everything needed to make it again, carried in its file.

Two texts: the "parameters" that other tools write and read, and JSON of our own, complete and strict. In a PNG they are
text entries, "parameters" and "sdjax"; in WebP and JPEG they are EXIF's UserComment and ImageDescription. Files are
written under a temporary name and renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

import sdjax
from sdjax.config import SamplingConfig
from sdjax.request import SAMPLING, Request, filled_in
from sdjax.storage.files import new_file

KEY = "sdjax"
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Kinds of picture files by their ending."""

QUALITY = 95  # of WebP and JPEG
EXIF_FOLDER, DESCRIPTION, COMMENT = 0x8769, 0x010E, 0x9286
COMMENT_CODE = b"UNICODE\0"  # EXIF 2.3, section 4.6.5: the code of the text that follows
OTHER_TOOLS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
"""Sampler names as other tools spell them."""


@dataclass(frozen=True)
class Recipe:
    """What made one picture. Fields are the command line's options; image and mask are [path, sha256] or None."""

    task: str  # txt2img, img2img or inpaint
    prompt: str
    negative_prompt: str
    model: str  # as it was given; "" is the model that comes without --model
    seed: int
    steps: int
    guidance: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    sampler: str
    spacing: str
    eta: float | None
    clip_skip: int | None
    width: int
    height: int
    dtype: str
    strength: float | None
    noise: str
    image: tuple[str, str] | None
    mask: tuple[str, str] | None
    version: str = dataclasses.field(default_factory=lambda: sdjax.__version__)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The inverse of `to_json`. Raises ValueError if it is none."""
        try:
            data = json.loads(text)
            names = {field.name for field in dataclasses.fields(Recipe)}
            if not isinstance(data, dict) or set(data) != names:
                raise ValueError("the entries are not those of a recipe")
            for name in ("image", "mask"):
                data[name] = None if data[name] is None else (str(data[name][0]), str(data[name][1]))
            start, stop = data["guidance_interval"]
            data["guidance_interval"] = (float(start), float(stop))
            return Recipe(**data)
        except (ValueError, TypeError, IndexError, KeyError, RecursionError) as error:
            raise ValueError(f"the recipe in this picture is damaged ({error})") from None

    def parameters(self) -> str:
        """The text that other tools read: prompt, negative prompt, then one line of settings."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        settings: dict[str, Any] = {
            "Steps": self.steps,
            "Sampler": OTHER_TOOLS[self.sampler],
            "Schedule type": self.spacing.capitalize(),
            "CFG scale": self.guidance,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": Path(self.model).name or "built-in",
        }
        if self.strength is not None:
            settings["Denoising strength"] = self.strength
        if self.clip_skip is not None:
            settings["Clip skip"] = self.clip_skip + 1
        settings["Version"] = f"sdjax {self.version}"
        lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
        return "\n".join(lines)


IN_REQUEST = ("prompt", "negative_prompt", "seed", "noise", "clip_skip", *(set(SAMPLING) - {"strength"}))
"""Fields of a request that stand in a recipe as they are."""


def recipe_of(
    request: Request,
    own: SamplingConfig,
    picture: Image.Image,
    *,
    model: str,
    dtype: str,
    image: tuple[str, str] | None = None,
    mask: tuple[str, str] | None = None,
) -> Recipe:
    """The recipe of a request's picture. own: the model's defaults; image, mask: path and sha256 of what was given."""
    full = filled_in(request, own)
    return Recipe(
        task="txt2img" if image is None else "img2img" if mask is None else "inpaint",
        model=model,
        width=picture.width,
        height=picture.height,
        dtype=dtype,
        image=image,
        mask=mask,
        strength=None if image is None else full.strength,
        **{name: getattr(full, name) for name in IN_REQUEST},
    )


def file_hash(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encoded(image: Image.Image, recipe: Recipe, suffix: str = ".png") -> bytes:
    """A picture file of the kind that `suffix` names (one of `FORMATS`), recipe included."""
    parameters, own = recipe.parameters(), recipe.to_json()
    file, kind = io.BytesIO(), FORMATS[suffix]
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", parameters)
        info.add_itxt(KEY, own)
        image.save(file, kind, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[DESCRIPTION] = f"{KEY}: {json.dumps(json.loads(own))}"  # ASCII alone
        exif.get_ifd(EXIF_FOLDER)[COMMENT] = COMMENT_CODE + parameters.encode("utf-16-be")
        image.save(file, kind, exif=exif, quality=QUALITY)
    return file.getvalue()


def save_picture(path: str | Path, image: Image.Image, recipe: Recipe) -> None:
    """Writes the picture with its recipe, as the kind of file that the name ends in.

    A picture that carries a recipe is replaced, since it can be made again; any other file is not.

    Raises:
        FileExistsError: `path` is there and was not made by sdjax. OSError: it could not be written.
    """
    path = Path(path)
    if path.exists() and not has_recipe(path):
        raise FileExistsError(f"{path} is already there and was not made by sdjax; choose another name or remove it")
    with new_file(path, force=True) as temporary:
        temporary.write_bytes(encoded(image, recipe, path.suffix.lower()))


def has_recipe(path: Path) -> bool:
    """Whether a file is a picture with a recipe of ours."""
    try:
        return KEY in _texts(path)
    except (FileNotFoundError, ValueError):
        return False


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a picture.

    Raises:
        FileNotFoundError: no such file. ValueError: no picture, no recipe of ours in it, or a damaged one.
    """
    texts = _texts(Path(path))
    if KEY not in texts:
        raise ValueError(f"{path}: no recipe of sdjax in this picture; it was made, or saved again, by something else")
    try:
        return Recipe.from_json(texts[KEY])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_parameters(path: str | Path) -> str | None:
    """The "parameters" text of a picture by any tool, or None. Errors as `read_recipe`."""
    return _texts(Path(path)).get("parameters")


def _texts(path: Path) -> dict[str, str]:
    """The texts of a PNG by their names; of WebP and JPEG, those that `encoded` writes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture file")
    try:
        with Image.open(path) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                return {str(key): str(value) for key, value in image.text.items()}
            if image.format not in FORMATS.values():
                raise ValueError(f"{path}: a {image.format} picture; recipes are in PNG, WebP and JPEG files")
            exif, texts = image.getexif(), {}
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a picture that can be read ({error})") from None
    comment, description = exif.get_ifd(EXIF_FOLDER).get(COMMENT), exif.get(DESCRIPTION)
    if isinstance(comment, bytes) and comment.startswith(COMMENT_CODE):
        texts["parameters"] = comment[len(COMMENT_CODE) :].decode("utf-16-be", "replace")
    if isinstance(description, str) and description.startswith(f"{KEY}: "):
        texts[KEY] = description.removeprefix(f"{KEY}: ")
    return texts
