"""Makes a notebook from a script that is divided into cells.

    python examples/make_notebook.py examples/walkthrough.py

writes examples/walkthrough.ipynb beside it, without outputs, always the same bytes for the same script. Cells begin
with `# %%` (code), `# %% [markdown]` (text, each line a comment) or `# %% command line` (for the script alone: in the
notebook it is replaced by `folder = None`). What comes before the first cell is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

MARKER = re.compile(r"^# %%(.*)\n", re.MULTILINE)
IN_NOTEBOOKS = "folder = None  # nothing is written; every picture shows below its cell"


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a script as ("markdown" or "code", their source).

    Raises:
        ValueError: a cell of an unknown kind, or a line of text that is no comment.
    """
    _, *parts = MARKER.split(script)
    found = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip("\n")
        if kind == " [markdown]":
            lines = body.split("\n")
            if wrong := [line for line in lines if line != "#" and not line.startswith("# ")]:
                raise ValueError(f"every line of a cell of text must begin with '# ', found {wrong[0]!r}")
            found.append(("markdown", "\n".join(line[2:] for line in lines)))
        elif kind in ("", " command line"):
            found.append(("code", IN_NOTEBOOKS if kind else body))
        else:
            raise ValueError(f"a cell begins with '# %%', '# %% [markdown]' or '# %% command line', found '# %%{kind}'")
    return found


def notebook(script: str) -> str:
    """The notebook of a script as the text of an .ipynb file (nbformat 4.5)."""
    made: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells(script)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    whole = {
        "cells": made,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="a .py file in cells")
    path = parser.parse_args().script
    target = path.with_suffix(".ipynb")
    target.write_text(notebook(path.read_text("utf-8")), "utf-8")
    print(target)


if __name__ == "__main__":
    main()
