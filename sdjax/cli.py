"""The command line: `sdjax txt2img | img2img | inpaint | batch | train | warmup | info | selftest`.

Options left out take the values of the recipe given by --recipe, else the defaults of `Pipeline`. Whatever goes wrong
with what the user gave is one line on the error stream and exit status 2; pictures made before that are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdjax.config import ModelConfig
from sdjax.diffusion.samplers import SAMPLERS
from sdjax.diffusion.schedule import SPACINGS
from sdjax.request import BATCH, NOISES, STRENGTHS, Request, check_settings, parse_size
from sdjax.train import command as train_command
from sdjax.types import Params

TASKS = ("txt2img", "img2img", "inpaint")
DEFAULTS: dict[str, Any] = {
    "prompt": None,
    "negative_prompt": "",
    "model": "",
    "seed": 0,
    "steps": None,
    "guidance": None,
    "guidance_rescale": 0.0,
    "guidance_interval": (0.0, 1.0),
    "sampler": None,
    "spacing": None,
    "eta": None,
    "clip_skip": None,
    "size": None,
    "dtype": "float32",
    "strength": None,
    "noise": "jax",
    "image": None,
    "mask": None,
}
console = Console(stderr=True, soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _note
        try:
            if not getattr(options, "no_compile_cache", True):
                _keep_programs()
            return options.run(options)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            line = " ".join(str(error).split())
            console.print(f"sdjax: error: {line}", markup=False)
            return 2
        except KeyboardInterrupt:
            console.print("sdjax: interrupted; what was made so far is kept", markup=False)
            return 130


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    from sdjax.compilation import drop_damaged

    console.print(f"sdjax: note: {drop_damaged(str(message))}", markup=False)


def _keep_programs() -> None:
    from sdjax.compilation import keep_programs
    from sdjax.load import programs_folder

    keep_programs(programs_folder())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdjax", description="Stable Diffusion in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    texts = {
        "txt2img": "make pictures from a prompt",
        "img2img": "make pictures from a prompt and a picture",
        "inpaint": "make the white part of a mask anew",
    }
    for task in TASKS:
        command = commands.add_parser(task, help=texts[task], description=texts[task] + ".")
        command.set_defaults(run=generate, task=task)
        _add_settings(command, task)
    _add_batch(commands)
    train_command.add_parser(commands, console)
    _add_warmup(commands)
    info = commands.add_parser("info", help="what a picture was made from, or what a model holds")
    info.add_argument("path", help="a picture, a checkpoint, a folder, a hub id or short name")
    info.set_defaults(run=show_info)
    test = commands.add_parser("selftest", help="check the numerics on this device against PyTorch's")
    test.add_argument("--model", help="check this model's networks too, against float32 on the CPU")
    test.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (with --model)")
    test.set_defaults(run=selftest)
    return parser


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
    add("--recipe", metavar="PICTURE", help="take everything not given here from this picture's recipe")


def _add_batch(commands: Any) -> None:
    text = "make the pictures of a job file; the same command again goes on"
    command = commands.add_parser("batch", help=text, description=text + ".")
    add = command.add_argument
    add("jobs", help="a .jsonl of requests, a .csv of them, a .txt of prompts, or - for JSON lines from standard input")
    add("-o", "--output", required=True, metavar="DIR", help="folder of the job: pictures and manifest.jsonl")
    add("--model", metavar="M", help="anything that txt2img takes")
    add("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16 (float32)")
    add("--batch", type=int, default=8, metavar="N", help="pictures made at once on each device (8)")
    add("--format", choices=["png", "webp", "jpg"], default="png", help="of the pictures (png)")
    add("--shards", action="store_true", help="WebDataset .tar shards instead of single files")
    add("--skip-bad", action="store_true", help="leave out lines that are no requests, into rejected.jsonl")
    _add_devices(command)
    _add_hosts(command)
    add("--dry-run", action="store_true", help="check the job and print the plan alone")
    group = command.add_argument_group("for lines that do not say otherwise")
    for name, kind in (("negative-prompt", str), ("sampler", str), ("spacing", str), ("size", str), ("noise", str)):
        group.add_argument(f"--{name}", type=kind, metavar="X")
    for name in ("steps", "seed", "count", "clip-skip"):
        group.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("guidance", "guidance-rescale", "eta"):
        group.add_argument(f"--{name}", type=float, metavar="X")
    command.set_defaults(run=batch, model="")


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
    command.set_defaults(run=warmup)


def warmup(options: argparse.Namespace) -> int:
    """Compiles every program for one size and number of pictures."""
    from sdjax.compilation import warm_up
    from sdjax.load import programs_folder

    size = None if options.size is None else parse_size(options.size)
    with _progress(options.model) as (on_convert, _):
        pipe = _load(options, on_convert, placement=_placement(options))
    width, height = size or (pipe.config.image_size, pipe.config.image_size)
    seconds = warm_up(pipe, width, height, options.count)
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value >= 0.1:
            print(f"{value:7.1f} s  {name}")
    print(f"{sum(seconds.values()):7.1f} s  {len(seconds)} programs; kept in {programs_folder()}")
    return 0


LINE_DEFAULTS = (
    *("negative_prompt", "sampler", "spacing", "size", "noise", "steps", "seed", "count", "clip_skip"),
    *("guidance", "guidance_rescale", "eta"),
)


def batch(options: argparse.Namespace) -> int:
    """A job file in, pictures out; exit status 1 if some could not be made."""
    from sdjax import batch as jobs
    from sdjax.hosts import ALONE, join

    check_settings(batch=options.batch)
    defaults = {name: getattr(options, name) for name in LINE_DEFAULTS if getattr(options, name) is not None}
    out, kind = Path(options.output), ".jsonl" if options.jobs == "-" else Path(options.jobs).suffix.lower()
    if kind not in (".jsonl", ".csv", ".txt"):
        raise ValueError(f"{options.jobs}: expected a job file that ends in .jsonl, .csv or .txt, or -")
    if options.jobs != "-" and not Path(options.jobs).is_file():
        raise FileNotFoundError(f"{options.jobs}: no such job file")
    settings = {"model": options.model, "dtype": options.dtype, "format": options.format, "shards": options.shards}
    named = (options.coordinator, options.num_processes, options.process_id)
    share = join(*named) if options.distributed or named != (None,) * 3 else ALONE
    if options.jobs == "-" and share.processes > 1:
        raise ValueError("several processes need a job file; standard input is read by one alone")
    with jobs.at_work(out, share):
        with (
            nullcontext(sys.stdin) if options.jobs == "-" else open(options.jobs, encoding="utf-8", newline="") as file
        ):
            rejected = jobs.prepare(file, kind, out, settings, defaults, skip_bad=options.skip_bad, share=share)
        for line in rejected:
            console.print(f"sdjax: note: line {line.number} left out: {line.reason}", markup=False)
        with _progress(options.model) as (on_convert, _):
            placement = _placement(options)
            like = None if options.dry_run else jobs.first_request(out)
            pipe = _load(options, on_convert, placement=placement, like=like, batch=options.batch, loop=True)
        if options.dry_run:
            print(jobs.described(pipe, out, options.batch, share), end="")
            return 0
        columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
            bar, clock, first = bars.add_task("", rate="", total=None), time.monotonic(), None

            def progress(done: int, total: int) -> None:
                nonlocal first
                first = done - 1 if first is None else first
                rate = (done - first) / max(1e-3, time.monotonic() - clock)
                bars.update(bar, completed=done, total=total, rate=f"{rate:.2f} a second")

            def report(name: str, reason: str) -> None:
                console.print(f"sdjax: error: {name}: {reason}", markup=False)

            keys = dict(model=options.model, dtype=options.dtype, batch=options.batch)
            suffix = f".{options.format}"
            keys |= dict(suffix=suffix, shards=options.shards, share=share)
            done = jobs.run(pipe, out, **keys, report=report, progress=progress)
    print(f"{done.made} pictures made, {done.before} were there before, {done.failed} failed")
    if done.failed:
        console.print(f"sdjax: note: the same command tries them again; {share.failures(out)} says why", markup=False)
    return 1 if done.failed else 0


def generate(options: argparse.Namespace) -> int:
    """txt2img, img2img and inpaint."""
    from sdjax.recipe import FORMATS, file_hash, recipe_of, save_picture

    settings = _settings(options)
    given = settings.pop("size")
    size = None if given is None else parse_size(given)
    output, count = Path(options.output), options.count
    if count < 1:
        raise ValueError(f"--count must be 1 or more, found {count}")
    if output.suffix and output.suffix.lower() not in FORMATS:
        raise ValueError(f"{output}: expected a name that ends in {', '.join(FORMATS)}, or a folder")
    parent = output.parent if output.suffix else output
    if output.suffix and not parent.is_dir():
        raise FileNotFoundError(f"{parent}: no such folder to write {output.name} into; make it first")
    inputs = {name: settings.pop(name) for name in ("image", "mask")}
    task, prompt, model, dtype = options.task, settings.pop("prompt"), settings.pop("model"), settings.pop("dtype")
    if prompt is None:
        raise ValueError(f"a prompt is missing: sdjax {task} PROMPT ..., or --recipe PICTURE")
    hashes: dict[str, Any] = {"image": None, "mask": None}
    for name in {"txt2img": (), "img2img": ("image",), "inpaint": ("image", "mask")}[task]:
        hashes[name] = _checked_file(name, inputs[name], file_hash)

    check_settings(**{name: value for name, value in settings.items() if value is not None}, count=count)
    shape: dict[str, Any] = {} if size is None else {"width": size[0], "height": size[1]}
    image, mask = (None if hashes[name] is None else hashes[name][0] for name in ("image", "mask"))
    if task == "txt2img":
        settings.pop("strength")
    with _progress(model) as (on_convert, on_step):
        placement = _placement(options, count)
        like = Request(prompt, **settings, **shape, image=image, mask=mask)
        named = dict(model=model, dtype=dtype, placement=placement)
        pipe = _load(options, on_convert, like=like, batch=min(BATCH, -(-count // placement.shares)), **named)
        if not output.suffix:
            output.mkdir(parents=True, exist_ok=True)
        call = {
            "txt2img": lambda **k: pipe.text_to_image(prompt, **k),
            "img2img": lambda **k: pipe.image_to_image(prompt, image, **k),
            "inpaint": lambda **k: pipe.inpaint(prompt, image, mask, **k),
        }[task]
        first = settings.pop("seed")
        at_once = BATCH * placement.shares
        for start in range(0, count, at_once):
            part = min(at_once, count - start)
            step = on_step(f"{start + 1}-{start + part} of {count}" if count > 1 else "sampling")
            pictures = call(**settings, **shape, seed=first + start, count=part, progress=step)
            for seed, picture in enumerate(pictures, first + start):
                request = dataclasses.replace(like, seed=seed)
                recipe = recipe_of(request, pipe.config.sampling, picture, model=model, dtype=dtype, **hashes)
                path = _picture_path(output, prompt, seed, count)
                save_picture(path, picture, recipe)
                print(path)
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Command line before recipe before defaults."""
    settings = dict(DEFAULTS)
    if options.recipe is not None:
        from sdjax.recipe import read_recipe

        recipe = read_recipe(options.recipe)
        if recipe.task != options.task:
            raise ValueError(f"{options.recipe} was made by {recipe.task}; use sdjax {recipe.task} --recipe ...")
        settings |= {name: value for name, value in dataclasses.asdict(recipe).items() if name in settings}
        settings["size"] = f"{recipe.width}x{recipe.height}" if recipe.task == "txt2img" else None
    given = {name: value for name, value in vars(options).items() if name in settings and value is not None}
    settings |= given
    if settings["strength"] is None:
        settings["strength"] = STRENGTHS.get(options.task)
    return settings


def _checked_file(name: str, given: Any, file_hash: Callable[[Any], str]) -> tuple[str, str]:
    """An input picture as (path, sha256); one named by a recipe must still be the same file."""
    if given is None:
        raise ValueError(f"the {name} is missing: give the path of a picture after the prompt")
    path, expected = (given, None) if isinstance(given, str) else given
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture file")
    found = file_hash(path)
    if expected is not None and found != expected:
        raise ValueError(f"{path}: not the {name} that the recipe was made with (its contents changed); give it anew")
    return str(path), found


def _picture_path(output: Path, prompt: str, seed: int, count: int) -> Path:
    """The file itself for one picture; else the name with the seed, in a folder after the prompt."""
    if output.suffix:
        return output if count == 1 else output.with_name(f"{output.stem}-{seed}{output.suffix}")
    slug = "-".join(re.findall(r"\w+", prompt.lower()))[:60] or "picture"
    return output / f"{slug}-{seed}.png"


def _load(
    options: argparse.Namespace,
    on_convert: Callable[[int, int], None],
    *,
    like: Request | None = None,
    batch: int = 1,
    loop: bool = False,
    **given: Any,
) -> Any:
    """The model that was asked for. given: what does not come from the options as they are.

    like: a request to come; while the parameters are read, its programs are compiled for `batch` at a time on each
    device, and for the whole loop or for single steps.
    """
    from sdjax.compilation import meanwhile, programs_for
    from sdjax.load import load
    from sdjax.sharding import HERE

    named = {"model": options.model, "dtype": options.dtype, "placement": HERE} | given
    with meanwhile() as start:

        def on_shapes(config: ModelConfig, shapes: Params) -> None:
            if like is None or named["placement"].parallel == "pmap":
                return
            with suppress(ValueError, OSError):  # a request that cannot be made; it says so when its turn comes
                options = dict(dtype=named["dtype"], placement=named["placement"], shapes=shapes)
                programs = programs_for(like, config, batch, **options)
                del programs["paint_row" if loop else "paint"]
                start(programs.values())

        return load(named.pop("model") or None, progress=on_convert, on_shapes=on_shapes, **named)


def _placement(options: argparse.Namespace, pictures: int | None = None) -> Any:
    """The devices that were asked for: all of the machine, but no more than there are pictures.

    Several devices of a CPU are one CPU; of these only as many are used as were asked for.
    """
    import jax

    from sdjax.sharding import over

    there = jax.local_devices()
    if options.devices is not None and not 1 <= options.devices <= len(there):
        raise ValueError(f"--devices must be between 1 and the {len(there)} of this machine, found {options.devices}")
    devices = options.devices or (1 if there[0].platform == "cpu" else len(there))
    if pictures is not None:
        devices = min(devices, pictures * max(1, options.split_params))
    return over(there[:devices], parallel=options.parallel, model=options.split_params, exact=options.exact)


@contextmanager
def _progress(model: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], Callable[..., None]]]]:
    """Bars on the error stream: one while a file is converted, one for each batch of pictures."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        conversion: list[Any] = []

        def on_convert(done: int, total: int) -> None:
            if not conversion:
                conversion.append(bars.add_task(f"converting {Path(model).name} (MB)"))
            bars.update(conversion[0], completed=done // 10**6, total=total // 10**6)

        def on_step(title: str) -> Callable[..., None]:
            bar = bars.add_task(title, total=None)

            def step(done: int, total: int, _: Any) -> None:
                bars.update(bar, completed=done, total=total)

            return step

        yield on_convert, on_step


def show_info(options: argparse.Namespace) -> int:
    """Prints a picture's recipe or a model's contents."""
    from sdjax.recipe import KEY, read_parameters, read_recipe

    path = Path(options.path)
    if path.is_file() and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
        parameters = read_parameters(path)
        if parameters is None:
            raise ValueError(f"{path}: no recipe in this picture")
        print(parameters)
        try:
            recipe = read_recipe(path)
        except ValueError as error:
            console.print(f"sdjax: note: {error}", markup=False)
        else:
            print(f"{KEY}: {recipe.to_json()}")
        return 0
    from sdjax.load import describe, find

    print(describe(find(options.path)), end="")
    return 0


def selftest(options: argparse.Namespace) -> int:
    """Runs the self-test; exit status 1 if a check failed."""
    from sdjax.selftest import run

    pipe = None
    if options.model is not None:
        with _progress(options.model) as (on_convert, _):
            pipe = _load(options, on_convert)
    return 0 if run(pipe) else 1


if __name__ == "__main__":
    sys.exit(main())
