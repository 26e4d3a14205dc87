"""The cache folder of the hub's own client: models--owner--name with its blobs, refs and snapshots of links.

Given as a whole it stands for the snapshot that its main branch is at.
"""

from __future__ import annotations

import os
from pathlib import Path

from convert.files.source import CheckpointError

PREFIX = "models--"


def snapshot(path: Path) -> Path:
    """The snapshot in a model's cache folder; any other path as it is.

    Raises:
        CheckpointError: the folder has no whole snapshot, or several and nothing says which, or holds other models.
    """
    if not path.is_dir() or (path / "model_index.json").exists():
        return path
    if (path / "snapshots").is_dir():
        return _of_model(path)
    if path.name == "snapshots" and path.parent.name.startswith(PREFIX):
        return _of_model(path.parent)
    if path.name in ("blobs", "refs") and (path.parent / "snapshots").is_dir():
        return _of_model(path.parent)
    root = path / "hub" if (path / "hub").is_dir() else path
    models = sorted(child.name for child in root.iterdir() if child.name.startswith(PREFIX) and child.is_dir())
    if models:
        names = ", ".join(str(root / name) for name in models[:3])
        more = f" and {len(models) - 3} more" if len(models) > 3 else ""
        raise CheckpointError(f"{path}: the hub's cache, with {len(models)} models; give one of them: {names}{more}")
    return path


def _of_model(folder: Path) -> Path:
    there = sorted(child for child in (folder / "snapshots").iterdir() if child.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        commit = main.read_bytes()[:200].decode("utf-8", "replace").strip()
        for child in there:
            if child.name == commit:
                return child
        raise CheckpointError(
            f"{folder}: the snapshot {commit[:60]!a} of its main branch is not there; "
            "the download is not complete, get it again"
        )
    if len(there) == 1:
        return there[0]
    if not there:
        raise CheckpointError(f"{folder}: no snapshot in it; the download is not complete, get it again")
    names = ", ".join(str(child) for child in there[:3])
    raise CheckpointError(f"{folder}: {len(there)} snapshots and no refs/main; give one of them: {names}")


def advice(folder: Path) -> str:
    """What to add to an error about a file that is missing in `folder`; "" unless a download was cut off."""
    inside = [folder, *folder.parents][:4]
    cut = any(parent.parent.name == "snapshots" for parent in inside)
    cut = cut or any(_unfinished(parent / ".cache" / "huggingface" / "download") for parent in inside)
    dangling = any(entry.is_symlink() and not os.path.exists(entry) for entry in _entries(folder))
    return "; the download is not complete, get it again" if cut or dangling else ""


def _unfinished(folder: Path) -> bool:
    return folder.is_dir() and any(folder.rglob("*.incomplete"))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
