"""The options of every command."""

from __future__ import annotations

import argparse
from typing import Any

from sdjax.cli import batch, generate, grid, info, warmup
from sdjax.cli import train as train_command
from sdjax.cli.model import add_conversion, add_folders
from sdjax.request import NOISES, STRENGTHS, TASKS, Request, Setting, settings

KINDS = {"text": str, "int": int, "float": float, "fractions": float}
"""How a setting's value is read from the command line."""


def parser(request: type[Request] = Request) -> argparse.ArgumentParser:
    """The whole command line. request: the class whose settings become options."""
    whole = argparse.ArgumentParser(prog="sdjax", description="Stable Diffusion in JAX.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "txt2img": "make pictures from a prompt",
        "img2img": "make pictures from a prompt and a picture",
        "inpaint": "regenerate the white part of a mask",
    }
    for task in TASKS:
        command = commands.add_parser(task, help=texts[task], description=texts[task] + ".")
        command.set_defaults(run=generate.generate, task=task, request=request)
        _add_settings(command, task, request)
    _add_batch(commands, request)
    _add_grid(commands, request)
    train_command.add_parser(commands)
    _add_warmup(commands)
    _add_info(commands)
    _add_selftest(commands)
    return whole


def _add_settings(command: argparse.ArgumentParser, task: str, request: type[Request]) -> None:
    add = command.add_argument
    known = settings(request)
    add("prompt", nargs="?", help=known["prompt"].help)
    if task != "txt2img":
        add("image", nargs="?", help=f"{known['image'].help}, any size and format")
    if task == "inpaint":
        add("mask", nargs="?", help=f"{known['mask'].help}, black where it is kept")
    add(
        "-o",
        "--output",
        default=".",
        metavar="FILE|DIR",
        help="a .png, .webp or .jpg, or a folder (here)",
    )
    add("--model", metavar="M", help="a checkpoint, .ckpt, .safetensors, diffusers folder, hub id or short name")
    for name, one in known.items():
        if one.metavar is not None and task in one.tasks:
            usual = f"{STRENGTHS[task]:g}" if name == "strength" else one.usual
            _add_setting(command, name, one, f"{one.help} ({usual})" if usual else one.help)
    add(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="pictures to make, with seeds SEED, SEED+1, ..., or variations (1)",
    )
    add("--size", metavar="WxH", help="in pixels, multiples of 8 (the model's own, or the picture's)")
    add("--dtype", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add_folders(command)
    _add_devices(command)
    add_conversion(command)
    add(
        "--recipe",
        metavar="PICTURE",
        help="take everything not given here from this picture's recipe, or a .json of it",
    )


def _add_batch(commands: Any, request: type[Request]) -> None:
    text = "make the pictures of a job file; the same command again resumes it"
    command = commands.add_parser("batch", help=text, description=text + ".")
    add = command.add_argument
    forms = "a .jsonl of requests, a .csv or .tsv of them, a .txt of prompts, or - for JSON lines from standard input"
    add("jobs", help=forms)
    add("-o", "--output", required=True, metavar="DIR", help="folder of the job: pictures and manifest.jsonl")
    add("--model", metavar="M", help="anything that txt2img takes")
    add("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add_folders(command)
    add("--batch", type=int, default=8, metavar="N", help="pictures made at once on each device (8)")
    add("--format", choices=["png", "webp", "jpg"], default="png", help="of the pictures (png)")
    add("--shards", action="store_true", help="WebDataset .tar shards instead of single files")
    add("--skip-bad", action="store_true", help="leave out lines that cannot be made, into rejected.jsonl")
    _add_devices(command)
    add_conversion(command)
    _add_hosts(command)
    add("--dry-run", action="store_true", help="check the job and print the plan alone")
    group = command.add_argument_group("for lines that do not say otherwise")
    defaults = {
        name: known
        for name, known in settings(request).items()
        if known.metavar is not None and "txt2img" in known.tasks
    }
    for name, known in defaults.items():
        _add_setting(group, name, known, None)
    group.add_argument("--size", metavar="WxH")
    group.add_argument("--count", type=int, metavar="N")
    command.set_defaults(run=batch.batch, model="", request=request, line_settings=(*defaults, "size", "count"))


def _add_grid(commands: Any, request: type[Request]) -> None:
    text = "make one prompt's pictures over two or three settings, and a labelled sheet of them"
    command = commands.add_parser("grid", help=text, description=text + "; the same command again resumes it.")
    add, known = command.add_argument, settings(request)
    add("prompt", help=known["prompt"].help)
    add("-o", "--output", required=True, metavar="DIR", help="folder of the grid: pictures, manifest.jsonl, grid.png")
    values = "a setting, size, lora:NAME or prompt:TEXT, and its values: V1,V2 or 1-5 or 1-10(+3) or 0-1[5]"
    add("--x", required=True, metavar="NAME=VALUES", help=f"the columns: {values}")
    add("--y", metavar="NAME=VALUES", help="the rows")
    add("--z", metavar="NAME=VALUES", help="blocks of rows and columns")
    add("--image", metavar="FILE", help=known["image"].help)
    add("--mask", metavar="FILE", help=known["mask"].help)
    add("--model", default="", metavar="M", help="anything that txt2img takes")
    add("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add_folders(command)
    add("--batch", type=int, default=8, metavar="N", help="pictures made at once on each device (8)")
    add("--format", choices=["png", "webp", "jpg"], default="png", help="of the pictures (png)")
    _add_devices(command)
    add_conversion(command)
    add("--dry-run", action="store_true", help="check the grid and print the plan alone")
    group = command.add_argument_group("for all pictures")
    shared = {name: one for name, one in known.items() if one.metavar is not None}
    for name, one in shared.items():
        _add_setting(group, name, one, f"{one.help} ({one.usual})" if one.usual else one.help)
    group.add_argument("--size", metavar="WxH", help="in pixels, multiples of 8 (the model's own, or the picture's)")
    command.set_defaults(run=grid.grid, request=request, line_settings=(*shared, "size"), shards=False, skip_bad=False)


def _add_setting(command: Any, name: str, known: Setting, text: str | None) -> None:
    """The option of a setting. text: its explanation."""
    metavar: Any = known.metavar
    more: dict[str, Any] = {"help": text, "metavar": metavar}
    names = [name]
    if known.kind == "texts":  # --lora, once for each
        names = [*known.aliases, name]
        more |= {"action": "append", "dest": name}
    if known.kind == "fractions":
        more |= {"nargs": 2, "metavar": tuple(metavar.split())}
    if known.kind == "flag":  # --tiling, and --no-tiling against what a recipe says
        command.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)
        return
    if known.kind == "noise":
        more |= {"choices": NOISES, "metavar": None}
    options = [f"--{name.replace('_', '-')}" for name in names]
    command.add_argument(*options, type=KINDS.get(known.kind, str), **more)


def _add_devices(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--devices", type=int, metavar="N", help="GPUs or TPUs to use (all of this machine)")
    add("--parallel", choices=["jit", "pmap"], default="jit", help="how devices share the work (jit)")
    add(
        "--model-parallel",
        "--split-params",
        dest="model_parallel",
        type=int,
        default=1,
        metavar="N",
        help="devices that hold one copy of the parameters (1)",
    )
    add("--exact", action="store_true", help="the same bits in any batch on any number of devices; slower")
    add("--no-compile-cache", action="store_true", help="do not keep compiled programs in SDJAX_CACHE")


def _add_hosts(command: argparse.ArgumentParser) -> None:
    text = "every process runs the same command on the same file and folder, and makes its share"
    add = command.add_argument_group("for one job by several processes, on one machine or many", text).add_argument
    add("--distributed", action="store_true", help="as SLURM, Open MPI, Kubernetes or a TPU pod started them")
    add("--coordinator", metavar="HOST:PORT", help="of process 0, any free port")
    add("--num-processes", type=int, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="I", help="which one this is, from 0")


def _add_warmup(commands: Any) -> None:
    text = "compile what pictures of a size need, ahead of time"
    command = commands.add_parser("warmup", help=text, description=text + ", and print each program's seconds.")
    add = command.add_argument
    add("--model", default="", metavar="M", help="anything that txt2img takes")
    add("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add("--size", metavar="WxH", help="in pixels, multiples of 8 (the model's own)")
    add("--count", type=int, default=1, metavar="N", help="pictures made at once on each device (1)")
    _add_devices(command)
    add_conversion(command)
    command.set_defaults(run=warmup.warmup)


def _add_info(commands: Any) -> None:
    text = "what a picture was made from, or what a model, an adapter, a shard, a job or a training run holds"
    command = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument(
        "path", help="a picture, recipe, shard, adapter or folder, a checkpoint, a hub id or short name"
    )
    add_conversion(command)
    command.set_defaults(run=info.show_info)


def _add_selftest(commands: Any) -> None:
    text = "check the numerics on this device against PyTorch's"
    command = commands.add_parser("selftest", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--model", help="check this model's networks too, against float32 on the CPU")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (with --model)")
    add_conversion(command)
    command.set_defaults(run=info.selftest)
