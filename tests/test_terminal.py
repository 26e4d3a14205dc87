"""Printing never costs work, Ctrl-C is one line at any moment, and whatever goes wrong is one line, too."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax import cli
from sdjax.cli import terminal
from sdjax.cli.model import keep_programs
from sdjax.cli.terminal import Steady, explained, steady_streams
from tests.children import interruptible

ROOT = Path(__file__).parent.parent


class Failing(io.StringIO):
    """A stream whose reader is gone, whose disk is full, or whose terminal has hung up."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


ERRORS = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_what_cannot_be_printed_is_forgotten(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    monkeypatch.setattr(sys, "stderr", Failing(error))
    with steady_streams():
        print("a picture's name", flush=True)
        terminal.note("a note")
        terminal.error("an error")


@given(st.text(), st.sampled_from(["ascii", "latin-1", "cp1252", "utf-8"]))
def test_any_text_is_printed_in_any_encoding(text, encoding):
    raw = io.BytesIO()
    stream = Steady(io.TextIOWrapper(raw, encoding=encoding, newline=""))
    assert stream.write(text) == len(text)
    stream.flush()
    expected = text.encode(encoding, "ignore")
    assert len(raw.getvalue()) >= len(expected)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_what_is_printed_never_gets_into_a_file(closed, tmp_path):
    """Started without a stream (`>&-`), the next file that is opened would get its number."""
    code = f"""
import sys
from sdjax.cli import open_streams
open_streams()
file = open({str(tmp_path / "file")!r}, "w")
assert file.fileno() > 2
print("said")
print("said", file=sys.stderr)
sys.stdin.read()
file.write("whole")
file.close()
"""
    close = " ".join(f"{number}>&-" for number in closed)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CODE": code}
    subprocess.run(f'"{sys.executable}" -c "$CODE" {close}', shell=True, env=environment, check=True)
    assert (tmp_path / "file").read_text() == "whole"


def test_warnings_are_notes_even_where_they_are_to_be_errors(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steady_streams():
            warnings.warn("odd", stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("odd again", stacklevel=1)
    assert "sdjax: note: odd" in capsys.readouterr().err


def test_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr, sys.unraisablehook
    with pytest.raises(RuntimeError), steady_streams():
        raise RuntimeError
    assert (sys.stdout, sys.stderr, sys.unraisablehook) == before


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (ValueError("steps\nmust be"), "steps must be"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
            "make fewer or smaller pictures at once",
        ),
        (MemoryError(), "there is too little memory (of this machine)"),
        (KeyError("surprise"), "a fault of sdjax or of a library it uses (SDJAX_TRACEBACK=1"),
        (OSError(), "OSError"),
    ],
)
def test_every_failure_is_one_line(failure, says):
    line = explained(failure)
    assert says in line
    assert "\n" not in line


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    def no_devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr("jax.local_devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "JAX_PLATFORMS is 'cuda', and JAX finds no such device here" in explained(AssertionError())
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "JAX finds no device to work with (Unable to" in explained(RuntimeError("x"))


def test_unexpected_failures_are_one_line_and_a_traceback_only_where_it_is_asked_for(monkeypatch, capsys):
    def broken(path):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("sdjax.cli.info._is_tar", broken)
    assert cli.main(["info", __file__]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("SDJAX_TRACEBACK", "1")
    assert cli.main(["info", __file__]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_programs_are_not_kept_where_nothing_can_be_written(monkeypatch, capsys):
    monkeypatch.setenv("SDJAX_CACHE", "/proc/sdjax")
    with steady_streams():
        keep_programs()
    said = capsys.readouterr().err
    assert "compiled programs are not kept: " in said
    assert "damaged" not in said


@pytest.mark.parametrize("moments", [(0.15, 0.3, 0.5), (0.7, 1.0, 1.5)])
def test_interrupting_at_any_moment_is_one_line(moments, tmp_path):
    for moment in moments:
        process = subprocess.Popen(
            interruptible("-m", "sdjax.cli", "txt2img", "x", "-o", str(tmp_path / "new"), "--steps", "999"),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SDJAX_CACHE": str(tmp_path / "cache")},
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in error
        if process.returncode == 130:
            assert error.splitlines()[-1] == "sdjax: interrupted; what was made so far is kept"


def test_the_command_is_light_until_it_knows_how_to_be_interrupted():
    code = "import sys, sdjax.cli; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert not {"jax", "numpy", "flax", "PIL", "rich"} & set(run.stdout.split())


def test_words_between_colons_are_no_emoji(capsys):
    terminal.note("prompt:dog: a word")
    assert "prompt:dog: a word" in capsys.readouterr().err
