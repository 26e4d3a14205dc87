"""The door to checkpoint files: what a file is, is found by its first bytes and never by its name."""

from __future__ import annotations

import stat
from pathlib import Path

from convert.files.source import CheckpointError, Source

LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the number that opens files of torch before 1.6, as pickled


WHAT_IT_IS = (
    (b"GGUF", "a GGUF file, whose quantised weights are not supported; get the model as .safetensors"),
    (b"\x89PNG", "a picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a picture, not a checkpoint"),
    (b"GIF8", "a picture, not a checkpoint"),
    (b"RIFF", "a picture or sound, not a checkpoint"),
    (b"%PDF", "a PDF document, not a checkpoint"),
    (b"\x7fELF", "a program, not a checkpoint"),
    (b"MZ", "a program, not a checkpoint"),
    (b"\x93NUMPY", "an array of numpy; expected a .ckpt or .safetensors"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"BZh", "a bzip2 file; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with git lfs pull"),
    (b"\x89HDF", "an HDF5 file; expected a .ckpt or .safetensors"),
    (b"{", "a text in JSON; expected a .ckpt or .safetensors"),
    (b"<", "a web page, not a checkpoint; the download failed, get the file again"),
)
"""How other files begin, spaces aside, and what to say of them."""


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint file.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint, damaged, or unsafe.
    """
    from convert.files import flax_msgpack as flax_file
    from convert.files import safetensors as safetensors_file
    from convert.files import torch_legacy as legacy_file
    from convert.files import torch_zip as torch_file

    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        what = "no such file"
        if path.is_symlink():
            what = "a symbolic link to nothing; where it is in the hub's cache the download is not complete"
        raise FileNotFoundError(f"{path}: {what}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise CheckpointError(f"{path}: {what}; expected a .ckpt or .safetensors file")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return torch_file.open_torch(path)
    if head[8:9] in (b"{", b" ") and int.from_bytes(head[:8], "little") <= safetensors_file.HEADER_BOUND:
        return safetensors_file.open_safetensors(path)
    if LEGACY_MAGIC in head[:32]:
        return legacy_file.open_legacy(path)
    if flax_file.is_msgpack(head):
        return flax_file.open_msgpack(path)
    raise CheckpointError(f"{path}: {_what_else(head)}")


def what_it_is(head: bytes) -> str | None:
    """What a file is that begins like this, of `WHAT_IT_IS`."""
    if not head:
        return "empty, only 0 bytes; the download failed, get the file again"
    if not any(head):
        return "filled with zeros; the download failed, get the file again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((what for magic, what in WHAT_IT_IS if text.startswith(magic)), None)


def _what_else(head: bytes) -> str:
    what = what_it_is(head)
    if what is not None:
        return what
    if len(head) < 16:
        return f"only {len(head)} bytes; the download failed, get the file again"
    if head[257:262] == b"ustar":
        return "a tar archive (torch 0.1 wrote such); load and save it again with torch"
    if head[0] == 0x80 and head[1] in (2, 3, 4, 5):
        return "a bare pickle, which torch.save does not write; refused, nothing was run"
    if head[8:9] == b"{":
        return f"a header of {int.from_bytes(head[:8], 'little')} bytes, which no .safetensors file has; get it again"
    if head[0] == 8 and head[2] in (0x12, 0x1A):
        return "an ONNX file, not a checkpoint; get the model as .safetensors"
    if all(31 < byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"a text, not a checkpoint, which begins {head[:40].decode().split(chr(10))[0]!r}; get the file again"
    return "not a checkpoint that is known; expected a .ckpt or .safetensors file"
