"""What is kept between processes: where, and how files are known by their content.

CACHE/converted/   foreign models as our checkpoints, named after a hash of the content (`sdjax.load.converted`)
CACHE/programs/    compiled programs, by all that they depend on (`sdjax.devices.compilation`)
CACHE/digests.json sha256 of large files, by what the file system says of them (`digest_of`)
CACHE/pictures/    which pictures of a data set cannot be decoded, by the same (`remembered`)
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdjax.storage.files import new_file

LARGE = 2**20
"""Bytes from which a file's sha256 is remembered; smaller files are read each time."""

UNSETTLED = 2 * 10**9
"""Nanoseconds for which a changed file may change again without its times telling."""


def cache_folder() -> Path:
    """Where converted models and compiled programs are kept: SDJAX_CACHE, or ~/.cache/sdjax.

    A user without a home directory, as in some containers, has a folder of temporary files instead.

    Raises:
        PermissionError: that folder of temporary files belongs to another user.
    """
    given = os.environ.get("SDJAX_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "sdjax"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        folder = Path(tempfile.gettempdir()) / f"sdjax-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: belongs to another user; set SDJAX_CACHE to a folder of your own")
    return folder


def programs_folder() -> Path:
    """Where the command line keeps compiled programs."""
    return cache_folder() / "programs"


def digest_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    That of a large file is remembered with its place, size, inode and times of change. A file system changes these with
    the content, and what changed within the last two seconds is not trusted: so a remembered digest is that of what is
    there now.

    Raises:
        OSError: the file cannot be read. ValueError: it changed while it was read.
    """
    before = signature(path)
    known = _read_index() if before[0] >= LARGE else {}
    place = str(path.resolve())
    if known.get(place, [None])[:-1] == before:
        return str(known[place][-1])
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if signature(path) != before:
        raise ValueError(f"{path}: changed while it was read; wait until it is written, then start again")
    if before[0] >= LARGE and time.time_ns() - max(before[2:]) > UNSETTLED:
        _remember(place, [*before, digest])
    return digest


def digest_of_all(paths: list[Path]) -> str:
    """One sha256 over several files, or the files below folders: their names inside the folder, and their content."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            digest.update(json.dumps([file.relative_to(path).as_posix(), digest_of(file)]).encode())
    return digest.hexdigest()


def remembered(
    kind: str,
    key: str,
    files: Iterable[Path],
    make: Callable[[], Any],
    worth_keeping: Callable[[], bool] = lambda: True,
) -> Any:
    """What `make` gives, as JSON has it, kept in CACHE/kind as long as `key` and the files are the same.

    Files are compared as in `digest_of`. Where nothing can be kept, it is made each time. worth_keeping: asked after
    `make`.

    Raises:
        OSError: a file is not there.
    """
    digest, last = hashlib.sha256(key.encode()), 0
    for path in files:
        found = signature(path)
        digest.update(repr([str(path.absolute()), found]).encode("utf-8", "surrogateescape"))
        last = max(last, *found[2:])
    kept = cache_folder() / kind / f"{digest.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_text("utf-8"))
    made = make()
    if time.time_ns() - last > UNSETTLED and worth_keeping():
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with new_file(kept, force=True) as temporary:
                temporary.write_text(json.dumps(made), "utf-8")
    return made


def signature(path: Path) -> list[int]:
    """What a file system says of a file's content: its size, inode and times of change."""
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _index() -> Path:
    return cache_folder() / "digests.json"


def _read_index() -> dict[str, Any]:
    try:
        found = json.loads(_index().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    lists = isinstance(found, dict) and all(isinstance(entry, list) and entry for entry in found.values())
    return found if lists else {}


def _remember(place: str, entry: list[Any]) -> None:
    kept = {path: known for path, known in _read_index().items() if Path(path).exists()}
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with new_file(_index(), force=True) as temporary:
            temporary.write_text(json.dumps(kept | {place: entry}), "utf-8")
    except OSError as error:
        warnings.warn(f"{_index()}: cannot be written ({error}); models are read whole at every start", stacklevel=2)
