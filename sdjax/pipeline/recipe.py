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
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image, PngImagePlugin

from sdjax.config import SamplingConfig
from sdjax.diffusion.names import TRAITS
from sdjax.request import TASKS, Request, Setting, settings, task_of, with_defaults
from sdjax.storage.files import new_file
from sdjax.text.syntax import lora_of

KEY = "sdjax"
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Kinds of picture files by their ending."""

QUALITY = 95  # of WebP and JPEG
EXIF_FOLDER, DESCRIPTION, COMMENT = 0x8769, 0x010E, 0x9286
GRAPHS = (0x0110, 0x010F)
"""EXIF's Model and Make, where ComfyUI puts its graphs in WebP files, as "prompt:{...}" and "workflow:{...}"."""

COMMENT_CODE = b"UNICODE\0"  # EXIF 2.3, section 4.6.5: the code of the text that follows
FIRST: tuple[str, ...] = (
    *("prompt", "negative_prompt", "seed", "steps", "guidance", "guidance_rescale", "guidance_interval", "sampler"),
    *("spacing", "eta", "clip_skip", "width", "height", "strength", "noise"),
)
"""Settings that every recipe has; later ones may be missing from recipes of earlier versions, and had their default."""

ADDED: dict[str, Any] = {"conversion": {}, "environment": {}, "adapters": {}, "embeddings": {}, "weighting": "none"}
ADDED |= {"asked_size": None}
"""Further entries that recipes of earlier versions lack, and what held then."""

UNSHOWN = ("image", "mask", "id")
"""Settings of a request that are not in a recipe as they are."""

KINDS = {
    "text": str,
    "texts": tuple[str, ...],
    "int": int,
    "float": float,
    "flag": bool,
    "fractions": tuple[float, float],
    "noise": str,
}
"""The types of a recipe's entries, by the kind of the setting."""


def _environment() -> dict[str, str]:
    from sdjax.devices.platform import environment  # JAX knows a part of it; a recipe that is read says it all itself

    return environment()


@dataclass(frozen=True, kw_only=True)
class RecipeBase:
    """What made one picture: every setting of its request by name (`recipe_class`), and

    task: one of `TASKS`.
    model: as it was given; "" is the model in the box.
    dtype: of the parameters.
    image, mask: (path, sha256) of what was given, or None.
    asked_size: (width, height) to work at, where a picture was given and they were asked for.
    conversion: how a foreign model's file was read (`sdjax.load`).
    adapters, embeddings: path -> sha256 of those that were used.
    environment: what was set around the process that changes numbers.
    version: of sdjax.
    """

    task: str
    model: str
    dtype: str
    image: tuple[str, str] | None
    mask: tuple[str, str] | None
    asked_size: tuple[int, int] | None = None
    conversion: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    embeddings: dict[str, str] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=_environment)
    version: str = dataclasses.field(default_factory=lambda: version("sdjax"))

    if TYPE_CHECKING:
        settings: ClassVar[dict[str, Setting]]

        def __init__(self, **entries: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def to_json(self) -> str:
        text = json.dumps(dataclasses.asdict(self), ensure_ascii=False)
        if text.encode("utf-8", "replace").decode() != text:  # a file's name that is no text
            return json.dumps(dataclasses.asdict(self))
        return text

    @staticmethod
    def from_json(text: str, kind: type[Request] = Request) -> RecipeBase:
        """The inverse of `to_json`. kind: the class of requests that the recipe is of.

        Raises:
            ValueError: it is none.
        """
        made = recipe_class(kind)  # type: ignore[arg-type]
        try:
            data: dict[str, Any] = json.loads(text)
            kinds = typing.get_type_hints(made)
            earlier = {field.name: field.default for field in dataclasses.fields(kind) if field.name in made.settings}
            earlier = {name: value for name, value in earlier.items() if name not in FIRST} | ADDED
            if not isinstance(data, dict) or not set(kinds) - {*earlier} <= set(data):
                raise ValueError("the entries are not those of a recipe")
            if unknown := sorted(set(data) - set(kinds)):
                by = f"it was made by sdjax {data['version']!s:.20}; update yours"
                raise ValueError(f"{unknown[0]!r:.60} is no entry that is known ({by})")
            data = {name: list(v) if isinstance(v, tuple) else v for name, v in earlier.items()} | data
            for name, expected in kinds.items():
                if not _fits(expected, data[name]):
                    raise ValueError(f"{name} cannot be {data[name]!r:.60}")
            for name, known in (("task", TASKS), ("sampler", tuple(TRAITS))):
                if data[name] not in known:
                    raise ValueError(f"{data[name]!r:.60} is no {name}; there are {', '.join(known)}")
            lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
            return made(**(data | lists))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the recipe is damaged ({error})") from None

    def parameters(self) -> str:
        """The text that other tools read: prompt, negative prompt, then one line of settings."""
        tags = [lora_of(text) for text in self.loras]
        lines = [" ".join([self.prompt, *(f"<lora:{Path(tag.name).stem}:{tag.text:g}:{tag.unet:g}>" for tag in tags)])]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        said = labelled(vars(self), type(self))
        for label, files in (("Lora hashes", self.adapters), ("TI hashes", self.embeddings)):
            if files:
                hashes = ", ".join(f"{Path(path).stem}: {digest[:12]}" for path, digest in files.items())
                said[label] = f'"{hashes}"'
        said["Version"] = f"sdjax {self.version}"
        lines.append(", ".join(f"{name}: {value}" for name, value in said.items()))
        return "\n".join(lines).encode("utf-8", "replace").decode()


LABELS = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed")
"""What other tools expect first, in this order."""


def labelled(values: Mapping[str, Any], kind: type[RecipeBase]) -> dict[str, Any]:
    """What a recipe of a kind says by the labels that other tools read: settings that are not as usual, size and model.

    values: its entries by name.
    """
    said: dict[str, Any] = {}
    for name, known in kind.settings.items():
        value, usual = values[name], kind.__dataclass_fields__[name].default
        if known.label is None or value is None or (known.label not in LABELS and value == usual):
            continue
        if (shown := known.shown(value)) is not None:
            said[known.label] = shown
    said = {label: said.pop(label) for label in LABELS if label in said} | said
    return said | {"Size": f"{values['width']}x{values['height']}", "Model": Path(values["model"]).name or "built-in"}


@lru_cache
def recipe_class(kind: type[Request]) -> type[RecipeBase]:
    """A recipe with an entry for every setting of a class of requests."""
    known = {name: each for name, each in settings(kind).items() if name not in UNSHOWN}
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    resolved = with_defaults(Request(""), SamplingConfig())
    may_lack = [name for name in known if defaults[name] is None and getattr(resolved, name, None) is None]
    may_lack = [*(name for name in may_lack if name not in ("width", "height")), "strength"]
    fields: list[Any] = []
    for name, each in known.items():
        entry: Any = KINDS[each.kind]
        more = () if name in FIRST else (dataclasses.field(default=defaults[name]),)
        fields.append((name, entry | None if name in may_lack else entry, *more))
    made: Any = dataclasses.make_dataclass(
        "Recipe", fields, bases=(RecipeBase,), frozen=True, kw_only=True, namespace={"settings": known}
    )
    return made


if TYPE_CHECKING:
    Recipe = RecipeBase
else:
    Recipe = recipe_class(Request)
    """The recipe of a `Request`."""


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value, as JSON gives it, is of a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in args:
        return value is None or _fits(args[0], value)
    if origin is tuple and args[-1] is Ellipsis:
        return isinstance(value, list) and all(_fits(args[0], one) for one in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(_fits, args, value))
    if origin is dict:
        return isinstance(value, dict) and (args[1] is Any or all(_fits(args[1], one) for one in value.values()))
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    return type(value) is kind


def recipe_of(
    request: Request,
    defaults: SamplingConfig,
    picture: Image.Image,
    *,
    model: str,
    dtype: str,
    image: tuple[str, str] | None = None,
    mask: tuple[str, str] | None = None,
    conversion: dict[str, Any] | None = None,
    adapters: dict[str, str] | None = None,
    embeddings: dict[str, str] | None = None,
    image_size: int | None = None,
) -> Recipe:
    """The recipe of a request's picture.

    defaults: the model's own settings. image, mask: path and sha256 of what was given. The rest: see `Recipe`.
    image_size: the model's own, which a first pass has if no other was asked for; None: as the picture's.
    """
    resolved = with_defaults(request, defaults)
    made = recipe_class(type(request))  # type: ignore[arg-type]
    values = {name: getattr(resolved, name) for name in made.settings}
    values |= dict(width=picture.width, height=picture.height)
    if request.hires_scale is not None or request.hires_size is not None:  # the size of the first pass
        for side in ("width", "height"):
            values[side] = getattr(request, side) or image_size or values[side]
    values["strength"] = None if image is None else resolved.strength
    asked = None if image is None or request.width is None else (request.width, request.height)
    values |= dict(asked_size=asked, adapters=adapters or {}, embeddings=embeddings or {}, conversion=conversion or {})
    return made(task=task_of(request), model=model, dtype=dtype, image=image, mask=mask, **values)


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
        exif.endian = ">"  # the order of the bytes in the comment, too
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
    refuse_foreign(path)
    with new_file(path, force=True) as temporary:
        temporary.write_bytes(encoded(image, recipe, path.suffix.lower()))


def refuse_foreign(path: Path) -> None:
    """Raises FileExistsError if `path` is there and not a picture made by sdjax."""
    if path.exists() and not has_recipe(path):
        raise FileExistsError(f"{path} is already there and was not made by sdjax; choose another name or remove it")


def has_recipe(path: Path) -> bool:
    """Whether a file is a picture with a recipe of ours."""
    try:
        return KEY in texts_of(path)
    except (OSError, ValueError):
        return False


def read_recipe(path: str | Path, kind: type[Request] = Request) -> Recipe:
    """The recipe of a picture, or in a .json as shards have it next to each picture.

    Raises:
        FileNotFoundError: no such file. ValueError: no picture, no recipe of ours in it, or a damaged one.
    """
    path = Path(path)
    if path.suffix.lower() == ".json" and path.is_file():
        texts = {KEY: path.read_text("utf-8", "replace")}
    else:
        texts = texts_of(path)
    if KEY not in texts:
        raise ValueError(f"{path}: no recipe of sdjax in this picture; it was made, or saved again, by something else")
    try:
        return Recipe.from_json(texts[KEY], kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_parameters(path: str | Path) -> str | None:
    """The "parameters" text of a picture by any tool, or None. Errors as `read_recipe`."""
    return texts_of(path).get("parameters")


def texts_of(path: str | Path) -> dict[str, str]:
    """The texts in a picture by any tool, by their names: of a PNG all, of other kinds those in EXIF that are known.

    Raises:
        FileNotFoundError: no such file. ValueError: no picture, or one whose texts cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such picture file")
    try:
        with Image.open(path) as image:
            kind, texts = image.format, _exif_texts(image)
            if isinstance(image, PngImagePlugin.PngImageFile):
                texts |= {str(key): str(value) for key, value in image.text.items()}
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; sdjax makes no such pictures") from None
    except Exception as error:  # Pillow raises almost anything on damaged files and metadata
        raise ValueError(f"{path}: not a picture that can be read ({error or type(error).__name__})") from None
    if not texts and kind not in FORMATS.values():
        raise ValueError(f"{path}: a {kind} picture; recipes are in PNG, WebP and JPEG files")
    return texts


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """UserComment as "parameters", our own recipe, ComfyUI's graphs; what is odd in EXIF is passed over."""
    texts: dict[str, str] = {}
    try:
        exif = image.getexif()
        comment, description = exif.get_ifd(EXIF_FOLDER).get(COMMENT), exif.get(DESCRIPTION)
    except Exception:  # a damaged EXIF
        return texts
    parameters = decoded_comment(comment, "be" if exif.endian == ">" else "le")
    if parameters is not None:
        texts["parameters"] = parameters
    if isinstance(description, str) and description.startswith(f"{KEY}: "):
        texts[KEY] = description.removeprefix(f"{KEY}: ")
    for tag in GRAPHS:
        name, colon, graph = str(exif.get(tag, "")).partition(":")
        if colon and name.lower() in ("prompt", "workflow"):
            texts[name.lower()] = graph.strip("\0")
    return texts


def decoded_comment(comment: Any, order: str) -> str | None:
    """The text of an EXIF UserComment, or None if it is no text (EXIF 2.3, section 4.6.5).

    order: "be" or "le", the byte order that the EXIF itself says. Tools disagree about that of UTF-16, so the one that
    gives more plain letters is taken, or UTF-8.
    """
    if isinstance(comment, str):
        return comment.removeprefix("UNICODE").removeprefix("ASCII").strip("\0")
    if not isinstance(comment, bytes):
        return None
    code, text = comment[:8], comment[8:]
    if code == COMMENT_CODE:
        other = {"be": "le", "le": "be"}[order]
        marked = text.startswith((b"\xff\xfe", b"\xfe\xff"))
        texts = [text.decode(codec, "replace") for codec in (f"utf-16-{order}", f"utf-16-{other}")]
        with suppress(UnicodeDecodeError):
            texts.append(text.decode("utf-8"))
        return (text.decode("utf-16", "replace") if marked else max(texts, key=_plain_letters)).strip("\0")
    if code == b"JIS\0\0\0\0\0":
        return text.decode("iso2022_jp", "replace").strip("\0")
    if code in (b"ASCII\0\0\0", bytes(8)):
        return text.decode("utf-8", "replace").strip("\0")
    return comment.decode("utf-8", "replace").strip("\0")  # no code at all


def _plain_letters(text: str) -> int:
    """Characters of ASCII; none where zeros stand between them, as in UTF-16 read as UTF-8."""
    return 0 if "\0" in text.strip("\0") else sum("\t" <= letter <= "~" for letter in text)
