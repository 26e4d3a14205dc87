"""The walkthrough for learners: its claims hold, its pictures are written, and the notebook is the script's own."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import make_notebook

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "walkthrough.py", EXAMPLES / "walkthrough.ipynb"
SECTIONS = 12
PICTURES = 21


def code_cells(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(what the notebook's cells left, the folder of pictures); every `assert` beside a claim has passed.

    The notebook's first cell is followed by the one that the script has in its place, so that both are run.
    """
    folder = tmp_path_factory.mktemp("walkthrough") / "new" / "folder"
    first, *rest = code_cells(json.loads(NOTEBOOK.read_text("utf-8")))
    space = {"__name__": "__main__", "__doc__": "for --help"}
    exec(compile(first, "first cell", "exec"), space)
    assert space["folder"] is None
    command_line = SCRIPT.read_text("utf-8").split("# %% command line\n")[1].split("# %%")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["walkthrough.py", "--output", str(folder)])
        exec(compile(command_line, "command line", "exec"), space)
    for number, source in enumerate(rest, 2):
        exec(compile(source, f"code cell {number} of {NOTEBOOK.name}", "exec"), space)
    return space, folder


def test_the_committed_notebook_is_what_the_script_makes():
    made = make_notebook.notebook(SCRIPT.read_text("utf-8"))
    assert made == NOTEBOOK.read_text("utf-8"), "run python examples/make_notebook.py examples/walkthrough.py"


def test_every_cell_of_the_notebook_runs_and_every_section_shows_a_picture(run):
    _, folder = run
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == PICTURES
    assert {name[:2] for name in files} == {f"{number:02}" for number in range(SECTIONS)}
    for name in files:
        with Image.open(folder / name) as picture:
            assert len(picture.getcolors(2**24)) > 8, f"{name} is empty"


def test_a_picture_is_what_its_cell_ends_with():
    """A notebook shows nothing else of a cell."""
    cells = [ast.parse(source).body for source in code_cells(json.loads(NOTEBOOK.read_text("utf-8")))]
    shown = [body for body in cells if any(ast.unparse(line).startswith("show(") for line in body)]
    assert len(shown) == PICTURES
    assert all(ast.unparse(body[-1]).startswith("show(") for body in shown)


def test_forward_noising_is_the_same_by_chain_and_by_leap(run):
    """Kolmogorov and Smirnov's distance of two samples, with a bound that independent ones pass but once in 10^5."""
    space, _ = run
    for t in (99, 499, 999):
        chain = np.sort(np.asarray(space["walked"][t])[:, 0])
        leap = np.sort(np.asarray(space["leap"](space["start"], t, seed=77))[:, 0])
        every = np.concatenate([chain, leap])
        apart = np.abs(np.searchsorted(chain, every, "right") - np.searchsorted(leap, every, "right")) / len(chain)
        assert apart.max() < np.sqrt(np.log(2e5) / len(chain))


def test_the_bound_lies_above_what_it_bounds(run):
    space, _ = run
    assert (space["bound"] <= np.log(space["marginal"](space["seen"]))).all()
    assert min(space["losses"]) > space["truth"]


def test_captions_find_their_pictures(run):
    space, _ = run
    cosines = space["cosines"]
    away = cosines[~np.eye(len(cosines), dtype=bool)]
    assert np.diag(cosines).min() > np.quantile(away, 0.95)


def test_attention_is_the_one_that_the_network_computes(run):
    space, _ = run
    assert space["off"].max() < 1e-4
    assert len(space["attention"]) == 14  # self and cross, of seven transformers
    assert {weights.shape[-1] for path, weights in space["attention"].items() if "cross" in path} == {32}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("# %% [markdown]\n# text\nx = 1\n", "every line of a cell of text must begin with '# ', found 'x = 1'"),
        ("# %% [raw]\n# text\n", "found '# %% \\[raw\\]'"),
    ],
)
def test_a_script_that_is_not_in_cells_is_refused(script, message):
    with pytest.raises(ValueError, match=message):
        make_notebook.cells(script)


def test_cells_are_told_apart():
    text, command_line = "# %% [markdown]\n# # Title\n#\n# text\n\n", "# %% command line\nimport sys\n\n"
    script = '"""Left out."""\n\n' + text + command_line + "# %%\nx = 1\n\n\ny = 2\n"
    assert make_notebook.cells(script) == [
        ("markdown", "# Title\n\ntext"),
        ("code", make_notebook.IN_NOTEBOOKS),
        ("code", "x = 1\n\n\ny = 2"),
    ]
