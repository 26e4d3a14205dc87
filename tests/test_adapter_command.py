"""`sdjax-convert --lora`, `extract` and `adapter`: adapters into checkpoints, out of them, and from name to name."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.__main__ import main
from convert.adapters import read_adapter, targets, write_adapter
from convert.write import write_safetensors
from sdjax.cli import main as sdjax_main
from sdjax.models.adapters import Strength, merged
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from tests.small import SMALL
from tests.test_adapter_pictures import loha, lora


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("there")
    params = random_params(SMALL)
    write_safetensors(folder / "model.safetensors", SMALL, params)
    checkpoint.save(folder / "ours", SMALL, params)
    write_adapter(folder / "a.safetensors", lora(4, 1, SMALL, convolutions=True), SMALL)
    write_adapter(folder / "h.safetensors", loha(2, SMALL), SMALL)
    (folder / "config.json").write_text(SMALL.to_json())
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("source", ["model.safetensors", "ours"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_adapters_are_baked_into_a_checkpoint_and_rounded_once(there, tmp_path, source, dtype):
    loras = ("--lora", f"{there}/a.safetensors:0.8:0.3", "--lora", f"{there}/h.safetensors:-0.5")
    assert run(there / source, tmp_path / "out", "--dtype", dtype, *loras) == 0
    wanted = [
        (read_adapter(there / "a.safetensors", SMALL), Strength(0.8, 0.3)),
        (read_adapter(there / "h.safetensors", SMALL), Strength(-0.5, -0.5)),
    ]
    expected = merged(random_params(SMALL), wanted, SMALL)
    found = checkpoint.restore(tmp_path / "out")[1]
    for path, leaf in jax.tree_util.tree_flatten_with_path(expected)[0]:
        part = path[0].key
        here = found[part]
        for key in path[1:]:
            here = here[key.key]
        kind = np.float32 if part == "vae" or dtype == "float32" else np.float16
        np.testing.assert_array_equal(np.asarray(here), leaf.astype(kind))


def test_a_baked_checkpoint_is_written_for_other_programs_too(there, tmp_path):
    assert run(there / "model.safetensors", tmp_path / "out.safetensors", "--lora", there / "a.safetensors") == 0
    wanted = [(read_adapter(there / "a.safetensors", SMALL), Strength(1, 1))]
    expected = merged(random_params(SMALL), wanted, SMALL)
    found = convert.read(tmp_path / "out.safetensors").params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_lora_is_extracted_from_what_it_was_baked_into(there, tmp_path):
    assert run(there / "model.safetensors", tmp_path / "tuned.safetensors", "--lora", f"{there}/a.safetensors:0.7") == 0
    places = there / "ours", tmp_path / "tuned.safetensors", "-o", tmp_path / "out.safetensors"
    assert run("extract", *places, "--rank", "4", "--dtype", "float32") == 0
    found, original = (read_adapter(path, SMALL) for path in (tmp_path / "out.safetensors", there / "a.safetensors"))
    assert set(found.updates) == set(original.updates)
    params = random_params(SMALL)
    again, expected = (merged(params, [(one, Strength(s, s))], SMALL) for one, s in ((found, 1.0), (original, 0.7)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=3e-5), again, expected)


def test_a_smaller_rank_says_what_it_leaves_out(there, tmp_path, capsys):
    assert run("extract", there / "ours", there / "ours", "-o", tmp_path / "x.safetensors") == 2
    assert "the two models do not differ in any matrix" in capsys.readouterr().err
    assert run(there / "model.safetensors", tmp_path / "tuned.safetensors", "--lora", there / "a.safetensors") == 0
    places = there / "ours", tmp_path / "tuned.safetensors", "-o", tmp_path / "out.safetensors"
    assert run("extract", *places, "--rank", "2", "--linear") == 0
    captured = capsys.readouterr()
    assert "note: what rank 2 leaves out of the changes: " in captured.err
    assert "other parameters changed, which a LoRA cannot say" in captured.err  # the convolutions, by --linear
    assert "out.safetensors: lora, " in captured.out
    assert {array.dtype for array in load_file(tmp_path / "out.safetensors").values()} == {
        np.dtype("f2"),
        np.dtype("f4"),
    }


def test_an_adapter_gets_the_names_that_all_programs_read(there, tmp_path):
    """diffusers' names of 2023, without alpha: read, written as kohya's, and every number is the same."""
    rng, tensors = np.random.default_rng(0), {}
    for target in targets(SMALL).values():
        if target.kernel[-2] in ("q", "v") and target.kernel[0] == "unet":
            out, inner = target.shape
            tensors[f"{target.name}.lora.down.weight"] = rng.standard_normal((2, inner), np.float32)
            tensors[f"{target.name}.lora.up.weight"] = rng.standard_normal((out, 2), np.float32)
    save_file(tensors, tmp_path / "old.safetensors")
    config = ("--config", there / "config.json")
    assert run("adapter", tmp_path / "old.safetensors", "-o", tmp_path / "new.safetensors", *config) == 0
    found = load_file(tmp_path / "new.safetensors")
    assert all(name.startswith("lora_unet_down_blocks_0") or "lora_unet" in name for name in found)
    sizes = sorted((array.shape, array.tobytes()) for array in tensors.values())
    assert sorted((array.shape, array.tobytes()) for array in found.values()) == sizes


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("{there}/model.safetensors", "{out}", "--lora", "{there}/gone.pt"), "gone.pt: no such file"),
        (("{there}/model.safetensors", "{out}", "--lora", "{there}/a.safetensors:1e9"), "no such file"),
        (("{there}/model.safetensors", "{out}", "--lora", "{there}/a.safetensors:1000"), "must lie in [-100, 100]"),
        (("{there}/model.safetensors", "{out}", "--lora", "{there}/model.safetensors"), "no adapter (LoRA, LyCORIS)"),
        (("extract", "{there}/ours", "{there}/ours", "-o", "{out}"), "an adapter is written as .safetensors"),
        (("extract", "{there}/ours", "{there}/gone", "-o", "{out}.safetensors"), "no such file"),
        (("extract", "{there}/ours", "{there}/ours", "-o", "{out}.safetensors", "--rank", "0"), "whole number from 1"),
        (("extract", "{there}/ours", "{there}/ours", "-o", "{out}.safetensors", "--dtype", "int8"), "dtype must be"),
        (("adapter", "{there}/a.safetensors", "-o", "{there}/a.safetensors", "--force"), "are the same"),
        (
            ("adapter", "{there}/a.safetensors", "-o", "{out}.safetensors"),
            "lora_down has the shape (4, 64), expected 4 x 768",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(there, tmp_path, capsys, arguments, reason):
    before = sorted(tmp_path.iterdir())
    assert run(*(text.format(there=there, out=tmp_path / "out") for text in arguments)) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_models_of_other_shapes_have_no_lora_between_them(there, tmp_path, capsys):
    other = dataclasses.replace(SMALL, name="other", unet=dataclasses.replace(SMALL.unet, channels=(32, 96)))
    checkpoint.save(tmp_path / "other", other, random_params(other))
    assert run("extract", there / "ours", tmp_path / "other", "-o", tmp_path / "x.safetensors") == 2
    assert "is not of the same shapes as" in capsys.readouterr().err


def test_metadata_of_an_adapter_is_kept_and_its_hash_is_that_of_its_numbers(there, tmp_path):
    adapter = dataclasses.replace(lora(2, 5, SMALL), metadata={"ss_output_name": "mine", "ss_network_dim": "2"})
    write_adapter(tmp_path / "x.safetensors", adapter, SMALL)
    data = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert metadata["ss_output_name"] == "mine"
    assert read_adapter(tmp_path / "x.safetensors", SMALL).metadata["ss_network_dim"] == "2"


def test_a_few_modules_that_the_model_lacks_are_told_and_the_others_act(there, tmp_path, capsys):
    tensors = load_file(there / "a.safetensors")
    for kind, shape in (("lora_down", (4, 8)), ("lora_up", (8, 4))):
        tensors[f"lora_unet_of_somebody_else.{kind}.weight"] = np.ones(shape, np.float32)
    save_file(tensors, tmp_path / "more.safetensors")
    assert run(there / "model.safetensors", tmp_path / "out", "--lora", tmp_path / "more.safetensors") == 0
    assert "modules are not in the model; the model is small: lora_unet_of_somebody_else (1); they are left out" in (
        capsys.readouterr().err
    )
    found, original = (read_adapter(path, SMALL) for path in (tmp_path / "more.safetensors", there / "a.safetensors"))
    assert set(found.updates) == set(original.updates)


def test_info_says_what_an_adapter_is_and_for_which_model(tmp_path, capsys):
    tensors = {}
    for at in ("down_blocks_0_attentions_0", "mid_block_attentions_0"):
        width = 320 if at.startswith("down") else 1280
        module = f"lora_unet_{at}_transformer_blocks_0_attn2_to_k"
        tensors[f"{module}.lora_down.weight"] = np.ones((4, 768), np.float16)
        tensors[f"{module}.lora_up.weight"] = np.ones((width, 4), np.float16)
        tensors[f"{module}.alpha"] = np.array(2, np.float16)
    save_file(tensors, tmp_path / "ink.safetensors", metadata={"ss_output_name": "ink v2"})
    assert sdjax_main(["info", str(tmp_path / "ink.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[:3] == [
        "adapter     lora of 2 modules, for sd15",
        "modules     2 of the UNet, 0 of the text encoder",
        "ranks       4",
    ]
    assert "ss_output_name ink v2" in shown
    assert (
        sdjax_main(["txt2img", "a", "--model", str(tmp_path / "ink.safetensors"), "-o", str(tmp_path / "x.png")]) == 2
    )
    assert "this is a LoRA file" in (error := capsys.readouterr().err)
    assert "give a model, and this by --lora " in error
