"""Advice can be followed: every option that a message names is one of the command that gives the message."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

from convert.__main__ import _merge_parser as merge_parser
from convert.__main__ import _parser as convert_parser
from sdjax.cli.options import parser
from sdjax.hints import HINTS, hint

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("sdjax", "convert") for path in (ROOT / folder).rglob("*.py"))
START = "--data d --out o --model m"
NEEDED = {
    "sdjax txt2img": "prompt",
    "sdjax img2img": "prompt picture.png",
    "sdjax inpaint": "prompt picture.png mask.png",
    "sdjax batch": "jobs.jsonl -o out",
    "sdjax grid": "prompt -o out --x steps=1,2",
    "sdjax train vae": START,
    "sdjax train clip": START,
    "sdjax train unet": START,
    "sdjax warmup": "",
    "sdjax info": "model",
    "sdjax selftest": "",
    "sdjax-convert": "from to",
    "sdjax-convert merge": "a b -o to",
}
"""The rest of each command line."""

CASES = [(name, command) for name, advice in HINTS.items() for command in advice.commands]


def parsed(line: str) -> argparse.Namespace:
    program, *words = shlex.split(line)
    if program == "sdjax-convert" and words[0] == "merge":
        return merge_parser().parse_args(words[1:])
    return (parser() if program == "sdjax" else convert_parser()).parse_args(words)


@pytest.mark.parametrize(("name", "command"), CASES)
def test_every_hint_is_an_option_of_the_command_that_gives_it(name, command):
    needed = NEEDED[command].replace(" --model m", "") if name == "preset" else NEEDED[command]
    advice = hint(name)
    found = vars(parsed(f"{command} {needed} {advice}"))
    option = HINTS[name].option.lstrip("-").replace("-", "_")
    assert found[f"{option}s" if option == "lora" and "loras" in found else option] not in (None, False, [])


@pytest.mark.parametrize("value", ["loss.*", "a name with spaces", "it's"])
def test_a_hint_with_a_value_is_ready_to_be_typed(value):
    found = parsed(f"sdjax info model {hint('ignore', value)}")
    assert found.ignore == [value]


def spelled_out(path: Path) -> list[str]:
    """Options in the strings of a file that are neither documentation nor given to a parser."""
    tree = ast.parse(path.read_text())
    let = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            let |= {id(child.value) for child in node.body if isinstance(child, ast.Expr)}
        if isinstance(node, ast.Assign):
            following = tree.body[tree.body.index(node) + 1 :][:1] if node in tree.body else []
            let |= {id(child.value) for child in following if isinstance(child, ast.Expr)}
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            *("add", "add_argument", "add_parser", "add_argument_group"),
        ):
            let |= {id(child) for child in ast.walk(node)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in let
    ]
    return [option for text in texts for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_take_their_advice_from_the_table(path):
    if path.name in ("hints.py", "make_clip_merges.py") or path.name == "platform.py":  # flags of XLA
        return
    assert spelled_out(path) == []
