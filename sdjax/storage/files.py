"""Files and folders that appear whole, and that a power cut cannot take back.

What is written goes to a temporary name next to the final one, is flushed to the disk, and is renamed; then the folder
that holds the name is flushed. Whoever sees the final name after a crash of the program or of the machine sees all of
the content.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdjax.hints import hint

NAME_MAX = 255
"""Most bytes of a file's name."""


@contextmanager
def new_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder next to `path` that becomes `path` if the block ends well, and is removed if not.

    Raises:
        FileExistsError: `path` is there and `force` is not given. FileNotFoundError: its parent is not there.
    """
    refuse_existing(path, force)
    temporary = Path(tempfile.mkdtemp(prefix=partial_name(path.name), suffix=".partial", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        flush_tree(temporary)
        if path.is_dir() and not path.is_symlink():
            old = Path(tempfile.mkdtemp(prefix=partial_name(path.name), suffix=".old", dir=path.parent))
            path.rename(old / path.name)
            try:
                temporary.rename(path)
            except BaseException:
                (old / path.name).rename(path)
                old.rmdir()
                raise
            flush(path.parent)
            shutil.rmtree(old)
        else:
            path.unlink(missing_ok=True)
            temporary.rename(path)
            flush(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path, force: bool = False) -> Iterator[Path]:
    """The same for a file: the block writes to a temporary name next to `path`. Raises as `new_folder`."""
    refuse_existing(path, force)
    handle, name = tempfile.mkstemp(prefix=partial_name(path.name), suffix=".partial", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def move(path: Path, to: Path) -> None:
    """Gives a file that is whole its final name, in the same folder, so that a power cut leaves it whole."""
    flush(path)
    path.replace(to)
    flush(to.parent)


def refuse_long_names(names: Iterable[str], longest: int = NAME_MAX) -> None:
    """Raises ValueError if a name has more bytes than a file system takes."""
    for name in names:
        if (length := len(os.fsencode(name))) > longest:
            raise ValueError(f"{name[:60]}...: a name of {length} bytes; file systems take {longest}, shorten it")


def refuse_unwritable(folder: Path) -> None:
    """Raises OSError, naming the folder, if no file can be made in it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"{folder}: cannot be written into ({error.strerror}); choose another folder") from None


def partial_name(name: str) -> str:
    """The beginning of a temporary name for what will have this name; not longer than a file system allows."""
    return f".{os.fsencode(name)[:60].decode('utf-8', 'ignore')}."


def refuse_existing(path: Path, force: bool) -> None:
    """Raises FileExistsError or FileNotFoundError if `path` must not or cannot be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into; make it first")
    if path.exists() and not force:
        raise FileExistsError(
            f"{path} is already there; choose another name, or pass force ({hint('force')}) to replace it"
        )


def flush(path: Path) -> None:
    """Waits until what a file holds, or the names in a folder, are on the disk.

    Some file systems cannot flush a folder; there the names are as safe as they can be.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """`flush` of every file and folder inside, then of the folder itself."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(parent, name)):
                flush(Path(parent, name))
        flush(Path(parent))


def json_line(entry: dict[str, Any]) -> bytes:
    """A line of a .jsonl file, in UTF-8; with escapes alone if something in it is no text, as a file's name may be."""
    try:
        return (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(entry) + "\n").encode()


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object for `json.loads(..., object_pairs_hook=each_once)`. Raises ValueError if a name is there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return fields


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def open_streams() -> None:
    """Opens those of input, output and errors that the process was started without (`>&-`), to and from nowhere.

    Else the next file that is opened, such as a picture, would get their number, and what others print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
