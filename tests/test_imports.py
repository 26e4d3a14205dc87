"""The layering: imports point downwards only, and PyTorch stays outside."""

import ast
import graphlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sdjax
from sdjax.config import BOX
from sdjax.pipeline.recipe import recipe_of, save_picture
from sdjax.request import Request

ROOT = Path(__file__).parent.parent
ROWS = [  # a folder, or a file at the top, imports from rows above its own in this list, and from itself
    {"sdjax.types", "sdjax.config", "sdjax.hints", "sdjax.assets"},
    {"sdjax.devices"},
    {"sdjax.models", "sdjax.text", "sdjax.diffusion", "sdjax.image"},
    {"sdjax.storage"},
    {"sdjax.request"},
    {"convert.files"},
    {"convert"},
    {"sdjax.pipeline"},
    {"sdjax.train", "sdjax.jobs", "sdjax.selftest"},
    {"sdjax.load"},
    {"sdjax.cli"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
CONVERT_MAY_USE = {"sdjax.config", "sdjax.types", "sdjax.models", "sdjax.storage", "sdjax.text", "sdjax.hints"}
CONVERT_USERS = {"sdjax.pipeline", "sdjax.load", "sdjax.cli"}
ORACLES = ("torch", "transformers", "diffusers")
LARGE = {"jax", "jaxlib", "numpy", "flax", "PIL", "scipy", "rich", "tokenizers", "ftfy", "safetensors"}
UNUSED = {"optax", "orbax", "tensorstore", "scipy", "torch", "transformers", "huggingface_hub"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {name_of(path): path for folder in ("sdjax", "convert") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(module: str):
    """(name, whether at the top level of the file) of everything that a module imports, down to the module."""
    tree = ast.parse(SOURCES[module].read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else node.module, top


def ours(module: str) -> set[str]:
    """The modules of this project that a module imports, inside functions too."""
    return {name for name, _ in imports(module) if name.split(".")[0] in ("sdjax", "convert")}


def place(module: str) -> str:
    """The folder, or the file at the top, that a module belongs to: "sdjax.models", "convert"."""
    parts = module.split(".")
    return next(".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in ROW)


LIBRARY = [name for name in SOURCES if name.startswith("sdjax.")]


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"sdjax"}))
def test_imports_point_downwards(module):
    for name in ours(module):
        same = place(name) == place(module)
        assert same or ROW[place(name)] < ROW[place(module)], f"{module} imports {name}"


def test_imports_do_not_go_in_circles():
    graph = {module: ours(module) & set(SOURCES) for module in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()


def test_nobody_imports_the_package_itself():
    assert not [module for module in SOURCES if "sdjax" in ours(module)]


def test_networks_and_diffusion_do_not_know_each_other():
    for module in LIBRARY:
        if module.startswith("sdjax.models"):
            assert not [name for name in ours(module) if name.startswith("sdjax.diffusion")], module
        if module.startswith("sdjax.diffusion"):
            assert not [name for name in ours(module) if name.startswith("sdjax.models")], module


def test_only_what_opens_files_knows_the_converter_and_only_when_it_is_called():
    found = {
        (place(module), top) for module in LIBRARY for name, top in imports(module) if name.split(".")[0] == "convert"
    }
    assert {name for name, _ in found} <= CONVERT_USERS
    assert not any(top for _, top in found)
    assert ("sdjax.load", False) in found


def test_the_converter_knows_configurations_shapes_and_checkpoints_alone():
    for module in SOURCES:
        if module.startswith("convert"):
            used = {place(name) for name in ours(module) if name.startswith("sdjax")}
            assert used <= CONVERT_MAY_USE, module


def test_pytorch_is_imported_by_the_legacy_reader_alone_and_only_when_it_runs():
    found = {
        (module, name, top) for module in SOURCES for name, top in imports(module) if name.split(".")[0] in ORACLES
    }
    assert found == {("convert.files.torch_legacy", "torch", False)}


def test_importing_the_package_brings_in_no_pytorch():
    program = "import sys, sdjax.cli.run, sdjax.load, sdjax.selftest, convert.__main__; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "sdjax.pipeline.pipeline" in run.stdout.split()
    assert not {name.split(".")[0] for name in run.stdout.split()} & set(ORACLES)


def imported_by(*words: str, status: int, folder: Path) -> set[str]:
    """The packages that a process of the command line has imported when it ends with this exit status."""
    program = (
        "import atexit, sys; from sdjax.cli import script; "
        "atexit.register(lambda: print('imported', *{name.split('.')[0] for name in sys.modules})); "
        "sys.exit(script())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SDJAX_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", program, *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == status, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("words", [["--help"], ["txt2img", "--help"], ["train", "unet", "--help"]], ids=" ".join)
def test_help_imports_nothing_large(words, tmp_path):
    assert not imported_by(*words, status=0, folder=tmp_path) & LARGE


@pytest.mark.parametrize(
    "words",
    [["txt2img", "red heart", "--nonsense"], ["txt2img", "red heart", "--steps", "many"], ["batch", "jobs.csv"]],
    ids=" ".join,
)
def test_wrong_options_are_refused_before_anything_large_is_imported(words, tmp_path):
    assert not imported_by(*words, status=2, folder=tmp_path) & LARGE


@pytest.mark.parametrize(
    "words",
    [
        ["txt2img"],
        ["txt2img", "red heart", "--steps", "0"],
        ["txt2img", "red heart", "--sampler", "euler", "--eta", "1"],
        ["img2img", "red heart", "missing.png"],
        ["batch", "missing.csv", "-o", "out"],
        ["grid", "red heart", "-o", "out", "--x", "seed=1", "--z", "steps=2"],
        ["train", "unet", "--data", "d", "--out", "out", "--preset", "tiny", "--steps", "0"],
    ],
    ids=" ".join,
)
def test_what_was_asked_for_is_checked_before_jax_is_imported(words, tmp_path):
    assert not imported_by(*words, status=2, folder=tmp_path) & {"jax", "flax", "tokenizers"}


def test_the_recipe_of_a_picture_is_read_without_numpy_and_jax(tmp_path):
    path = tmp_path / "picture.png"
    picture = Image.new("RGB", (8, 8))
    save_picture(path, picture, recipe_of(Request("red heart"), BOX.sampling, picture, model="", dtype="float32"))
    assert not imported_by("info", str(path), status=0, folder=tmp_path) & {"jax", "flax", "numpy", "rich"}


def test_the_model_in_the_box_is_loaded_without_what_trainings_and_other_formats_need(tmp_path):
    (tmp_path / "jobs.txt").write_text("red heart\n")
    found = imported_by("batch", "jobs.txt", "-o", "out", "--dry-run", status=0, folder=tmp_path)
    assert {"jax", "flax", "safetensors"} <= found
    assert not found & UNUSED


def test_modules_under_their_earlier_names_still_give_what_was_in_them():
    for earlier, homes in sdjax.MOVED.items():
        sys.modules.pop(earlier, None)
        with pytest.warns(DeprecationWarning, match=f"{earlier} has moved to sdjax.{homes[0]}"):
            module = importlib.import_module(earlier)
        for home in homes:
            inside = importlib.import_module(f"sdjax.{home}")
            for name in vars(inside):
                assert hasattr(module, name)
        with pytest.raises(AttributeError, match=f"has moved to sdjax.{homes[0]}"):
            module.nothing  # noqa: B018
        assert sys.modules[f"sdjax.{homes[0]}"].__spec__.name == f"sdjax.{homes[0]}"


def test_public_names_are_found_where_people_look_for_them():
    from sdjax.pipeline import Pipeline
    from sdjax.train.tasks import Task, clip_task, unet_task, vae_task

    assert sdjax.Pipeline is Pipeline
    assert callable(sdjax.load)
    assert all(map(callable, (Task, clip_task, unet_task, vae_task)))
    for name in sdjax.__all__:
        assert getattr(sdjax, name) is not None
