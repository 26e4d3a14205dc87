"""Data sets for tests, in the forms that people have them."""

import csv
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

CAPTIONS = {"a.png": "a red square", "b.jpg": "Ein grüner Kreis, groß", "sub/c.webp": "a cat"}


COLOURS = {"a.png": (250, 10, 10), "b.jpg": (20, 200, 40), "sub/c.webp": (90, 90, 255)}


def encoded(name, colour=(10, 20, 30), size=(12, 9), **options):
    """The bytes of a picture of one colour, in the format of the name."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, Image.registered_extensions()[Path(name).suffix], **options)
    return buffer.getvalue()


PICTURES = {name: encoded(name, colour) for name, colour in COLOURS.items()}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def comma_separated(rows, columns=("file_name", "text")):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue()


PNG = PICTURES["a.png"]
