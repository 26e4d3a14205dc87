"""`sdjax-convert merge`: the formulas against numpy over the files themselves, identities, and all that is refused."""

import dataclasses
import json
import re
import subprocess
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import read
from convert.__main__ import main
from convert.merge import merged, recipe_of
from convert.write import write_diffusers, write_safetensors
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from tests.children import interruptible
from tests.small import MINI

UNET = dataclasses.replace(
    MINI.unet, channels=(8, 8, 8, 8), transformer_layers=(1, 0, 0, 0), heads=(2, 2, 2, 2), res_blocks=2
)
DEEP = dataclasses.replace(MINI, name="deep", unet=UNET)
"""With all the blocks of Stable Diffusion."""

INPAINTING = dataclasses.replace(MINI, name="mini-inpainting", unet=dataclasses.replace(MINI.unet, in_channels=9))
WIDE = dataclasses.replace(MINI, name="wide", unet=dataclasses.replace(MINI.unet, channels=(32,)))
GELU = dataclasses.replace(
    MINI,
    name="gelu",
    text=(dataclasses.replace(MINI.clip, layers=3, skip=1, activation="gelu", projection=16),),
)
"""With a text encoder like that of Stable Diffusion 2, whose last layer is not used."""

V = dataclasses.replace(MINI, name="v", schedule=dataclasses.replace(MINI.schedule, prediction="v"))
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def metadata(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def weights(config, seed):
    """Random weights, a few of them negative zeros."""

    def marked(leaf):
        leaf.reshape(-1)[0] = -0.0
        return leaf

    return jax.tree.map(marked, random_params(config, seed))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models, each as a file in the original names, a diffusers folder, and a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        params = weights(MINI, seed)
        write_safetensors(folder / f"{name}.safetensors", MINI, params)
        write_diffusers(folder / f"{name}.folder", MINI, params)
        checkpoint.save(folder / f"{name}.ours", MINI, params)
    for config in (DEEP, INPAINTING, WIDE, GELU, V):
        write_safetensors(folder / f"{config.name}.safetensors", config, weights(config, 3))
    tensors = load_file(folder / "b.safetensors")
    tensors[CONV_IN][0, 0, 0, 0] = np.nan
    save_file(tensors, folder / "nan.safetensors", metadata(folder / "b.safetensors"))
    return folder


@pytest.fixture
def there(models, tmp_path, monkeypatch):
    """A working folder with links to them, and where nothing else is."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        Path(path.name).symlink_to(path)
    Path("mini.json").write_text(MINI.to_json())
    return tmp_path


def merge(*arguments):
    """The tensors of the merged file."""
    assert main(["merge", *arguments, "-o", "out.safetensors", "--force"]) == 0
    return load_file("out.safetensors")


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


def expected(formula, m, a, b, c):
    """In float64, number by number."""
    a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
    if formula == "weighted-sum":
        return (1 - m) * a + m * b
    if formula == "add-difference":
        return a + m * (b - c)
    near, far = abs(b - a), abs(b - c)
    share = np.array([x / (x + y) if x + y else 0 for x, y in zip(near.flat, far.flat, strict=True)]).reshape(a.shape)
    return a + 1.8 * m * share * (b - c)


@pytest.mark.parametrize(
    "forms", ["safetensors safetensors safetensors", "folder ours safetensors", "ours folder ours"]
)
@pytest.mark.parametrize(("formula", "m"), [("weighted-sum", 0.3), ("add-difference", -0.7), ("train-difference", 1.2)])
def test_formulas_are_those_of_numpy_in_every_mixture_of_formats(there, forms, formula, m):
    names = [f"{name}.{form}" for name, form in zip("abc", forms.split(), strict=True)]
    names = names[:2] if formula == "weighted-sum" else names
    out = merge(*names, "--formula", formula, "--weight", str(m))
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert out.keys() == a.keys()
    for name, found in out.items():
        np.testing.assert_allclose(found, expected(formula, m, a[name], b[name], c[name]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "like"),
    [
        ("a.safetensors b.safetensors --weight 0", "a"),
        ("a.safetensors b.folder --weight 1", "b"),
        ("a.folder b.ours c.ours --formula add-difference --weight 0", "a"),
        ("a.safetensors b.folder b.ours --formula add-difference --weight 0.7", "a"),
        ("a.safetensors b.folder b.ours --formula add-difference --weight -0.7", "a"),
        ("a.ours b.ours b.folder --formula train-difference", "a"),
        ("b.safetensors b.ours c.folder --formula train-difference", "b"),
    ],
)
def test_what_changes_nothing_leaves_every_bit(there, arguments, like):
    assert same_bits(merge(*arguments.split()), load_file(f"{like}.safetensors"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_number_is_computed_in_float32_and_rounded_once(there, dtype):
    for name in "ab":
        assert main([f"{name}.ours", f"{name}16.safetensors", "--dtype", "float16"]) == 0
    merge("a16.safetensors", "b16.safetensors", "--weight", "0.3", "--dtype", dtype)
    a, b = (load_file(f"{name}16.safetensors")[CONV_IN].astype(np.float32) for name in "ab")
    with safe_open("out.safetensors", "pt") as file:
        found = file.get_tensor(CONV_IN)
    wanted = np.float32(0.7) * a + np.float32(0.3) * b
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(found.float().numpy(), wanted.astype(jax.numpy.dtype(dtype)).astype(np.float32))


def test_keep_keeps_the_dtypes_of_a(there):
    assert main(["a.ours", "a16.safetensors", "--dtype", "float16"]) == 0
    dtypes = {name: array.dtype for name, array in load_file("a16.safetensors").items()}
    assert set(dtypes.values()) == {np.dtype("float16"), np.dtype("float32")}  # the autoencoder stays
    assert {name: x.dtype for name, x in merge("a16.safetensors", "b.ours", "--dtype", "keep").items()} == dtypes


def block(name):
    """Which of the 26 weights is that of a tensor."""
    if not (found := re.match(r"model\.diffusion_model\.(\w+)\.(\d+)\.", name)):
        return 0
    kind, number = found[1], int(found[2])
    return {"input_blocks": 1 + number, "middle_block": 13, "output_blocks": 14 + number, "time_embed": 1, "out": 25}[
        kind
    ]


@pytest.mark.parametrize("base", [True, False])
def test_each_block_has_its_weight_and_the_rest_has_that_of_the_base(there, base):
    write_safetensors("other.safetensors", DEEP, weights(DEEP, 4))
    m = [0.5 if i == 0 and not base else i / 25 for i in range(26)]
    out = merge("deep.safetensors", "other.safetensors", "--blocks", ",".join(map(str, m if base else m[1:])))
    a, b = load_file("deep.safetensors"), load_file("other.safetensors")
    assert {block(name) for name in out} == set(range(26))
    for name, found in out.items():
        at = m[block(name)]
        np.testing.assert_allclose(found, (1 - at) * a[name] + at * b[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("a", ["a.safetensors", "a.ours"])
@pytest.mark.parametrize("other", ["c.safetensors", "c.folder", "c.ours"])
def test_a_part_of_another_model_comes_as_it_is(there, a, other):
    c, plain = load_file("c.safetensors"), merge("a.safetensors", "b.safetensors", "--weight", "0.3")
    options = {"--vae": "first_stage_model.", "--text-encoder": "cond_stage_model."}
    for option, prefix in options.items() if other == "c.ours" else [("--vae", "first_stage_model.")]:
        out = merge(a, "b.folder", "--weight", "0.3", option, other)
        assert same_bits(out, {name: c[name] if name.startswith(prefix) else x for name, x in plain.items()})


@pytest.mark.parametrize(("formula", "form"), [("add-difference", "safetensors"), ("train-difference", "ours")])
def test_a_difference_goes_into_an_inpainting_model_and_its_extra_channels_stay(there, formula, form):
    name = "mini-inpainting.safetensors"
    if form == "ours":
        assert main([name, "inpainting"]) == 0
        name = "inpainting"
    out = merge(name, "b.safetensors", "c.ours", "--formula", formula, "--weight", "0.4")
    a, b, c = (load_file(f"{name}.safetensors") for name in ("mini-inpainting", "b", "c"))
    assert out[CONV_IN][:, 4:].tobytes() == a[CONV_IN][:, 4:].tobytes()
    a[CONV_IN] = a[CONV_IN][:, :4]
    for name, found in out.items():
        found = found[:, :4] if name == CONV_IN else found
        np.testing.assert_allclose(found, expected(formula, 0.4, a[name], b[name], c[name]), rtol=2e-6, atol=1e-7)
    assert read("out.safetensors").config.unet.in_channels == 9


def test_layers_that_are_not_used_are_left_out_where_a_model_lacks_them(there):
    assert main(["gelu.safetensors", "gelu", "--to", "diffusers"]) == 0
    whole, cut = load_file("gelu.safetensors"), merge("gelu.safetensors", "gelu", "--weight", "0")
    assert same_bits(cut, {name: whole[name] for name in cut})
    assert {name.split("resblocks.")[1][0] for name in whole.keys() - cut.keys() if "resblocks" in name} == {"2"}
    assert same_bits(merge("gelu.safetensors", "gelu.safetensors", "--weight", "0"), whole)


def test_moving_averages_are_taken_as_asked(there):
    tensors = load_file("b.safetensors")
    averages = {
        "model_ema.diffusion_model" + name.removeprefix("model.diffusion_model.").replace(".", ""): x + 1
        for name, x in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(tensors | averages, "both.safetensors", metadata("b.safetensors"))
    for ema, more in (("yes", 1), ("auto", 1), ("no", 0)):
        out = merge("a.ours", "both.safetensors", "--weight", "1", "--ema", ema)
        np.testing.assert_array_equal(out[CONV_IN], tensors[CONV_IN] + np.float32(more))


def test_a_merge_is_written_in_every_format(there):
    merge("a.safetensors", "b.folder", "--weight", "0.3")
    assert main(["merge", "a.safetensors", "b.folder", "--weight", "0.3", "-o", "ours"]) == 0
    assert main(["merge", "a.ours", "b.folder", "--weight", "0.3", "-o", "folder", "--to", "diffusers"]) == 0
    found = [read("out.safetensors").params, read("folder").params, checkpoint.restore("ours")[1]]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_the_file_says_what_was_merged_of_what(there):
    merge("a.ours", "b.folder", "c.safetensors", "--formula", "train-difference", "--vae", "c.ours")
    found = json.loads(metadata("out.safetensors")["sd_merge_recipe"])
    assert found == {
        "type": "sdjax",
        "formula": "train-difference",
        "weight": 1.0,
        "models": {"A": "a.ours", "B": "b.folder", "C": "c.safetensors"},
        "vae": "c.ours",
    }


BLOCKS_25 = ",".join(["0.5"] * 25)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("a.ours b.ours -o out --formula add-difference", "add-difference is of 3 models, A, B, C; found 2"),
        ("a.ours b.ours c.ours -o out", "weighted-sum is of 2 models, A, B; found 3"),
        ("a.ours b.ours -o out --formula geometric", "expected one of weighted-sum, add-difference, train-difference"),
        ("a.ours b.ours -o out --weight half", "the weight 'half' is no number"),
        ("a.ours b.ours -o out --weight nan", "the weight nan of BASE is not finite"),
        ("a.ours b.ours c.ours -o out --formula add-difference --weight inf", "the weight inf of BASE is not finite"),
        ("a.ours b.ours -o out --weight 1.2", "the weight 1.2 of BASE lies outside [0, 1]"),
        ("a.ours b.ours -o out --weight -0.1", "the weight -0.1 of BASE lies outside [0, 1]"),
        (f"a.ours b.ours -o out --blocks {BLOCKS_25[:-3]}2", "the weight 2.0 of OUT11 lies outside [0, 1]"),
        (f"a.ours b.ours -o out --blocks {BLOCKS_25},0.5 --weight 0.5", "BASE, is the weight; leave one"),
        ("a.ours b.ours -o out --blocks 0.5,0.5", "2 block weights; expected 25 (IN00 to IN11, M00, OUT00 to OUT11)"),
        (f"a.ours b.ours -o out --blocks {BLOCKS_25},", "the weight '' is no number"),
        ("a.ours b.ours -o a.ours --force", "source and destination are the same"),
        ("a.ours b.ours -o ./b.ours --force", "source and destination are the same"),
        ("a.safetensors b.ours -o a.safetensors", "is already there"),
        ("a.ours b.ours c.ours -o c.ours/new --formula add-difference", "lies inside c.ours"),
        ("a.ours b.ours -o c.safetensors --vae c.safetensors --force", "source and destination are the same"),
        ("a.ours b.ours -o out.ckpt", "pickles are not written"),
        ("a.ours b.ours -o no/such/out", "no such folder"),
        ("a.ours absent -o out", "absent: no such file"),
        ("a.ours b.ours -o out --ema no --prediction v", "which says everything; leave out --ema, --prediction"),
        ("a.ours b.ours -o out --dtype int4", "dtype must be one of float32, bfloat16, float16, keep"),
        ("a.ours b.safetensors -o out --ema maybe", "ema must be one of"),
        ("a.ours b.ours -o out --vae mini.json", "mini.json"),
        (
            "a.safetensors wide.safetensors -o out",
            "wide.safetensors: unet.channels is (32,), and (16,) in a.safetensors",
        ),
        ("a.ours v.safetensors -o out", "v.safetensors: schedule.prediction is v, and epsilon in a.ours"),
        ("a.ours gelu.safetensors -o out", "gelu.safetensors: text.layers is 2, and 1 in a.ours"),
        ("a.ours mini-inpainting.safetensors -o out", "an inpainting model can only be A, in add-difference"),
        ("mini-inpainting.safetensors a.ours -o out", "unet.in_channels is 4, and 9 in mini-inpainting.safetensors"),
        ("a.ours b.ours mini-inpainting.safetensors -o out --formula add-difference", "unet.in_channels is 9, and 4"),
        (
            "mini-inpainting.safetensors b.ours mini-inpainting.safetensors -o out --formula add-difference",
            "b.ours: unet.in_channels is 4, and 9 in mini-inpainting.safetensors",
        ),
    ],
)
def test_what_cannot_be_merged_is_told_in_one_line_before_a_number_is_read(there, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr("convert.merge.laid_out", lambda *_: pytest.fail("a tensor was read"))
    before = sorted(there.iterdir())
    assert main(["merge", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sdjax-convert: error: ")
    assert says in captured.err
    assert sorted(there.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("a.ours nan.safetensors", f"nan.safetensors: {CONV_IN} holds NaN or infinite values, which cannot be merged"),
        (
            "nan.safetensors a.ours --weight 0 --to diffusers",
            f"nan.safetensors: {CONV_IN} holds NaN or infinite values",
        ),
        (
            "a.folder b.ours c.ours --formula add-difference --weight 1e39 --to safetensors",
            "becomes infinite; choose smaller weights",
        ),
        ("a.folder b.ours c.ours --formula add-difference --weight 1e9 --dtype float16", "too large for float16"),
    ],
)
def test_a_result_that_is_no_number_is_refused_by_name_and_leaves_nothing(there, capsys, arguments, says):
    before = sorted(there.iterdir())
    assert main(["merge", *arguments.split(), "-o", "out"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert sorted(there.iterdir()) == before


def test_block_weights_are_for_a_unet_that_has_those_blocks(there, capsys):
    config = dataclasses.replace(DEEP, name="deeper", unet=dataclasses.replace(DEEP.unet, res_blocks=3))
    write_safetensors("deeper.safetensors", config, random_params(config))
    arguments = ["merge", "deeper.safetensors", "deeper.safetensors", "-o", "out.safetensors"]
    assert main([*arguments, "--blocks", f"0,{BLOCKS_25}"]) == 2
    assert "has a block IN12, for which there is no weight" in capsys.readouterr().err
    assert main(arguments) == 0


def test_no_model_is_ever_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wide = dataclasses.replace(DEEP, unet=dataclasses.replace(DEEP.unet, channels=(64, 64, 64, 64)))
    for seed, name in enumerate("abc"):
        write_safetensors(f"{name}.safetensors", wide, random_params(wide, seed))
    size = Path("a.safetensors").stat().st_size
    names = [f"{name}.safetensors" for name in "abc"]
    with merged(names, recipe_of("train-difference")) as converted:
        tracemalloc.start()
        try:
            write_safetensors("out.safetensors", converted.config, converted.params)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert Path("out.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    assert peak < size / 2


def test_an_interrupt_while_the_merging_is_loaded_is_one_line(there):
    code = (
        "import os, signal, sys\n"
        "import convert.__main__\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'convert.merge': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.exit(convert.__main__.main(['merge', 'a.ours', 'b.ours', '-o', 'out']))\n"
    )
    run = subprocess.run(interruptible("-c", code), capture_output=True, text=True)
    assert run.returncode == 130
    assert run.stderr == "sdjax-convert: interrupted; nothing was written\n"
    assert not Path("out").exists()
