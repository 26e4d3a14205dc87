"""Pickles in a .ckpt that are hostile or damaged: nothing in them is run, whatever they are."""

import os
import pickle
import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convert.files.open import open_source
from convert.files.source import CheckpointError
from tests.checkpoint_files import (
    CHANGES,
    FUZZ,
    MB,
    damage,
    pickled,
    read_all,
    refusal,
    survive,
    tensor_pickle,
    write_torch_zip,
)

WEIGHT = np.arange(3, dtype="f4")


# Pickles that want to run something


class Gadget:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


HOSTILE = {
    "posix.system": lambda file: pickle.dumps({"w": Gadget(os.system, (f"touch {file}",))}, 2),
    "__builtin__.eval": lambda file: pickle.dumps({"w": Gadget(eval, (f"open({file!r}, 'w')",))}, 2),
    "builtins.exec": lambda file: pickle.dumps({"w": Gadget(exec, (f"open({file!r}, 'w')",))}, 4),
    "io.open": lambda file: pickle.dumps({"w": Gadget(open, (file, "w"))}, 5),
    "__builtin__.getattr": lambda file: b"\x80\x02c__builtin__\ngetattr\nq\x00.",
    "os.system": lambda file: (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text(f"touch {file}"[:200]) + b"\x85R."
    ),
    "torch.hub.load": lambda file: b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00x\x85R.",
    "torch.load": lambda file: b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "torch.storage._load_from_bytes": lambda file: b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.",
    "torch._utils.os.system": lambda file: b"\x80\x04" + text("torch._utils") + text("os.system") + b"\x93.",
    "pkgutil.resolve_name": lambda file: b"\x80\x02cpkgutil\nresolve_name\nX\x09\x00\x00\x00os:system\x85R.",
    "numpy.testing._private.utils.runstring": lambda file: b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.",
    "pytorch_lightning.utilities.cloud_io.load": lambda file: b"\x80\x02cpytorch_lightning.utilities.cloud_io\nload\n.",
    "pytorch_lightning.trainer.os.system": lambda file: (
        b"\x80\x04" + text("pytorch_lightning.trainer") + text("os.system") + b"\x93" + text("true") + b"\x85R."
    ),
    "uses INST": lambda file: b"\x80\x02(X\x04\x00\x00\x00trueios\nsystem\n.",
    "uses OBJ": lambda file: b"\x80\x02(o.",
    "uses EXT1": lambda file: b"\x80\x02\x82\x01.",
    "uses PERSID": lambda file: b"\x80\x02Pstorage\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_never_run(tmp_path, name):
    marker = tmp_path / "ran"
    write_torch_zip(tmp_path / "m.ckpt", HOSTILE[name](str(marker)))
    assert name in refusal(tmp_path / "m.ckpt")
    assert not marker.exists()


def test_the_hostile_pickle_would_have_run(tmp_path):
    pickle.loads(HOSTILE["posix.system"](str(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_hostile_part_of_a_whole_checkpoint_is_not_run(tmp_path):
    for legacy in (False, True):
        path = tmp_path / f"m{legacy}.ckpt"
        state = {"state_dict": {"w": torch.ones(2)}, "callbacks": Gadget(os.system, (f"touch {tmp_path}/ran",))}
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert "posix" in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_reading_imports_no_module_that_a_pickle_names(tmp_path):
    (tmp_path / "omegaconf").mkdir()
    (tmp_path / "omegaconf" / "__init__.py").write_text("raise SystemExit('imported')")
    state = pickled("note") + b"comegaconf\nNote\n)R"
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle()[:-1] + state + b"s.", {"0": WEIGHT.tobytes()})
    sys.path.insert(0, str(tmp_path))
    try:
        with open_source(tmp_path / "m.ckpt") as source:
            assert list(source.tensors) == ["w"]
            assert source.skipped == {"note": "omegaconf.Note"}
    finally:
        sys.path.remove(str(tmp_path))
    assert "omegaconf" not in sys.modules


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.ckpt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "m.ckpt")


# Descriptions of tensors that are not there


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=("a",)),
        dict(size=(3, 3)),
        dict(stride=(1, 1)),
        dict(offset=1),
        dict(offset=-1),
        dict(offset=2**47),
        dict(offset="1"),
        dict(size=(-3,)),
        dict(stride=(-1,)),
        dict(stride=(2,)),
        dict(size=(2**40,), stride=(0,)),
        dict(size=(2**62, 2**62), stride=(1, 1)),
        dict(size=(0, 2**47, 2**47), stride=(1, 1, 1)),
        dict(size=(1,) * 70, stride=(1,) * 70),
        dict(numel=2**31 - 1),
        dict(numel=2**62),
        dict(numel=2),
        dict(numel=-1),
        dict(numel="3"),
        dict(storage=b"ctorch\nQInt8Storage\n"),
        dict(storage=b"ctorch\nComplexFloatStorage\n"),
        dict(storage=b"ctorch\nDoubleStorage\n"),
        dict(storage=b"ctorch\nfloat32\n"),
        dict(storage=pickled("FloatStorage")),
        dict(name="two\nlines"),
        dict(name="\x1b[31mred"),
        dict(name="w" * 100_000),
    ],
)
def test_wrong_tensors_are_refused_without_using_memory(tmp_path, wrong):
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(), {"0": WEIGHT.tobytes()})
    assert list(read_all(tmp_path / "m.ckpt")) == ["w"]
    write_torch_zip(tmp_path / "m.ckpt", tensor_pickle(**wrong), {"0": WEIGHT.tobytes()})
    refusal(tmp_path / "m.ckpt")


@pytest.mark.parametrize("tensor", [torch.ones(1).expand(2**40), torch.eye(3).to_sparse(), torch.ones(2) * 1j])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, tensor, legacy):
    torch.save({"w": tensor}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    refusal(tmp_path / "m.ckpt")


# Pickles that are bombs or nonsense


def doubled(levels):
    """A tuple of a tuple twice, and so on: 2 ** levels leaves, put into the memo under `levels`."""
    steps = [b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(levels)]
    return b"K\x01\x85q\x00" + b"".join(steps)


def dotted(count, levels):
    """Dicts of dicts of dicts, where very many paths lead to few names."""
    made = b"\x80\x02}q\x00"
    for level in range(1, levels):
        items = b"".join(pickled("." * i) + b"h" + bytes([level - 1]) for i in range(1, count))
        made += b"}(" + items + b"uq" + bytes([level])
    return made + b"."


ORDERED = b"ccollections\nOrderedDict\n"
BOMBS = {
    "marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "deep tuple": b"\x80\x02K\x01" + b"\x85" * 200_000 + b".",
    "deep tuple as key": b"\x80\x02}K\x01" + b"\x85" * 200_000 + b"K\x01s.",
    "deep tuple in items": b"\x80\x02" + ORDERED + b"]K\x01" + b"\x85" * 200_000 + b"K\x01\x86a\x85R.",
    "deep tuple as storage": b"\x80\x02("
    + pickled("storage")
    + b"K\x01"
    + b"\x85" * 200_000
    + pickled(("0", "c", 3))
    + b"tQ.",
    "deep tuple as module": b"\x80\x04K\x01" + b"\x85" * 200_000 + pickled("x") + b"\x93.",
    "doubled sizes": tensor_pickle().replace(pickled((3,)), doubled(60) + b"0h\x3c"),
    "doubled module": b"\x80\x04" + doubled(60) + b"0h\x3ch\x3c\x93.",
    "doubled value": b"\x80\x02}" + pickled("w") + doubled(60) + b"s.",
    "doubled key": b"\x80\x02}" + doubled(60) + b"K\x01s.",
    "dict in itself": b"\x80\x02}q\x00" + pickled("a") + b"h\x00s.",
    "state_dict in itself": b"\x80\x02}q\x00(" + pickled("state_dict") + b"h\x00" + pickled("b") + b"K\x01u.",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "items copied": b"\x80\x02"
    + ORDERED
    + b"q\x010]("
    + b"K\x01K\x02\x86" * 10_000
    + b"eq\x00"
    + b"h\x01h\x00\x85R" * 9_000
    + b".",
    "many names": dotted(60, 7),
    "many steps": b"\x80\x02" + b"N" * 1_100_000 + b".",
    "many colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(50_000))
    + b"u.",
    "deep dicts": b"\x80\x02" + (b"}" + pickled("a")) * 30 + b"K\x01" + b"s" * 30 + b".",
    "memo miss": b"\x80\x02h\x05.",
    "no function": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "no stack": b"\x80\x02.",
    "long text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "longer text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.",
    "bad text": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "cut text": b"\x80\x02\x8c\x02a",
    "long number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "huge number as key": b"\x80\x02}\x8b\x88\x13\x00\x00" + b"\x7f" * 5000 + b"K\x01s.",
    "huge global_step": b"\x80\x02}" + pickled("global_step") + b"\x8b\x88\x13\x00\x00" + b"\x7f" * 5000 + b"s.",
    "far memo": b"\x80\x02r\xff\xff\xff\x7f}.",
    "a number": b"\x80\x02K\x05.",
    "a list": b"\x80\x02].",
    "an empty dict": b"\x80\x02}].",
    "a class": b"\x80\x02" + ORDERED + b".",
    "list as key": b"\x80\x02}(]K\x01u.",
    "odd items": b"\x80\x02}(K\x01u.",
    "items for a tuple": b"\x80\x02)K\x01K\x02s.",
    "state for a class": b"\x80\x02" + ORDERED + b"}b.",
    "call of a dict": b"\x80\x02})R.",
    "arguments of no tuple": b"\x80\x02" + ORDERED + b"]R.",
    "too many arguments": b"\x80\x02" + ORDERED + b"K\x01K\x02\x86R.",
    "surrogate in a name": b"\x80\x02}"
    + b"X\x03\x00\x00\x00\xed\xb2\x80"
    + tensor_pickle()[3:][tensor_pickle()[3:].index(b"c") :],
    "bytes": b"\xff" * 40,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_and_nonsense_are_refused_with_little_memory(tmp_path, name):
    write_torch_zip(tmp_path / "m.ckpt", BOMBS[name], {"0": WEIGHT.tobytes()})
    refusal(tmp_path / "m.ckpt", 160 * MB)


@pytest.mark.parametrize("name", ["deep tuple as key", "doubled module", "items copied", "longer text", "no end"])
def test_bombs_and_nonsense_in_legacy_files_are_refused_too(tmp_path, name):
    before = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    (tmp_path / "m.ckpt").write_bytes(b"".join(before) + BOMBS[name] + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match=r"m\.ckpt: "):
        open_source(tmp_path / "m.ckpt")


def test_odd_state_of_an_ordered_dict_is_left_out(tmp_path):
    state = OrderedDict(w=torch.ones(2))
    state.__dict__.update(w=5, clear=None)
    torch.save(state, tmp_path / "m.ckpt")
    assert list(read_all(tmp_path / "m.ckpt")) == ["w"]


# Random damage: a refusal or sound arrays, and never anything else


@FUZZ
@given(changes=CHANGES)
def test_damaged_pickles_are_refused_or_sound(tmp_path, changes):
    write_torch_zip(tmp_path / "m", damage(tensor_pickle(), changes), {"0": WEIGHT.tobytes()})
    survive(tmp_path / "m")


PIECES = st.sampled_from(
    [
        *(bytes([code]) for code in b"(.012NQRabdelostu})]\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"),
        *(b"K\x00", b"K\x01", b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", ORDERED, b"G" + bytes(8)),
        *(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cnumpy\ndtype\n", pickled("0"), pickled(("storage", "0"))),
        *(
            pickled((3,)),
            tensor_pickle()[:-1],
            tensor_pickle()[3:-1],
            b"\x8c\x05torch\x8c\x04Size\x93",
            b"\x8a\x01\xff",
        ),
    ]
)


@FUZZ
@given(pieces=st.lists(PIECES, max_size=30))
def test_random_programs_are_refused_or_sound(tmp_path, pieces):
    write_torch_zip(tmp_path / "m", b"\x80\x02" + b"".join(pieces) + b".", {"0": WEIGHT.tobytes()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        survive(tmp_path / "m")
