"""The layering: imports point downwards only, and PyTorch stays outside."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module imports from lower rows, and from its own without going in circles
    {"types", "config", "hints", "target", "hosts", "assets", "assets.make_clip_merges"},
    {"storage", "storage.files", "storage.cache"},
    {"models", "models.layers", "models.clip", "models.unet", "models.vae", "models.params"}
    | {"diffusion", "diffusion.schedule", "tokenizer", "image"},
    {"diffusion.denoiser", "diffusion.samplers", "diffusion.sample"} | {"diffusion.torch_noise"},
    {"sharding", "functions", "pipeline", "request", "checkpoint", "recipe"},
    {f"train.{name}" for name in ("losses", "step", "dataset", "data", "plots", "settings", "tasks", "loop")}
    | {"train"}
    | {"jobs", "jobs.forms", "job_file", "outputs", "batch"},
    {"load", "selftest", "compilation", "train.command", "cli", "cli.__main__"}
    | {f"cli.{name}" for name in ("run", "options", "terminal", "model", "generate", "batch", "info", "warmup")},
]
ROW = {f"sdjax.{name}": row for row, names in enumerate(LAYERS) for name in names}
CONVERT_MAY_USE = ("sdjax.config", "sdjax.types", "sdjax.models.params", "sdjax.checkpoint", "sdjax.tokenizer") + (
    *("sdjax.hints", "sdjax.storage.files", "sdjax.cli"),
)
ORACLES = ("torch", "transformers", "diffusers")


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
    return {name for name, _ in imports(module) if name.split(".")[0] in ("sdjax", "convert")}


LIBRARY = [name for name in SOURCES if name.startswith("sdjax.")]


def test_every_module_has_its_row():
    assert set(LIBRARY) == set(ROW)


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_point_downwards(module):
    for name in ours(module) - {"sdjax"}:
        if not name.startswith("convert"):
            assert ROW[name] <= ROW[module], f"{module} imports {name}"


@pytest.mark.parametrize("package", ["sdjax.", "convert."])
def test_imports_do_not_go_in_circles(package):
    inside = {name for name in SOURCES if name.startswith(package)}
    graph = {module: {name for name, top in imports(module) if top} & inside for module in inside}
    graphlib.TopologicalSorter(graph).prepare()


def test_networks_and_diffusion_do_not_know_each_other():
    for module in LIBRARY:
        if module.startswith("sdjax.models"):
            assert not [name for name in ours(module) if name.startswith("sdjax.diffusion")], module
        if module.startswith("sdjax.diffusion"):
            assert not [name for name in ours(module) if name.startswith("sdjax.models")], module


def test_only_loading_and_the_command_line_know_the_converter():
    users = {module for module in LIBRARY for name in ours(module) if name.split(".")[0] == "convert"}
    assert users <= {"sdjax.load"}
    assert "sdjax.load" in users


def test_the_converter_knows_configurations_shapes_and_checkpoints_alone():
    for module in SOURCES:
        if module.startswith("convert"):
            assert {name for name in ours(module) if name.startswith("sdjax")} <= set(CONVERT_MAY_USE), module


def test_the_package_itself_is_imported_for_its_version_alone():
    for module in LIBRARY:
        if "sdjax" in ours(module):
            names = [
                node for node in ast.walk(ast.parse(SOURCES[module].read_text())) if isinstance(node, ast.Attribute)
            ]
            used = {node.attr for node in names if isinstance(node.value, ast.Name) and node.value.id == "sdjax"}
            assert used == {"__version__"}, module


def test_pytorch_is_imported_by_the_legacy_reader_alone_and_only_when_it_runs():
    found = {
        (module, name, top) for module in SOURCES for name, top in imports(module) if name.split(".")[0] in ORACLES
    }
    assert found == {("convert.legacy_file", "torch", False)}


def test_importing_the_package_brings_in_no_pytorch():
    program = "import sys, sdjax.cli.run, sdjax.load, sdjax.selftest, convert.__main__; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "sdjax.pipeline" in run.stdout.split()
    assert not {name.split(".")[0] for name in run.stdout.split()} & set(ORACLES)
