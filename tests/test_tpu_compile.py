"""Comparing the programs for TPUs with what is recorded of them, without compiling any."""

import importlib
import sys
from pathlib import Path

import pytest

from examples import benchmarks


@pytest.fixture
def tpu(monkeypatch):
    """The script, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(Path(next(iter(benchmarks.__path__)))))
    for name in ("gpu_compile", "hlo_traffic"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("examples.benchmarks.tpu_compile")


def test_what_is_recorded_can_be_read_and_names_programs_there_are(tpu):
    found = tpu.recorded()
    assert found
    for (topology, batch, name), sizes in found.items():
        assert topology in tpu.TOPOLOGIES
        assert batch > 0
        assert name in tpu.NAMES
        assert {"arguments", "temporaries"} <= sizes.keys() <= set(tpu.BYTES)


def test_a_program_has_grown_if_any_of_its_bytes_have(tpu):
    (topology, batch, name), known = next(iter(tpu.recorded().items()))
    same = {kind: known.get(kind, 10**12) for kind in tpu.BYTES}  # what is not recorded is not compared
    assert tpu.grown(topology, batch, name, tpu.Measured(**same, faults=[])) == []
    for kind in known:
        (said,) = tpu.grown(topology, batch, name, tpu.Measured(**same | {kind: known[kind] + 1}, faults=[]))
        assert kind in said
        assert f"{known[kind] + 1:,}" in said
        assert tpu.grown(topology, batch, name, tpu.Measured(**same | {kind: known[kind] - 1}, faults=[])) == []


def test_a_program_of_which_nothing_is_recorded_does_not_pass(tpu):
    assert tpu.grown("v5e:2x2", 3, "sample", tpu.Measured(0, 0, 0, 0, []))
