"""The options of every command."""

from __future__ import annotations

import argparse
from typing import Any

from sdjax.cli import batch, generate, info, warmup
from sdjax.cli import train as train_command
from sdjax.cli.model import add_conversion
from sdjax.cli.terminal import console
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS
from sdjax.request import NOISES, STRENGTHS

TASKS = ("txt2img", "img2img", "inpaint")


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="sdjax", description="Stable Diffusion in JAX.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "txt2img": "make pictures from a prompt",
        "img2img": "make pictures from a prompt and a picture",
        "inpaint": "make the white part of a mask anew",
    }
    for task in TASKS:
        command = commands.add_parser(task, help=texts[task], description=texts[task] + ".")
        command.set_defaults(run=generate.generate, task=task)
        _add_settings(command, task)
    _add_batch(commands)
    train_command.add_parser(commands, console)
    _add_warmup(commands)
    _add_info(commands)
    _add_selftest(commands)
    return whole


def _add_settings(command: argparse.ArgumentParser, task: str) -> None:
    add = command.add_argument
    add("prompt", nargs="?", help="what to paint")
    if task != "txt2img":
        add("image", nargs="?", help="the picture to start from, any size and format")
    if task == "inpaint":
        add("mask", nargs="?", help="white where the picture is to be made anew, black where it is to stay")
    add(
        "-o",
        "--output",
        default=".",
        metavar="FILE|DIR",
        help="a .png, .webp or .jpg, or a folder (here)",
    )
    add("--negative-prompt", metavar="TEXT", help="what not to paint")
    add("--model", metavar="M", help="a checkpoint, .ckpt, .safetensors, diffusers folder, hub id or short name")
    add("--steps", type=int, metavar="N", help="sampling steps (25, or as the model says)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance, 1 for none (7.5, or as the model says)")
    add("--guidance-rescale", type=float, metavar="R", help="against overexposure, 0 to 1 (0)")
    ends = ("START", "STOP")
    add("--guidance-interval", type=float, nargs=2, metavar=ends, help="fractions of the steps; 1 outside (0 1)")
    add("--sampler", metavar="S", help=f"{', '.join(SAMPLERS)} (dpmpp_2m, or as the model says)")
    add("--spacing", metavar="K", help=f"{', '.join(SPACINGS)} (karras, or as the model says)")
    add("--eta", type=float, metavar="E", help="noise of the sampler ddim, 0 to 1 (0)")
    add("--clip-skip", type=int, metavar="N", help="layers of the text encoder to leave out (as trained)")
    add("--seed", type=int, metavar="N", help="the first picture's seed (0)")
    add("--count", type=int, default=1, metavar="N", help="pictures to make, with seeds SEED, SEED+1, ... (1)")
    add("--size", metavar="WxH", help="in pixels, multiples of 8 (the model's own, or the picture's)")
    add("--dtype", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add("--noise", choices=NOISES, help="where seeds' noise comes from; torch: as diffusers on a CPU (jax)")
    if task != "txt2img":
        add("--strength", type=float, metavar="X", help=f"how much to change, 0 to 1 ({STRENGTHS[task]})")
    _add_devices(command)
    add_conversion(command)
    add(
        "--recipe",
        metavar="PICTURE",
        help="take everything not given here from this picture's recipe, or a .json of it",
    )


def _add_batch(commands: Any) -> None:
    text = "make the pictures of a job file; the same command again goes on"
    command = commands.add_parser("batch", help=text, description=text + ".")
    add = command.add_argument
    forms = "a .jsonl of requests, a .csv or .tsv of them, a .txt of prompts, or - for JSON lines from standard input"
    add("jobs", help=forms)
    add("-o", "--output", required=True, metavar="DIR", help="folder of the job: pictures and manifest.jsonl")
    add("--model", metavar="M", help="anything that txt2img takes")
    add("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add("--batch", type=int, default=8, metavar="N", help="pictures made at once on each device (8)")
    add("--format", choices=["png", "webp", "jpg"], default="png", help="of the pictures (png)")
    add("--shards", action="store_true", help="WebDataset .tar shards instead of single files")
    add("--skip-bad", action="store_true", help="leave out lines that cannot be made, into rejected.jsonl")
    _add_devices(command)
    add_conversion(command)
    _add_hosts(command)
    add("--dry-run", action="store_true", help="check the job and print the plan alone")
    group = command.add_argument_group("for lines that do not say otherwise")
    for name, kind in (("negative-prompt", str), ("sampler", str), ("spacing", str), ("size", str), ("noise", str)):
        group.add_argument(f"--{name}", type=kind, metavar="X")
    for name in ("steps", "seed", "count", "clip-skip"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("guidance", "guidance-rescale", "eta"):
        group.add_argument(f"--{name}", type=float, metavar="X")
    command.set_defaults(run=batch.batch, model="")


def _add_devices(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--devices", type=int, metavar="N", help="GPUs or TPUs to use (all of this machine)")
    add("--parallel", choices=["jit", "pmap"], default="jit", help="how devices share the work (jit)")
    add("--split-params", type=int, default=1, metavar="N", help="devices that hold one copy of the parameters (1)")
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
    text = "what a picture was made from, or what a model, a shard, a job or a training run holds"
    command = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("path", help="a picture, recipe, shard or folder, a checkpoint, a hub id or short name")
    add_conversion(command)
    command.set_defaults(run=info.show_info)


def _add_selftest(commands: Any) -> None:
    text = "check the numerics on this device against PyTorch's"
    command = commands.add_parser("selftest", help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--model", help="check this model's networks too, against float32 on the CPU")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (with --model)")
    add_conversion(command)
    command.set_defaults(run=info.selftest)
