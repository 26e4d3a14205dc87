"""Adapters: read in every naming and form, merged, written, extracted; and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from convert.adapters import extract, read_adapter, write_adapter
from convert.files.open import open_source
from convert.files.source import CheckpointError
from sdjax.config import SD15
from sdjax.models.adapters import Strength, merged, strength_at
from sdjax.models.params import abstract_params, random_params
from tests.adapter_files import (
    FORMS,
    NAMINGS,
    RANK,
    every_file,
    length,
    modules,
    random_weight,
    to_leaf,
    write_adapter_file,
    write_described,
    write_listed,
    write_numbered,
    write_peft_folder,
)
from tests.checkpoint_files import write_safetensors
from tests.small import SMALL

DATA = Path(__file__).parent / "data"
FULL = Strength(1.0, 1.0)
LOW_RANK = tuple(name for name, form in FORMS.items() if form.form == "lora" and "DoRA" not in name)

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
Q_NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PATH = ("unet", "down_0", "attention_0", "layer_0", "self_attention", "q", "kernel")


@pytest.fixture(scope="module")
def params():
    """Random weights of SMALL; shared, so do not write into them."""
    return random_params(SMALL, seed=1)


def error(found, expected):
    """The distance of two arrays by the length of the second."""
    assert found.shape == expected.shape
    return length(np.asarray(found, np.float64) - expected) / max(length(expected), 1e-30)


def leaf_of(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def in_torch_layout(leaf, shape):
    """A leaf of the tree as PyTorch has it."""
    leaf = np.asarray(leaf)
    return leaf.transpose(*((3, 2, 0, 1) if leaf.ndim == 4 else range(leaf.ndim)[::-1])).reshape(shape)


def check(adapter, expected, bar=1e-5):
    """The adapter changes just the modules of the file, each as its formula says."""
    assert set(adapter.updates) == set(expected)
    for path, (module, form, _, change, _) in expected.items():
        update, weight = adapter.updates[path], random_weight(module)
        assert update.form.removesuffix("+dora") == form
        assert error(update.change(weight), change(weight.astype(np.float64))) < bar, module.name


def leaves(tree, at=()):
    if isinstance(tree, dict):
        return {path: leaf for key, value in tree.items() for path, leaf in leaves(value, (*at, key)).items()}
    return {at: tree}


# Reading


@pytest.mark.parametrize(("naming", "form"), every_file())
def test_every_form_in_every_naming_means_its_formula(tmp_path, naming, form):
    file = write_adapter_file(tmp_path / "x.safetensors", naming, form, SMALL)
    check(read_adapter(file.path, SMALL), file.expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["f16", "bf16", "f64"])
@pytest.mark.parametrize("form", ["LoRA, linear", "LoCon, Tucker", "LoHa", "DoRA by outputs", "OFT"])
def test_numbers_are_the_stored_ones_whatever_their_dtype(tmp_path, form, dtype):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL, dtype=dtype)
    check(read_adapter(file.path, SMALL), file.expected)


@pytest.mark.parametrize("naming", ["kohya", "kohya, te1", "diffusers, peft", "generic"])
def test_a_text_encoder_of_stable_diffusion_2_has_the_same_names_and_one_layer_too_many(tmp_path, naming):
    text = dataclasses.replace(SMALL.clip, activation="gelu", layers=3)
    whole, used = (
        dataclasses.replace(SMALL, text=(dataclasses.replace(text, layers=n, skip=k),)) for n, k in ((3, 0), (3, 1))
    )
    file = write_adapter_file(tmp_path / "x.safetensors", naming, "LoRA, without alpha", whole)
    adapter = read_adapter(file.path, used)
    check(adapter, {path: found for path, found in file.expected.items() if path[:2] != ("text", "layer_2")})
    assert any("6 modules" in note for note in adapter.notes)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("text_model", [False, True])
def test_what_the_header_says_of_alpha_is_applied_to_each_module(tmp_path, rslora, text_model):
    file = write_described(tmp_path / "x.safetensors", SMALL, rslora=rslora, text_model=text_model)
    check(read_adapter(file.path, SMALL), file.expected)


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "attn1.to_q",
        r"(.*\.)?to_q",
        r"^(?:.*\.)?to_q$",
        "attn[12].to_q",
        r".*attn1\.to_(q|k)",
        f"^{Q_NAME}",
        Q_NAME,
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_pattern_of_alpha_is_a_name_or_an_expression_within_its_part(tmp_path, pattern, folder):
    if folder:
        file = write_peft_folder(tmp_path / "x", SMALL, "unet")
        said = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {pattern: 12}}
        (file.path / "adapter_config.json").write_text(json.dumps(said))
    else:
        file = write_described(tmp_path / "x.safetensors", SMALL)
        said = {"unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 12}}
        write_safetensors(file.path, file.tensors, metadata={"lora_adapter_metadata": json.dumps(said)})
    updates = read_adapter(file.path, SMALL).updates
    assert updates[Q_PATH].k == 12 / RANK
    assert updates[*Q_PATH[:-2], "out", "kernel"].k == 2 / RANK


@pytest.mark.parametrize("part", ["unet", "text"])
@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"adapter": ".default"}, {"pickled": True}], ids=str)
def test_a_peft_folder_takes_its_scale_from_the_json(tmp_path, part, how):
    file = write_peft_folder(tmp_path / "x", SMALL, part, **how)
    check(read_adapter(file.path, SMALL), file.expected)


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_the_magnitudes_of_peft_are_those_of_outputs_in_square_convolutions_too(tmp_path, adapter):
    file = write_peft_folder(tmp_path / "x", SMALL, "unet", dora=True, adapter=adapter)
    assert any(
        shape[0] == shape[1] and len(shape) == 4 for _, _, _, _, shape, *_ in (e.module for e in file.expected.values())
    )
    check(read_adapter(file.path, SMALL), file.expected)


def test_the_magnitudes_of_peft_in_a_file_by_diffusers_are_those_of_outputs(tmp_path):
    file = write_described(tmp_path / "x.safetensors", SMALL, dora=True)
    check(read_adapter(file.path, SMALL), file.expected)


def test_numbered_modules_come_down_then_up_then_in_the_middle(tmp_path):
    token = np.random.default_rng(5).standard_normal(64).astype(np.float32)
    file = write_numbered(tmp_path / "x.safetensors", SMALL, {"<s1>": token})
    adapter = read_adapter(file.path, SMALL)
    check(adapter, file.expected)
    np.testing.assert_array_equal(adapter.embeddings["<s1>"], token[None])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_list_of_tensors_is_the_unet_and_another_the_text_encoder(tmp_path, legacy):
    unet = write_listed(tmp_path / "x.pt", SMALL, "unet", legacy=legacy)
    check(read_adapter(unet.path, SMALL), unet.expected)
    (tmp_path / "text").mkdir()
    text = write_listed(tmp_path / "text" / "x.text_encoder.pt", SMALL, "text", legacy=legacy)
    check(read_adapter(text.path, SMALL), text.expected)


def test_a_bin_of_torch_is_read_as_a_safetensors(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "diffusers 0.11", "LoRA, without alpha", SMALL)
    torch.save({name: torch.from_numpy(array) for name, array in file.tensors.items()}, tmp_path / "x.bin")
    check(read_adapter(tmp_path / "x.bin", SMALL), file.expected)


@pytest.mark.parametrize("name", ["bundle_emb.frog.string_to_param.*", "bundle_emb.frog.clip_l"])
def test_embeddings_bundled_with_a_lora_come_with_it(tmp_path, name):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    vectors = np.random.default_rng(5).standard_normal((3, 64)).astype(np.float32)
    write_safetensors(file.path, file.tensors | {name: vectors})
    adapter = read_adapter(file.path, SMALL)
    check(adapter, file.expected)
    np.testing.assert_array_equal(adapter.embeddings["frog"], vectors)


def test_forms_and_ranks_may_differ_from_module_to_module(tmp_path):
    tensors, expected = {}, {}
    for n, form in enumerate(["LoRA, without alpha", "LoKr, both factored", "OFT", "full with bias", "norm"]):
        file = write_adapter_file(tmp_path / "part.safetensors", "kohya", form, SMALL, seed=n)
        for k, (path, found) in enumerate(file.expected.items()):
            if k % 4 == n or form == "norm":
                name = NAMINGS["kohya"].name
                tensors |= {name(found.module, end): array for end, array in found.tensors.items()}
                expected[path] = found
    write_safetensors(tmp_path / "x.safetensors", tensors)
    check(read_adapter(tmp_path / "x.safetensors", SMALL), expected)


def test_an_alpha_too_large_for_float16_is_of_no_account_where_nothing_is_divided_by_it(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoKr, both whole, alpha 1e10", SMALL)
    with np.errstate(over="ignore"):
        tensors = {name: array.astype(np.float16) for name, array in file.tensors.items()}
    assert np.isinf(tensors[f"{Q}.alpha"])
    write_safetensors(file.path, tensors)
    check(read_adapter(file.path, SMALL), file.expected, bar=1e-3)


def test_an_alpha_stored_as_an_integer_is_a_number(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    whole = {name: array.astype("i8") if name.endswith("alpha") else array for name, array in file.tensors.items()}
    write_safetensors(file.path, whole)
    check(read_adapter(file.path, SMALL), file.expected)


@pytest.mark.parametrize("form", ["LoRA, without alpha", "LoHa", "LoKr, second factored"])
def test_a_bias_beside_a_pair_is_changed_too_as_comfyui_extracts_it(tmp_path, params, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "generic", form, SMALL)
    found = next(found for found in file.expected.values() if found.module.bias is not None)
    bias = np.random.default_rng(5).standard_normal(found.module.shape[0]).astype(np.float32)
    name = NAMINGS["generic"].name(found.module, "diff_b")
    write_safetensors(file.path, file.tensors | {name: bias})
    adapter = read_adapter(file.path, SMALL)
    check(adapter, file.expected)
    assert adapter.updates[found.module.path].low_rank() is None
    before, after = (leaf_of(tree, found.module.bias) for tree in (params, merged(params, [(adapter, FULL)], SMALL)))
    assert error(after, before.astype(np.float64) + bias) < 1e-6


def test_one_half_of_a_loha_may_have_a_core_and_the_other_none(tmp_path):
    rng = np.random.default_rng(5)
    core, a1, b1, a2, b2 = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 1, 1), (2, 32), (2, 32), (32, 2), (2, 32))
    )
    plain = (a2.astype(np.float64) @ b2) * (a1.T.astype(np.float64) @ core[:, :, 0, 0] @ b1)
    halves = {1: {"hada_w1_a": a1, "hada_w1_b": b1, "hada_t1": core}, 2: {"hada_w2_a": a2, "hada_w2_b": b2}}
    swapped = {name.translate({49: 50, 50: 49}): array for half in halves.values() for name, array in half.items()}
    for own in (halves[1] | halves[2], swapped):
        write_safetensors(tmp_path / "x.safetensors", {f"{Q}.{name}": array for name, array in own.items()})
        (update,) = read_adapter(tmp_path / "x.safetensors", SMALL).updates.values()
        assert update.low_rank() is None
        assert error(update.change(np.zeros((32, 32), np.float32)), plain) < 1e-5


def test_an_alpha_of_zero_switches_a_module_off(tmp_path):
    pair = {f"{Q}.lora_down.weight": np.ones((2, 32), "f4"), f"{Q}.lora_up.weight": np.ones((32, 2), "f4")}
    for alpha in (np.zeros((), "f4"), np.zeros(1, "f4")):
        write_safetensors(tmp_path / "x.safetensors", pair | {f"{Q}.alpha": alpha})
        (update,) = read_adapter(tmp_path / "x.safetensors", SMALL).updates.values()
        assert not update.change(np.ones((32, 32), np.float32)).any()


def test_a_module_whose_up_is_still_zero_is_no_damage(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    tensors = {name: array * 0 if name.startswith(TEXT_Q) else array for name, array in file.tensors.items()}
    tensors[f"{TEXT_Q}.lora_down.weight"] = file.tensors[f"{TEXT_Q}.lora_down.weight"]
    write_safetensors(file.path, tensors)
    assert set(read_adapter(file.path, SMALL).updates) == set(file.expected)


def test_the_first_ranks_of_a_dylora_keep_their_scale(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    adapter = read_adapter(file.path, SMALL, rank_cut=1)
    for path, (module, _, tensors, *_) in file.expected.items():
        down, up = tensors["lora_down.weight"][:1], tensors["lora_up.weight"][:, :1]
        expected = up.astype(np.float64) @ down * float(tensors["alpha"]) / RANK
        assert error(adapter.updates[path].change(random_weight(module)), expected) < 1e-5


@pytest.mark.parametrize("ranks", [0, -1])
def test_less_than_one_rank_of_a_dylora_is_refused(tmp_path, ranks):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    with pytest.raises(ValueError, match=f"at least 1, found {ranks}"):
        read_adapter(file.path, SMALL, rank_cut=ranks)


def test_all_350_modules_of_stable_diffusion_1_are_found_by_their_published_names(tmp_path):
    with gzip.open(DATA / "lora_sd15_modules.tsv.gz", "rt") as file:
        rows = [line.split() for line in file.read().splitlines()[1:]]
    assert len(rows) == 350
    tensors, shapes, rng = {}, {}, np.random.default_rng(0)
    by_name = {f"{module.part}.{module.name}": module for module in modules(SD15)}
    for name, theirs, size in rows:
        shape = json.loads(size)
        part, _, own = theirs.removesuffix(".weight").partition("/")
        own = f"unet.{own}" if part == "unet" else f"text.{own.removeprefix('text_model.')}"
        shapes[by_name[own].path] = shape
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((1, *shape[1:])).astype("f2")
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((shape[0], 1, *[1] * len(shape[2:]))).astype("f2")
        tensors[f"{name}.alpha"] = np.ones((), "f2")
    write_safetensors(tmp_path / "x.safetensors", tensors)
    adapter = read_adapter(tmp_path / "x.safetensors", SD15)
    assert set(adapter.updates) == set(shapes)
    ours = {path: leaf.shape for path, leaf in leaves(abstract_params(SD15)).items()}
    for path, update in adapter.updates.items():
        down, up = update.low_rank()
        assert (*down.shape[:-1], up.shape[1]) == ours[path]


# What an update is


@pytest.mark.parametrize("form", LOW_RANK)
def test_the_factors_of_low_rank_multiply_to_the_change(tmp_path, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract_params(SMALL)).items()}
    for path, update in read_adapter(file.path, SMALL).updates.items():
        down, up = update.low_rank()
        assert down.dtype == up.dtype == np.float32
        assert down.shape == (*shapes[path][:-1], len(up))
        expected = to_leaf(file.expected[path].change(random_weight(file.expected[path].module)), shapes[path])
        assert error(down @ up, expected) < 1e-5


@pytest.mark.parametrize("form", sorted(set(FORMS) - set(LOW_RANK)))
def test_low_rank_is_refused_or_equals_the_change(tmp_path, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract_params(SMALL)).items()}
    reads_weight = FORMS[form].form in ("ia3", "oft", "glora") or "DoRA" in form
    for path, update in read_adapter(file.path, SMALL).updates.items():
        factors = update.low_rank()
        if factors is not None:
            assert not reads_weight
            assert file.expected[path].bias is None
            expected = to_leaf(file.expected[path].change(random_weight(file.expected[path].module)), shapes[path])
            assert error(factors[0] @ factors[1], expected) < 1e-5


# Merging


@pytest.mark.parametrize("form", FORMS)
def test_merging_adds_s_times_the_change_and_nothing_else(tmp_path, params, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL)
    before = leaves(params)
    copies = {path: leaf.copy() for path, leaf in before.items() if path in file.expected}
    after = leaves(merged(params, [(read_adapter(file.path, SMALL), Strength(0.7, -0.4))], SMALL))
    assert after.keys() == before.keys()
    changed = set()
    for path, (module, _, _, change, bias) in file.expected.items():
        s = 0.7 if path[0] == "unet" else -0.4
        weight = in_torch_layout(before[path], module.shape).astype(np.float64)
        expected = to_leaf(weight + s * change(weight), before[path].shape)
        assert after[path].dtype == before[path].dtype
        assert error(after[path], expected) < 1e-6, module.name
        changed.add(path)
        if bias is not None:
            assert error(after[module.bias], before[module.bias] + s * bias) < 1e-6
            changed.add(module.bias)
    assert all(after[path] is leaf for path, leaf in before.items() if path not in changed)
    assert all(np.array_equal(before[path], leaf) for path, leaf in copies.items())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
def test_the_sum_is_rounded_once_to_the_models_dtype(tmp_path, params, dtype):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "full", SMALL)
    low = {path: leaf.astype(dtype) for path, leaf in leaves(params).items()}
    tree = _tree(low)
    after = leaves(merged(tree, [(read_adapter(file.path, SMALL), Strength(1 / 3, 1 / 3))], SMALL))
    for path, (module, _, _, change, _) in file.expected.items():
        weight = in_torch_layout(low[path], module.shape).astype(np.float32)
        exact = weight + np.float32(1 / 3) * change(weight.astype(np.float64)).astype(np.float32)
        expected = to_leaf(exact, low[path].shape).astype(dtype)
        assert after[path].dtype == dtype
        assert np.mean(after[path] != expected) < 1e-3, module.name


def _tree(found):
    tree = {}
    for path, leaf in found.items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = leaf
    return tree


def test_several_adapters_add_up_each_worked_out_from_the_untouched_weights(tmp_path, params):
    forms = {"(IA)3 on inputs": 0.5, "DoRA by outputs": 0.25, "OFT": -0.75, "LoKr, both whole": 1.5}
    files = [write_adapter_file(tmp_path / f"{n}.safetensors", "kohya", form, SMALL) for n, form in enumerate(forms)]
    wanted = [(read_adapter(file.path, SMALL), Strength(s, s)) for file, s in zip(files, forms.values(), strict=True)]
    before = leaves(params)
    after = leaves(merged(params, wanted, SMALL))
    backwards = leaves(merged(params, wanted[::-1], SMALL))
    for path, (module, *_) in files[0].expected.items():
        weight = in_torch_layout(before[path], module.shape).astype(np.float64)
        changes = [s * file.expected[path].change(weight) for file, s in zip(files, forms.values(), strict=True)]
        expected = to_leaf(weight + sum(changes), before[path].shape)
        assert error(after[path], expected) < 1e-6
        assert error(backwards[path], after[path].astype(np.float64)) < 1e-6


@pytest.mark.parametrize("end", ["lora_B.bias", "lora_B.default.bias"])
def test_the_bias_that_peft_trains_with_a_pair_is_scaled_as_the_pair(tmp_path, params, end):
    module = next(module for module in modules(SMALL) if module.name.endswith("attn1.to_out.0"))
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(32).astype("f4")
    tensors = {"lora_A.weight": rng.standard_normal((4, 32)), "lora_B.weight": rng.standard_normal((32, 4))}
    if ".default" in end:
        tensors = {name.replace(".", ".default."): array for name, array in tensors.items()}
    named = {f"unet.{module.name}.{name}": array.astype("f4") for name, array in (tensors | {end: bias}).items()}
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.lora_bias": True})
    write_safetensors(tmp_path / "x.safetensors", named, metadata={"lora_adapter_metadata": said})
    after = merged(params, [(read_adapter(tmp_path / "x.safetensors", SMALL), Strength(0.5, 0.0))], SMALL)
    expected = leaf_of(params, module.bias) + 0.5 * 0.5 * bias.astype(np.float64)
    assert error(leaf_of(after, module.bias), expected) < 1e-6


def test_strength_zero_gives_the_plain_model_to_the_bit(tmp_path, params):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "DoRA by outputs", SMALL)
    after = leaves(merged(params, [(read_adapter(file.path, SMALL), Strength(0.0, 0.0))], SMALL))
    assert all(np.array_equal(after[path], leaf) for path, leaf in leaves(params).items())


# Strengths of blocks


WITH_LAYERS = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *(f"OUT{n:02}" for n in range(3, 12))]
EVERY_BLOCK = [*(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]


def block_of(module):
    """The block that a module of Stable Diffusion 1 counts to, by its CompVis name."""
    first, *rest = module.old.split(".")
    if module.part == "text":
        return "BASE"
    number = {"input_blocks": "IN", "output_blocks": "OUT"}.get(first)
    return f"{number}{int(rest[0]):02}" if number else "M00" if first == "middle_block" else None


@pytest.mark.parametrize(("blocks", "order"), [(17, WITH_LAYERS), (26, EVERY_BLOCK)])
def test_block_weights_are_counted_as_in_the_original_code(blocks, order):
    numbers = tuple(range(1, blocks + 1))
    assert len(order) + 1 == blocks
    by_block = dict(zip(["BASE", *order], numbers, strict=True))
    seen = set()
    for module in modules(SD15):
        block = block_of(module)
        if block in by_block and (blocks == 26 or block == "BASE" or "attentions" in module.name):
            own = 3.0 if module.part == "text" else 2.0
            assert strength_at(Strength(2.0, 3.0, numbers), module.path, SD15) == own * by_block[block], module.name
            seen.add(block)
    assert seen == set(by_block)


def test_without_block_weights_the_parts_have_their_own_strengths():
    strength = Strength(0.25, 0.75)
    assert {strength_at(strength, module.path, SMALL) for module in modules(SMALL) if module.part == "unet"} == {0.25}
    assert {strength_at(strength, module.path, SMALL) for module in modules(SMALL) if module.part == "text"} == {0.75}


def test_another_number_of_block_weights_is_refused():
    with pytest.raises(ValueError, match=r"5 block weights.*17"):
        strength_at(Strength(1.0, 1.0, (1.0,) * 5), ("unet", "conv_in", "kernel"), SD15)


# Writing


@pytest.mark.parametrize("form", FORMS)
def test_what_kohya_wrote_is_written_again_bit_by_bit(tmp_path, form):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", form, SMALL, dtype=ml_dtypes.bfloat16)
    write_adapter(tmp_path / "y.safetensors", read_adapter(file.path, SMALL), SMALL)
    with open_source(tmp_path / "y.safetensors") as source:
        assert set(source.tensors) == set(file.tensors)
        for name, array in file.tensors.items():
            found = source.read(name)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
        assert source.metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("naming", sorted(set(NAMINGS) - {"kohya"}))
def test_any_naming_is_written_in_kohyas_with_the_same_bits(tmp_path, naming):
    form = NAMINGS[naming].forms[0]
    file = write_adapter_file(tmp_path / "x.safetensors", naming, form, SMALL, dtype=ml_dtypes.bfloat16)
    write_adapter(tmp_path / "y.safetensors", read_adapter(file.path, SMALL), SMALL)
    kohya = NAMINGS["kohya"].name
    expected = {
        kohya(found.module, end): array for found in file.expected.values() for end, array in found.tensors.items()
    }
    with open_source(tmp_path / "y.safetensors") as source:
        assert set(expected) == set(source.tensors)
        assert all(source.read(name).tobytes() == array.tobytes() for name, array in expected.items())
    check(read_adapter(tmp_path / "y.safetensors", SMALL), file.expected)


@pytest.mark.parametrize("how", [{}, {"rslora": True}, {"dora": True}], ids=str)
def test_what_only_peft_knows_is_in_the_tensors_once_written(tmp_path, how):
    file = write_described(tmp_path / "x.safetensors", SMALL, **how)
    write_adapter(tmp_path / "y.safetensors", read_adapter(file.path, SMALL), SMALL)
    check(read_adapter(tmp_path / "y.safetensors", SMALL), file.expected)
    with open_source(tmp_path / "y.safetensors") as source:
        assert f"{Q}.alpha" in source.tensors
        assert "lora_adapter_metadata" not in source.metadata
        for name, (_, shape) in source.tensors.items():
            out = source.tensors[name.replace("dora_scale", "lora_up.weight")].shape
            assert not name.endswith("dora_scale") or shape == (out[0], *[1] * (len(out) - 1))


def test_embeddings_are_written_with_their_adapter(tmp_path):
    token = np.random.default_rng(5).standard_normal((2, 64)).astype(np.float32)
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    adapter = dataclasses.replace(read_adapter(file.path, SMALL), embeddings={"frog": token})
    write_adapter(tmp_path / "y.safetensors", adapter, SMALL)
    again = read_adapter(tmp_path / "y.safetensors", SMALL)
    np.testing.assert_array_equal(again.embeddings["frog"], token)
    check(again, file.expected)


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    adapter = read_adapter(file.path, SMALL)
    (tmp_path / "y.safetensors").write_text("mine")
    with pytest.raises(FileExistsError):
        write_adapter(tmp_path / "y.safetensors", adapter, SMALL)
    assert (tmp_path / "y.safetensors").read_text() == "mine"
    write_adapter(tmp_path / "y.safetensors", adapter, SMALL, force=True)
    check(read_adapter(tmp_path / "y.safetensors", SMALL), file.expected)


# Extracting


def tuned_by(params, form, folder, seed=3):
    """(the file, the parameters with it merged)."""
    file = write_adapter_file(folder / f"{seed}.safetensors", "kohya", form, SMALL, seed=seed)
    return file, merged(params, [(read_adapter(file.path, SMALL), FULL)], SMALL)


@pytest.mark.parametrize("form", ["LoRA, linear", "LoCon", "LoRA, 1x1 convolution"])
def test_the_difference_of_two_models_gives_the_low_rank_adapter_back(tmp_path, params, form):
    file, tuned = tuned_by(params, form, tmp_path)
    adapter = extract(params, tuned, SMALL, rank=RANK)
    write_adapter(tmp_path / "y.safetensors", adapter, SMALL)
    check(read_adapter(tmp_path / "y.safetensors", SMALL), file.expected, bar=1e-4)


def test_extraction_of_less_rank_keeps_the_largest_singular_values(tmp_path, params):
    file, tuned = tuned_by(params, "full", tmp_path)
    adapter = extract(params, tuned, SMALL, rank=3)
    for path, (module, _, tensors, *_) in file.expected.items():
        values = np.linalg.svd(tensors["diff"].reshape(module.shape[0], -1).astype(np.float64), compute_uv=False)
        best = np.sqrt(np.sum(values[3:] ** 2))
        found = adapter.updates[path].change(random_weight(module))
        assert np.linalg.norm(found - tensors["diff"]) < best * 1.001 + 1e-5, module.name


def test_extraction_may_leave_out_convolutions(tmp_path, params):
    file, tuned = tuned_by(params, "full", tmp_path)
    found = extract(params, tuned, SMALL, rank=2, convolutions=False).updates
    convolutions = {path for path in file.expected if leaf_of(params, path).ndim == 4}
    assert convolutions
    assert set(found) == set(file.expected) - convolutions


def test_two_equal_models_give_no_adapter(params):
    with pytest.raises(ValueError, match=r"differ|same|equal|change"):
        extract(params, params, SMALL, rank=2)


# What is refused


def pair(module, out, inner, rank=2, **others):
    """The two tensors of a LoRA."""
    rng = np.random.default_rng(0)
    found = {
        f"{module}.lora_down.weight": rng.standard_normal((rank, inner)).astype("f4"),
        f"{module}.lora_up.weight": rng.standard_normal((out, rank)).astype("f4"),
    }
    return found | {f"{module}.{end}": array for end, array in others.items()}


GOOD = pair(Q, 32, 32)
K = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
SD1_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
NAN = np.array([[np.nan] * 32] * 2, "f4")
NORM = "lora_unet_down_blocks_0_attentions_0_norm"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def ones(module, **shapes):
    """Tensors of ones by their endings."""
    return {f"{module}.{end}": np.ones(shape, "f4") for end, shape in shapes.items()}


LOHA = {f"hada_w{n}_{x}": shape for n in (1, 2) for x, shape in (("a", (2, 32)), ("b", (2, 64)))}
LOKR_T = {"lokr_w1": (4, 2), "lokr_w2_a": (2, 8)}

REFUSED = {
    "SDXL's text encoder": (GOOD | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 5120, 1280), "SDXL"),
    "SDXL's UNet": (pair(K, 640, 2048), "SDXL"),
    "another width": (pair(SD1_K, 320, 1024), r"attn2_to_k.*1024"),
    "no module is known": (pair("lora_unet_something_else", 32, 32), "something_else"),
    "some modules are unknown": (
        GOOD | {k: v for n in range(3) for k, v in pair(f"lora_unet_something_{n}", 8, 8).items()},
        r"\b3\b.*something",
    ),
    "down alone": ({f"{Q}.lora_down.weight": GOOD[f"{Q}.lora_down.weight"]}, "to_q.*lora_up"),
    "up alone": (pair(TEXT_Q, 64, 64) | {f"{Q}.lora_up.weight": GOOD[f"{Q}.lora_up.weight"]}, "to_q.*lora_down"),
    "alpha alone": (pair(TEXT_Q, 64, 64) | {f"{Q}.alpha": np.ones((), "f4")}, "to_q.*alpha"),
    "half a LoHa": ({f"{Q}.hada_w1_a": np.ones((32, 2), "f4"), f"{Q}.hada_w1_b": np.ones((2, 32), "f4")}, "hada_w2"),
    "half a LoKr": ({f"{Q}.lokr_w1": np.ones((4, 2), "f4")}, "lokr_w2"),
    "DoRA's scale alone": ({f"{Q}.dora_scale": np.ones((32, 1), "f4")}, "to_q"),
    "NaN": (GOOD | {f"{Q}.lora_down.weight": NAN}, "lora_down.*NaN"),
    "infinite": (
        GOOD | {f"{Q}.lora_down.weight": np.full((2, 32), np.inf, "f4")},
        "inf",
    ),
    "an alpha that is NaN": (GOOD | {f"{Q}.alpha": np.array(np.nan, "f4")}, "alpha"),
    "ranks that disagree": (GOOD | {f"{Q}.lora_up.weight": np.ones((32, 3), "f4")}, "to_q.*lora_up"),
    "a DoRA scale of another size": (GOOD | {f"{Q}.dora_scale": np.ones((31, 1), "f4")}, "dora_scale"),
    "a rank of 0": (pair(Q, 32, 32, rank=0), "to_q"),
    "a DoRA scale of inputs that lies like one of outputs": (
        pair(SD1_K, 32, 64, dora_scale=np.ones((64, 1), "f4")),
        "dora_scale",
    ),
    "(IA)3 of inputs that says outputs": (ones(SD1_K, weight=64) | {f"{SD1_K}.on_input": np.array(False)}, "weight"),
    "(IA)3 of outputs that says inputs": (ones(SD1_K, weight=32) | {f"{SD1_K}.on_input": np.array(True)}, "weight"),
    "a Tucker core of two axes": (pair(SD1_K, 32, 64, **{"lora_mid.weight": np.ones((2, 2), "f4")}), "lora_mid"),
    "a LoHa's core of two axes": (ones(SD1_K, **LOHA, hada_t1=(2, 2), hada_t2=(2, 2)), "hada_t1"),
    "a LoKr's core of two axes": (ones(SD1_K, **LOKR_T, lokr_w2_b=(2, 32), lokr_t2=(2, 2)), "lokr_t2"),
    "a LoKr's core of another kernel": (ones(CONV, **LOKR_T, lokr_w2_b=(2, 16), lokr_t2=(2, 2, 1, 1)), "factors"),
    "a LoKr that cuts kernels apart": (ones(CONV, lokr_w1=(4, 9), lokr_w2=(8, 32)), "lokr_w1.*divide"),
    "a LoKr of a norm": (ones(NORM, lokr_w1=(4, 1), lokr_w2=(8, 1)), "norm"),
    "a norm's change of a matrix": (ones(SD1_K, w_norm=32), "w_norm"),
    "an OFT whose rescaling has another size": (ones(SD1_K, oft_blocks=(8, 4, 4), rescale=7), "rescale"),
    "an OFT whose constraint is NaN": (
        ones(SD1_K, oft_blocks=(8, 4, 4)) | {f"{SD1_K}.alpha": np.array(np.nan, "f4")},
        "alpha.*NaN",
    ),
    "two names of one tensor": (GOOD | {f"{Q}.lora_A.weight": np.ones((2, 32), "f4")}, "same tensor"),
    "a scalar for a factor": (GOOD | {f"{Q}.lora_down.weight": np.ones((), "f4")}, "lora_down"),
    "zeros all over": ({k: v * 0 for k, v in GOOD.items()}, "zero"),
    "no tensors": ({}, "no tensors|no adapter|empty"),
    "integers": (GOOD | {f"{Q}.lora_down.weight": np.ones((2, 32), "i4")}, "lora_down.*I32"),
    "BOFT": ({f"{Q}.oft_blocks": np.ones((2, 8, 4, 4), "f4"), f"{Q}.alpha": np.ones((), "f4")}, "BOFT"),
    "OFT's blocks of another size": ({f"{Q}.oft_blocks": np.ones((5, 4, 4), "f4")}, "to_q.*blocks"),
    "a sparse bias": (GOOD | {f"{Q}.bias_values": np.ones(3, "f4")}, "bias"),
    "two names of one module": (
        GOOD | pair(Q.replace("down_blocks_0_attentions_0", "input_blocks_1_1"), 32, 32),
        "same",
    ),
    "an embedding": ({"emb_params": np.ones((2, 64), "f4")}, "emb_params"),
    "a checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": np.ones((32, 4, 3, 3), "f4")}, "input_blocks"),
    "a ControlNet": ({"control_model.zero_convs.0.0.weight": np.ones((32, 32, 1, 1), "f4")}, "ControlNet"),
}


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_adapter(path, SMALL)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < len(str(path)) + 500
    return text.removeprefix(str(path))


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_cannot_be_applied_is_refused_in_one_line_that_says_why(tmp_path, what):
    tensors, reason = REFUSED[what]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    text = refusal(tmp_path / "x.safetensors")
    assert re.search(reason, text), text


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"<html>", b"\x80\x04K\x01."], ids=["empty", "zeros", "web", "pickle"]
)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refusal(tmp_path / "x.safetensors")


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    file = write_adapter_file(tmp_path / "x.safetensors", "kohya", "LoRA, linear", SMALL)
    whole = file.path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        file.path.write_bytes(whole[:size])
        refusal(file.path)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_adapter(tmp_path / "nothing.safetensors", SMALL)


def test_a_hypernetwork_is_refused_by_name(tmp_path):
    layers = {"linear.0.weight": torch.ones(128, 64), "linear.0.bias": torch.ones(128)}
    torch.save({64: [layers, layers], "layer_structure": [1, 2, 1], "name": "x", "step": 1}, tmp_path / "small.pt")
    torch.save({768: [layers, layers], "layer_structure": [1, 2, 1], "name": "x", "step": 1}, tmp_path / "x.pt")
    assert "hypernetwork" in refusal(tmp_path / "x.pt")
    refusal(tmp_path / "small.pt")


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_never_run(tmp_path, legacy):
    marker = tmp_path / "run"
    listed = [torch.ones(32, 4), torch.ones(4, 32), Hostile(marker)]
    torch.save(listed, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    refusal(tmp_path / "x.pt")
    assert not marker.exists()


def test_a_list_of_another_length_is_refused(tmp_path):
    file = write_listed(tmp_path / "x.pt", SMALL, "unet")
    torch.save([torch.from_numpy(array) for array in file.tensors.values()][:-2], file.path)
    refusal(file.path)
    torch.save([torch.from_numpy(array) for array in file.tensors.values()][:-1], file.path)
    refusal(file.path)


def test_numbers_that_no_module_has_are_refused(tmp_path):
    file = write_numbered(tmp_path / "x.safetensors", SMALL)
    extra = {"unet:99:up": np.ones((32, 4), "f4"), "unet:99:down": np.ones((4, 32), "f4")}
    metadata = {"unet": '["CrossAttention", "Attention", "GEGLU"]'}
    write_safetensors(file.path, file.tensors | extra, metadata=metadata)
    assert "99" in refusal(file.path)
    without = {name: array for name, array in file.tensors.items() if name != "unet:3:up"}
    write_safetensors(file.path, without, metadata=metadata)
    assert "lora_up" in refusal(file.path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}'), "LOHA"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    ],
    ids=["no json", "half a json", "another type", "no tensors"],
)
def test_a_peft_folder_that_is_not_whole_is_refused(tmp_path, change, reason):
    file = write_peft_folder(tmp_path / "x", SMALL, "unet")
    change(file.path)
    assert reason in refusal(file.path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", '{"unet.r": 4, "unet.lora_alpha": "much"}', '{"unet.lora_alpha": 1e999}'),
        '{"unet.lora_alpha": 2, "unet.alpha_pattern": [1]}',
        json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"(([a-z0-9_.])*)*!": 3}}),
        json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"a?" * 40: 3}}),
    ],
)
def test_a_header_that_does_not_describe_an_adapter_is_refused_or_left_aside(tmp_path, text):
    file = write_described(tmp_path / "x.safetensors", SMALL)
    write_safetensors(file.path, file.tensors, metadata={"lora_adapter_metadata": text})
    if text == "[1]":
        assert read_adapter(file.path, SMALL).updates
    else:
        refusal(file.path)
