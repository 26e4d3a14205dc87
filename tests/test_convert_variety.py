"""Good files are taken however they were written; wrong ones are called what they are, in one line."""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import convert
import sdjax
from convert.__main__ import main
from convert.detect import CONFIG_KEY
from convert.diffusers import needed_files
from convert.files.open import open_source
from convert.files.source import CheckpointError
from convert.names import ema_name
from convert.write import write_diffusers, write_safetensors
from sdjax.models.params import random_params
from tests.checkpoint_files import write_ckpt, write_raw_safetensors
from tests.checkpoint_files import write_safetensors as write_raw
from tests.small import MINI

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
MODEL = dataclasses.replace(
    MINI,
    vae=dataclasses.replace(MINI.vae, channels=(8, 16)),
    unet=dataclasses.replace(MINI.unet, channels=(16, 32), transformer_layers=(1, 0), heads=(2, 2)),
)
OPENCLIP = dataclasses.replace(
    MODEL,
    name="mini-2",
    text=(dataclasses.replace(MODEL.clip, layers=2, activation="gelu", skip=1, projection=16, pad_token=0),),
    unet=dataclasses.replace(MODEL.unet, linear_projection=True),
    schedule=dataclasses.replace(MODEL.schedule, prediction="v"),
)
SAID = {CONFIG_KEY: MODEL.to_json()}


@cache
def whole(config=MODEL):
    """The model as a single file has it: original name -> numpy array."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.safetensors"
        write_safetensors(path, config, random_params(config))
        with open_source(path) as source:
            return {name: source.read(name) for name in source.tensors}


def read_file(folder, tensors, config=MODEL, **options):
    """The converted file of these tensors, as people's programs write it, without a word of ours."""
    write_raw(folder / "m.safetensors", tensors)
    return convert.read(folder / "m.safetensors", config=config, **options)


def assert_same(found, expected):
    """Equal trees of equal bits."""
    assert jax.tree.structure(found) == jax.tree.structure(dict(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def part(prefix, tensors=None):
    """The tensors of a part, by their names without the prefix."""
    return {n.removeprefix(prefix): a for n, a in (tensors or whole()).items() if n.startswith(prefix)}


def refused(capsys, *arguments):
    """What the command says of this, in one line, and nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.removeprefix("sdjax-convert: error: ")
    assert line != captured.err
    assert line.count("\n") == 1
    assert line.strip().isprintable()
    assert "fault of sdjax-convert" not in line
    return line.strip()


SOME = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a diffusers folder."""
    path = tmp_path_factory.mktemp("mini") / "mini"
    write_diffusers(path, MODEL, random_params(MODEL))
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


# Shapes and spellings


@SOME
@given(seed=st.integers(0, 2**32))
def test_axes_of_length_one_make_no_difference(tmp_path, seed):
    rng = np.random.default_rng(seed)

    def odd(array):
        sizes = [n for n in array.shape if n != 1]
        for _ in range(rng.integers(4)):
            sizes.insert(rng.integers(len(sizes) + 1), 1)
        return array.reshape(sizes)

    tensors = {name: odd(array) for name, array in whole().items()}
    assert_same(read_file(tmp_path, tensors).params, random_params(MODEL))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8), (8, 1), (1, 1, 1, 8)])
def test_biases_of_exporters_are_taken(tmp_path, shape):
    names = [name for name, array in whole().items() if array.shape == (8,)]
    assert len(names) > 20
    tensors = whole() | {name: whole()[name].reshape(shape) for name in names}
    assert_same(read_file(tmp_path, tensors).params, random_params(MODEL))


def test_other_shapes_of_the_same_size_are_refused(tmp_path):
    name = UNET + "time_embed.0.weight"
    for wrong in (whole()[name].T.copy(), whole()[name].reshape(-1), whole()[name].reshape(2, -1, 16)):
        with pytest.raises(CheckpointError, match=r"1 tensor of the wrong shape or kind: .*time_embed\.0"):
            read_file(tmp_path, whole() | {name: wrong})


RENAMES = (
    (r"^(first_stage_model\.\w+)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^(first_stage_model\.\w+)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(first_stage_model\.\w+)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(first_stage_model\.encoder)\.down\.0\.block\.", r"\1.down_blocks.0.resnets."),
    (r"^(first_stage_model\.encoder)\.down\.0\.downsample\.conv\.", r"\1.down_blocks.0.downsamplers.0.conv."),
    (r"^(first_stage_model\.decoder)\.up\.0\.block\.", r"\1.up_blocks.1.resnets."),
    (r"^(first_stage_model\.decoder)\.up\.1\.block\.", r"\1.up_blocks.0.resnets."),
    (r"^(first_stage_model\.decoder)\.up\.1\.upsample\.", r"\1.up_blocks.0.upsamplers.0."),
    (r"input_blocks\.2\.0\.op\.", "down_blocks.0.downsamplers.0.conv."),
    (r"output_blocks\.1\.1\.conv\.", "up_blocks.0.upsamplers.0.conv."),
    (r"^(first_stage_model\.\w+\.mid.*)\.q\.", r"\1.to_q."),
    (r"^(first_stage_model\.\w+\.mid.*)\.k\.", r"\1.key."),
    (r"^(first_stage_model\.\w+\.mid.*)\.v\.", r"\1.value."),
    (r"^(first_stage_model\.\w+\.mid.*)\.proj_out\.", r"\1.to_out.0."),
    (r"^(first_stage_model\.\w+\.mid.*)\.(?:proj_out|to_out\.0)\.", r"\1.proj_attn."),
    (r"^(first_stage_model\.\w+\.mid.*)(\.attn_1|attentions\.0)\.norm\.", r"\1\2.group_norm."),
    (r"^(first_stage_model\.\w+)\.norm_out\.", r"\1.conv_norm_out."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"^(model\.diffusion_model)\.input_blocks\.0\.0\.", r"\1.conv_in."),
    (r"^(model\.diffusion_model)\.input_blocks\.1\.0\.", r"\1.down_blocks.0.resnets.0."),
    (r"^(model\.diffusion_model)\.input_blocks\.1\.1\.", r"\1.down_blocks.0.attentions.0."),
    (r"^(model\.diffusion_model)\.middle_block\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(model\.diffusion_model)\.middle_block\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(model\.diffusion_model)\.output_blocks\.1\.0\.", r"\1.up_blocks.0.resnets.1."),
    (r"in_layers\.0\.", "norm1."),
    (r"in_layers\.2\.", "conv1."),
    (r"emb_layers\.1\.", "time_emb_proj."),
    (r"out_layers\.0\.", "norm2."),
    (r"out_layers\.3\.", "conv2."),
    (r"skip_connection\.", "conv_shortcut."),
    (r"time_embed\.", "time_embedding."),
    (r"time_embed(ding)?\.0\.", r"time_embed\1.linear_1."),
    (r"^(model\.diffusion_model)\.out\.0\.", r"\1.conv_norm_out."),
    (r"^(model\.diffusion_model)\.out\.2\.", r"\1.conv_out."),
    (r"transformer\.text_model\.", "transformer."),
    (r"transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.(?=out_proj|in_proj)", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"model\.token_embedding\.weight$", "model.embeddings.token_embedding.weight"),
)
"""What exporters have renamed and left, each without regard to the others."""


@pytest.mark.parametrize("config", [MODEL, OPENCLIP], ids=["sd1", "sd2"])
def test_the_renames_meet_names(config):
    met = [pattern for pattern, _ in RENAMES if any(re.search(pattern, name) for name in whole(config))]
    assert len(met) > 25


@pytest.mark.parametrize("config", [MODEL, OPENCLIP], ids=["sd1", "sd2"])
@SOME
@given(seed=st.integers(0, 2**32), often=st.sampled_from([0.1, 0.5, 0.9]))
def test_every_tensor_may_come_in_any_spelling_whatever_the_others_use(tmp_path, config, seed, often):
    rng = np.random.default_rng(seed)

    def renamed(name):
        for pattern, by in RENAMES:
            if rng.random() < often:
                name = re.sub(pattern, by, name)
        return name

    tensors = {renamed(name): array for name, array in whole(config).items()}
    assert len(tensors) == len(whole(config))
    assert_same(read_file(tmp_path, tensors, config).params, random_params(config))


@pytest.mark.parametrize("rename", RENAMES, ids=str)
def test_one_rename_alone_is_taken(tmp_path, rename):
    config = MODEL if any(re.search(rename[0], name) for name in whole()) else OPENCLIP
    tensors = {re.sub(*rename, name): array for name, array in whole(config).items()}
    assert set(tensors) != set(whole(config))
    write_raw(tmp_path / "m.safetensors", tensors)
    assert convert.inspect(tmp_path / "m.safetensors", config=config)[1].complete


@pytest.mark.parametrize(
    ("unet", "vae", "text"),
    [
        ("unet.", "vae.", "text_encoder.text_model."),
        ("diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."),
        ("module.model.diffusion_model.", "module.first_stage_model.", "module.cond_stage_model.transformer."),
        ("", "vae.", "te.text_model."),
        ("model.diffusion_model.", "", "text_model."),
    ],
)
def test_prefixes_are_found_by_what_they_stand_before(tmp_path, unet, vae, text):
    tensors = {}
    for old, new in ((UNET, unet), (VAE, vae), (TEXT, text)):
        tensors |= {new + name: array for name, array in part(old).items()}
    assert_same(read_file(tmp_path, tensors).params, random_params(MODEL))


def test_identical_copies_are_accepted_and_different_ones_are_named(tmp_path, capsys):
    name, other = VAE + "decoder.mid.attn_1.q.bias", VAE + "decoder.mid_block.attentions.0.query.bias"
    same = whole() | {other: whole()[name]}
    converted = read_file(tmp_path, same)
    assert_same(converted.params, random_params(MODEL))
    assert converted.report.ignored == {other: f"the same numbers as {name}"}
    write_raw(tmp_path / "two.safetensors", same | {other: whole()[name] + 1}, metadata=SAID)
    line = refused(capsys, tmp_path / "two.safetensors", tmp_path / "out")
    assert f"two names for one thing, {name} and {other}" in line
    option = re.search(r"--ignore \S+", line)[0].split()
    assert main([str(tmp_path / "two.safetensors"), str(tmp_path / "out"), *option]) == 0


def test_copies_in_another_shape_or_stacked_are_copies(tmp_path):
    bias = VAE + "decoder.mid.attn_1.q.bias"
    other = {VAE + "decoder.mid_block.attentions.0.to_q.bias": whole()[bias].reshape(-1, 1, 1)}
    kernel = VAE + "decoder.mid.attn_1.q.weight"
    other[VAE + "decoder.mid_block.attentions.0.to_q.weight"] = whole()[kernel].squeeze()
    converted = read_file(tmp_path, whole() | other)
    assert_same(converted.params, random_params(MODEL))
    assert set(converted.report.ignored) == set(other)
    stacked = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    pieces = dict(zip("qkv", np.split(whole(OPENCLIP)[stacked], 3), strict=True))
    names = {x: f"cond_stage_model.model.transformer.resblocks.0.self_attn.{x}_proj.bias" for x in "qkv"}
    apart = {names[x]: pieces[x] for x in "qkv"}
    for tensors in (apart | whole(OPENCLIP), whole(OPENCLIP) | apart):
        assert_same(read_file(tmp_path, tensors, OPENCLIP).params, random_params(OPENCLIP))
    for wrong in (apart | {names["k"]: pieces["q"]}, {names["q"]: pieces["q"] + 1}):
        with pytest.raises(CheckpointError, match="two names for one thing"):
            read_file(tmp_path, whole(OPENCLIP) | wrong, OPENCLIP)


# What is not needed is no reason


def odd_tensors():
    """Tensors that no network could use."""
    return {
        "int64, no axes": torch.tensor(3),
        "empty": torch.zeros(0),
        "empty, two axes": torch.zeros(0, 7),
        "bool": torch.ones(3, dtype=torch.bool),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "without numbers": torch.ones(3, device="meta"),
        "sixteen axes": torch.ones((1,) * 16),
        "NaN": torch.full((3,), torch.nan),
    }


NOT_USED = (
    "first_stage_model.loss.logvar",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "model_ema.num_updates",
    "safety_checker.concept_embeds",
    "lora_unet_mid_block.alpha",
    "scale_factor",
    "betas",
    "first_stage_model.encoder.anything",
    "stray.whatever",
)


NOT_IN_LEGACY = ("without numbers", "float8")  # torch does not read them back from that format


@pytest.mark.parametrize(
    ("kind", "legacy"),
    [(kind, False) for kind in odd_tensors()] + [(kind, True) for kind in odd_tensors() if kind not in NOT_IN_LEGACY],
)
def test_odd_tensors_that_are_not_needed_are_passed_over(tmp_path, kind, legacy):
    state = {name: torch.from_numpy(np.array(array)) for name, array in whole().items()}
    state = {name: odd_tensors()[kind] for name in NOT_USED} | state
    torch.save(state, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    write_raw(tmp_path / "vae.safetensors", part(VAE))
    options = dict(vae=tmp_path / "vae.safetensors", ignore=["stray.*"], config=MODEL)
    converted = convert.read(tmp_path / "m.ckpt", **options)
    assert_same(converted.params, random_params(MODEL))
    assert set(converted.report.ignored) >= set(NOT_USED)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "NF4", "float32", "F6_E2M3"])
def test_unknown_dtypes_matter_only_where_the_tensor_is_needed(tmp_path, capsys, dtype):
    write_raw(tmp_path / "plain.safetensors", whole(), metadata=SAID)
    data = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
    end = len(numbers)
    more = {name: {"dtype": dtype, "shape": [3], "data_offsets": [end, end]} for name in NOT_USED[:7]}
    write_raw_safetensors(tmp_path / "m.safetensors", header | more, numbers)
    assert_same(convert.read(tmp_path / "m.safetensors").params, random_params(MODEL))
    name = UNET + "out.0.bias"
    header[name]["dtype"] = dtype
    write_raw_safetensors(tmp_path / "m.safetensors", header, numbers)
    line = refused(capsys, tmp_path / "m.safetensors", tmp_path / "out")
    assert name in line
    assert dtype in line


STRAY = (
    "optimizer_states.0.state.0.exp_avg",
    "optimizer.state.0.exp_avg_sq",
    "lr_schedulers.0.last",
    "callbacks.x",
    "global_step",
    "epoch",
    "loss.discriminator.main.0.weight",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "control_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.alpha",
    "string_to_param.*",
    "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.logit_scale",
    "alphas_cumprod",
    "posterior_variance",
    "model_ema.decay",
    "embedding_manager.string_to_param_dict.x",
    "v_pred",
    "edm_vpred.sigma_max",
)


def test_training_leftovers_are_passed_over_and_named(tmp_path):
    for name in STRAY:
        converted = read_file(tmp_path, {name: np.ones((2, 3), "f4")} | whole())
        assert_same(converted.params, random_params(MODEL))
        assert set(converted.report.ignored) == {name}, name


@pytest.mark.parametrize("lightning", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_training_files_with_everything_in_them_are_read(tmp_path, lightning, legacy):
    state = {name: torch.from_numpy(np.array(array)) for name, array in whole().items()}
    optimizer = {"state": {i: {"step": 3, "exp_avg": torch.ones(2)} for i in range(3)}, "param_groups": [{"lr": 1e-4}]}
    beside = {"optimizer": optimizer, "optimizer_states": [optimizer], "global_step": 7, "loops": None, "amp": {}}
    wrapped = {"state_dict": state, **beside} if lightning else {"model": {"state_dict": state}}
    torch.save(wrapped, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert_same(convert.read(tmp_path / "m.pt", config=MODEL).params, random_params(MODEL))


def test_names_that_nobody_knows_are_named_with_the_option_that_helps(tmp_path, capsys):
    write_raw(tmp_path / "m.safetensors", whole() | {"my notes": np.zeros(2, "f4")}, metadata=SAID)
    line = refused(capsys, tmp_path / "m.safetensors", tmp_path / "out")
    assert "1 tensor unexpected: my notes; what is not needed is left out by --ignore 'my notes'" in line
    assert main([str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--ignore", "my notes"]) == 0


# Moving averages


def averages(change=0, prefix="", dots=False):
    """The UNet's averages, as training files name them."""
    names = {name: "model_ema.diffusion_model." + name if dots else ema_name(name) for name in part(UNET)}
    return {prefix + names[name]: array + np.float32(change) for name, array in part(UNET).items()}


@pytest.mark.parametrize("prefix", ["", "module.", "state."])
@pytest.mark.parametrize("dots", [False, True])
def test_averages_are_taken_where_there_is_nothing_else(tmp_path, capsys, prefix, dots):
    rest = {name: array for name, array in whole().items() if not name.startswith(UNET)}
    converted = read_file(tmp_path, rest | averages(prefix=prefix, dots=dots))
    assert_same(converted.params, random_params(MODEL))
    assert any("no plain weights; the averages were taken" in note for note in converted.report.notes)
    line = refused(
        capsys,
        tmp_path / "m.safetensors",
        tmp_path / "out",
        *("--ema", "no"),
        *("--config", _json_of(tmp_path)),
    )
    assert "no plain weights; use --ema yes to take them" in line


def _json_of(folder):
    (folder / "mini.json").write_text(MODEL.to_json())
    return folder / "mini.json"


def test_averages_beside_plain_weights_are_taken_when_all_are_there(tmp_path):
    plain = random_params(MODEL)["unet"]
    both = whole() | averages(1)
    assert_same(read_file(tmp_path, both, ema="no").params["unet"], plain)
    changed = jax.tree.map(lambda leaf: leaf + np.float32(1), plain)
    assert_same(read_file(tmp_path, both).params["unet"], changed)
    fewer = dict(list(both.items())[:-1])
    converted = read_file(tmp_path, fewer)
    assert_same(converted.params["unet"], plain)
    count = len(part(UNET))
    note = f"the file holds {count - 1} of {count} moving averages (EMA) of the UNet; the plain weights were taken"
    assert note in converted.report.notes


def test_averages_that_cannot_be_used_are_not_taken(tmp_path):
    for odd in (np.zeros(3, "i8"), np.zeros(0, "f4"), np.ones((2, 2), "f4")):
        spoilt = averages(1)
        spoilt[list(spoilt)[5]] = odd
        assert_same(read_file(tmp_path, whole() | spoilt).params, random_params(MODEL))


def test_half_of_the_averages_alone_is_not_enough(tmp_path):
    rest = {name: array for name, array in whole().items() if not name.startswith(UNET)}
    with pytest.raises(CheckpointError, match=r"missing: unet model_ema\.diffusion_model"):
        read_file(tmp_path, rest | dict(list(averages().items())[::2]))


# Replaced parts


@SOME
@given(seed=st.integers(0, 2**32))
def test_what_remains_of_a_replaced_autoencoder_is_replaced(tmp_path, seed):
    rng = np.random.default_rng(seed)
    keep = rng.random()
    remains = {}
    for name, array in part(VAE).items():
        if rng.random() < keep:
            for pattern, by in RENAMES:
                name = re.sub(pattern, by, VAE + name).removeprefix(VAE) if rng.random() < 0.5 else name
            remains[str(rng.choice([VAE, "vae."])) + name] = array
    remains[VAE + "quantize.embedding.weight"] = np.zeros((3, 2), "i8")
    rest = {name: array for name, array in whole().items() if not name.startswith(VAE)}
    vae = {name: 2 * array for name, array in part(VAE).items()}
    write_raw(tmp_path / "vae.safetensors", vae)
    converted = read_file(tmp_path, remains | rest, vae=tmp_path / "vae.safetensors")
    assert_same(converted.params["vae"], jax.tree.map(lambda leaf: 2 * leaf, random_params(MODEL)["vae"]))
    assert {converted.report.ignored[name] for name in remains} == {"replaced by the file given for it"}


def test_what_remains_of_a_replaced_text_encoder_is_replaced(tmp_path, folder):
    other = {"cond_stage_model.model.transformer.resblocks.40.ln_1.weight": np.zeros(1280, "f2")}
    tensors = {name: array for name, array in whole().items() if not name.startswith(TEXT)} | other
    converted = read_file(tmp_path, tensors, text_encoder=folder)
    assert_same(converted.params, random_params(MODEL))
    assert set(converted.report.ignored) == set(other)


# Folders


NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema", "ema", "fp32", "pruned"])
@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_the_only_variant_there_is_taken_and_named(copied, variant, extension):
    for inside, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        plain = copied / inside / f"{stem}.safetensors"
        stem = "pytorch_model" if (inside, extension) == ("text_encoder", "bin") else stem
        plain.rename(plain.with_name(f"{stem}.{variant}.{extension}"))
    converted = convert.read(copied)
    assert_same(converted.params, random_params(MODEL))
    assert f"unet: read diffusion_pytorch_model.{variant}.{extension}, a variant" in converted.report.notes


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.bin.index.json",
    ],
)
def test_shards_come_through_their_index_and_the_hub_is_asked_for_all_of_them(copied, index):
    unet = copied / "unet" / NAMES[0]
    with open_source(unet) as source:
        tensors = {name: source.read(name) for name in source.tensors}
    unet.unlink()
    extension = "bin" if ".bin" in index else "safetensors"
    variant = ".fp16" if "fp16" in index else ""
    files = [f"diffusion_pytorch_model{variant}-{i:05}-of-00003.{extension}" for i in (1, 2, 3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(tensors)}
    for file in files:
        write_raw(unet.parent / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    (unet.parent / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same(convert.read(copied).params, random_params(MODEL))
    there = [file.relative_to(copied).as_posix() for file in copied.rglob("*") if file.is_file()]
    assert {f"unet/{name}" for name in (index, *files)} <= set(needed_files("o/n", there))
    (unet.parent / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {re.escape(files[1])} is missing"):
        convert.read(copied)


def test_shards_without_an_index_are_called_that(copied, capsys, tmp_path):
    unet = copied / "unet" / NAMES[0]
    unet.rename(unet.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    line = refused(capsys, copied, tmp_path / "out")
    assert "diffusion_pytorch_model-00001-of-00002.safetensors" in line
    assert "index" in line


def test_of_two_formats_the_safe_one_is_taken(copied):
    unet = copied / "unet" / NAMES[0]
    torch.save({"a": torch.ones(1)}, unet.with_name(NAMES[1]))
    assert_same(convert.read(copied).params, random_params(MODEL))


def test_a_folder_with_averages_alone_takes_them(copied):
    (copied / "unet").rename(copied / "unet_ema")
    converted = convert.read(copied)
    assert_same(converted.params, random_params(MODEL))
    assert any("moving averages were taken" in note for note in converted.report.notes)


WIDE = dataclasses.replace(
    MODEL, name="wide", text=(dataclasses.replace(MODEL.clip, vocab_size=49408, pad_token=49407),)
)


def cached(top, config=MODEL, commits=("abc",), main_at="abc"):
    """The hub's cache folder of a model."""
    plain = top.parent / "plain"
    plain.parent.mkdir(exist_ok=True)
    write_diffusers(plain, config, random_params(config))
    (top / "blobs").mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "snapshots").mkdir()
    if main_at:
        (top / "refs" / "main").write_text(main_at)
    for i, file in enumerate(sorted(file for file in plain.rglob("*") if file.is_file())):
        blob = top / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        for commit in commits:
            link = top / "snapshots" / commit / file.relative_to(plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(plain)
    return top


@pytest.mark.parametrize(
    ("commits", "main_at"), [(("abc",), "abc"), (("abc",), ""), (("abc", "def"), "def\n"), (("abc",), "abc\r\n")]
)
def test_a_model_in_the_hubs_cache_is_taken_at_its_main_branch(tmp_path, commits, main_at):
    top = cached(tmp_path / "models--o--n", commits=commits, main_at=main_at)
    for given_as in (top, top / "snapshots", top / "blobs", top / "snapshots" / commits[-1]):
        if len(commits) == 1 or given_as != top / "snapshots":
            assert_same(convert.read(given_as).params, random_params(MODEL))


def test_a_model_in_the_hubs_cache_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path / "kept"))
    top = cached(tmp_path / "models--o--n", WIDE)
    pipe = sdjax.load(top)
    assert pipe.config.clip == WIDE.clip
    assert len(list((tmp_path / "kept" / "converted").iterdir())) >= 1
    (top / "blobs" / f"{0:040x}").unlink()
    with pytest.raises(ValueError, match="download is not complete"):
        sdjax.load(top)


def test_broken_caches_are_called_that(tmp_path, capsys):
    two = cached(tmp_path / "a" / "models--o--n", commits=("abc", "def"), main_at="")
    assert "2 snapshots and no refs/main; give one of them" in refused(capsys, two, tmp_path / "out")
    gone = cached(tmp_path / "b" / "models--o--n", main_at="fff")
    assert "the snapshot 'fff' of its main branch is not there" in refused(capsys, gone, tmp_path / "out")
    none = tmp_path / "c" / "models--o--n"
    (none / "snapshots").mkdir(parents=True)
    assert "no snapshot in it; the download is not complete" in refused(capsys, none, tmp_path / "out")
    both = cached(tmp_path / "d" / "models--o--n").parent
    assert "give one of them" in refused(capsys, both, tmp_path / "out")


def every_link(top):
    return sorted(link for link in (top / "snapshots").rglob("*") if link.is_symlink())


def test_a_link_to_a_blob_that_is_not_there_is_an_incomplete_download(tmp_path, capsys):
    top = cached(tmp_path / "models--o--n")
    links = every_link(top)
    assert len(links) > 8
    for link in links:
        blob, kept = link.resolve(), top / "kept"
        blob.rename(kept)
        line = refused(capsys, top, tmp_path / "out")
        assert "download is not complete" in line, link
        kept.rename(blob)


def test_an_unfinished_download_into_a_folder_is_called_that(copied, tmp_path, capsys):
    (copied / "unet" / NAMES[0]).unlink()
    assert "not complete" not in refused(capsys, copied, tmp_path / "out")
    unfinished = copied / ".cache" / "huggingface" / "download" / "unet" / "x.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"")
    assert "the download is not complete, get it again" in refused(capsys, copied, tmp_path / "out")


# What a wrong file is called


def named(*names, shape=(4, 4)):
    return lambda path: write_raw(path, {name: np.ones(shape, "f2") for name in names})


def saved(value):
    return lambda path: torch.save(value, path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def tarred(path):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))


def picture(kind):
    def write(path):
        from PIL import Image

        Image.new("RGB", (40, 40)).save(path, kind)

    return write


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265380512\n"
WRONG = {
    "lfs": (lambda path: path.write_bytes(LFS), "git-lfs pointer"),
    "page": (lambda path: path.write_bytes(b"\n<!DOCTYPE html><html><title>404</title></html>"), "web page"),
    "xml": (
        lambda path: path.write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"),
        "web page",
    ),
    "answer": (lambda path: path.write_bytes(b'{"error":"Unauthorized, please log in"}'), "JSON"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "short": (lambda path: path.write_bytes(b"PK\3\4"), "get the file again"),
    "shorter": (lambda path: path.write_bytes(b"\1\2\3"), "only 3 bytes"),
    "zeros": (lambda path: path.write_bytes(bytes(100_000)), "filled with zeros"),
    "list": (saved([torch.ones(2), torch.ones(3)]), "a list of 2"),
    "tuple": (saved((1, 2, 3)), "a tuple of 3"),
    "tensor": (saved(torch.ones(4, 7)), "a single tensor of shape (4, 7)"),
    "number": (saved(3), "no checkpoint"),
    "text": (saved("hello"), "no checkpoint"),
    "nothing": (saved(None), "no checkpoint"),
    "no entries": (saved({}), "no tensors"),
    "settings": (saved({"lr": 1.0, "steps": 3}), "lr"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(100)), "GGUF"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xa0\x01" + bytes(200)), "ONNX"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5"),
    "zip": (zipped, "zip archive"),
    "tar": (tarred, "tar archive"),
    "png": (picture("PNG"), "picture"),
    "jpeg": (picture("JPEG"), "picture"),
    "webp": (picture("WEBP"), "picture"),
    "gif": (picture("GIF"), "picture"),
    "numpy": (lambda path: np.save(path.open("wb"), np.ones(300)), "numpy"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(300)), "numpy"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": list(range(100))})), "pickle"),
    "program": (lambda path: path.write_bytes(b"\x7fELF" + bytes(200)), "program"),
    "pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n" + bytes(200)), "PDF"),
    "prose": (lambda path: path.write_text("Error: file not found. Please try again later.\n" * 3), "text"),
    "flax": (lambda path: path.write_bytes(b"\x83\xa7encoder\x82\xa7conv_in\x82" + bytes(range(200))), "msgpack"),
    "sdxl": (named("conditioner.embedders.1.model.ln_final.weight", UNET + "label_emb.0.0.weight"), "Diffusion XL"),
    "refiner": (named("conditioner.embedders.0.model.ln_final.weight", UNET + "label_emb.0.0.weight"), "Diffusion XL"),
    "sd3": (named(UNET + "joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    "flux": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "Flux"),
    "lora": (named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "LoRA"),
    "lora of diffusers": (named("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"), "LoRA"),
    "controlnet": (named("control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"), "ControlNet"),
    "controlnet of diffusers": (
        named("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "ControlNet",
    ),
    "embedding": (named("emb_params"), "textual inversion"),
    "embedding in a pickle": (
        saved({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"}),
        "textual inversion",
    ),
    "embedding of diffusers": (saved({"<cat>": torch.ones(768)}), "textual inversion"),
    "vae": (lambda path: write_raw(path, part(VAE)), "an autoencoder (VAE) and no UNet"),
    "t5": (named("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "T5"),
    "upscaler": (named("body.0.weight", "model.0.weight"), "expected"),
    "something else": (named("layer1.0.conv1.weight", "fc.weight"), "layer1.0.conv1.weight"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_called_what_it_is(tmp_path, capsys, kind):
    write, says = WRONG[kind]
    path = tmp_path / "m.safetensors"
    write(path)
    line = refused(capsys, path, tmp_path / "out")
    assert says in line.replace(str(path), "")
    assert str(path) in line
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("cond_stage_model.encoder.block.0.layer.0.SelfAttention.q.weight", (8, 8), "T5"),
        ("cond_stage_model.model.token_embedding.weight", (49408, 1280), "1280 wide (OpenCLIP bigG"),
        ("cond_stage_model.roberta.embeddings.word_embeddings.weight", (8, 8), "XLM-RoBERTa"),
        ("cond_stage_model.transformer.token_emb.weight", (8, 8), "BERT"),
    ],
)
def test_a_text_encoder_of_another_family_is_named(tmp_path, capsys, name, shape, says):
    tensors = {other: array for other, array in whole().items() if not other.startswith(TEXT)}
    write_raw(tmp_path / "m.safetensors", tensors | {name: np.ones(shape, "f2")}, metadata=SAID)
    line = refused(capsys, tmp_path / "m.safetensors", tmp_path / "out")
    assert says in line
    assert "--text-encoder FILE" in line


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LFS, "git-lfs pointer"),
        (b"<html>404</html>", "web page"),
        (b"", "empty"),
        (bytes(300), "zeros"),
        (b'{"a": 1', "JSON"),
        (b"[1]", "JSON object"),
        (b'{"a": "\\ud800"}', "JSON"),
    ],
    ids=["lfs", "page", "empty", "zeros", "cut", "list", "surrogate"],
)
def test_a_wrong_json_file_is_called_what_it_is(copied, tmp_path, capsys, file, content, says):
    (copied / file).write_bytes(content)
    line = refused(capsys, copied, tmp_path / "out")
    assert says in line
    assert str(copied / file) in line


@pytest.mark.parametrize("inside", ["unet/" + NAMES[0], "text_encoder/model.safetensors", "vae/" + NAMES[0]])
def test_a_pointer_in_place_of_weights_is_called_that(copied, tmp_path, capsys, inside):
    (copied / inside).write_bytes(LFS)
    line = refused(capsys, copied, tmp_path / "out")
    assert f"{copied / inside}: a git-lfs pointer" in line


@pytest.mark.parametrize("write", [write_raw, write_ckpt])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_download_that_ends_in_zeros_is_refused(tmp_path, capsys, write, share):
    path = tmp_path / "m.ckpt"
    write(path, whole())
    data = path.read_bytes()
    end = data.find(b"PK\x01\x02") if write is write_ckpt else len(data)
    at = int(share * end)
    path.write_bytes(data[:at] + bytes(end - at) + data[end:])
    arguments = (path, tmp_path / "out", "--config", _json_of(tmp_path))
    assert "the download is not complete, get it again" in refused(capsys, *arguments)
    path.write_bytes(data[:at])
    assert "again" in refused(capsys, *arguments)


@pytest.mark.parametrize("inside", ["unet/" + NAMES[0], "text_encoder/model.safetensors", "vae/" + NAMES[0]])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_part_of_a_folder_that_ends_in_zeros_is_refused(copied, tmp_path, capsys, inside, share):
    data = (copied / inside).read_bytes()
    at = int(share * len(data))
    (copied / inside).write_bytes(data[:at] + bytes(len(data) - at))
    line = refused(capsys, copied, tmp_path / "out")
    assert f"{copied / inside}: the end of the file is filled with zeros; the download is not complete" in line


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("begin", "end"), [(0.3, 0.6), (0.5, 1.0), (0.9, 1.0)])
def test_an_old_checkpoint_with_zeros_in_it_is_refused(tmp_path, capsys, begin, end):
    write_ckpt(tmp_path / "m.ckpt", whole(), legacy=True)
    data = (tmp_path / "m.ckpt").read_bytes()
    begin, end = int(begin * len(data)), int(end * len(data))
    (tmp_path / "m.ckpt").write_bytes(data[:begin] + bytes(end - begin) + data[end:])
    arguments = (tmp_path / "m.ckpt", tmp_path / "out", "--config", _json_of(tmp_path))
    assert "get the file again" in refused(capsys, *arguments)


def test_a_single_number_may_have_any_stride(tmp_path):
    for legacy in (False, True):
        odd = torch.ones(28).as_strided((1, 1), (7, 28))
        torch.save({"a": odd}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
        with open_source(tmp_path / "m.ckpt") as source:
            np.testing.assert_array_equal(source.read("a"), np.ones((1, 1), "f4"))


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (LFS, "git-lfs pointer"), (b"<html>404</html>", "web page"), (bytes(99), "zeros")],
    ids=["empty", "lfs", "page", "zeros"],
)
def test_a_wrong_file_of_a_tokenizer_is_called_what_it_is(copied, tmp_path, capsys, file, content, says):
    (copied / "tokenizer" / file).write_bytes(content)
    (copied / "tokenizer" / "tokenizer_config.json").unlink()  # which is not always there
    line = refused(capsys, copied, tmp_path / "out")
    assert f"{copied / 'tokenizer' / file}: " in line
    assert says in line


@pytest.mark.parametrize("lines", [1, 1000, 45000])
def test_merges_that_are_cut_off_are_refused(copied, tmp_path, capsys, lines):
    merges = copied / "tokenizer" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().split("\n")[:lines]) + "\n")
    assert f"{lines} lines for 48894 words; the file is cut off" in refused(capsys, copied, tmp_path / "out")


def test_weights_that_are_zero_by_intent_are_taken(tmp_path):
    name = UNET + "out.2.weight"
    tensors = whole() | {name: np.zeros_like(whole()[name])}
    tensors[name.replace("weight", "bias")] = np.zeros(4, "f4")
    assert f"{name} is zero everywhere" in read_file(tmp_path, tensors).report.notes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_strange_numbers_are_noted_and_nothing_warns(tmp_path, dtype):
    name = UNET + "out.2.weight"
    bad = np.full(whole()[name].shape, np.nan).astype(dtype)
    bad.view(f"u{bad.dtype.itemsize}")[:] |= 1 << (7 if bad.dtype.itemsize == 1 else 15)
    converted = read_file(tmp_path, whole() | {name: bad})
    assert f"{name} holds NaN or infinite values" in converted.report.notes


def folder_of(*names):
    def make(path):
        path.mkdir()
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"x")

    return make


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "holds nothing"),
        (("a.png", "b.png"), "a.png, b.png"),
        (("v1-5.ckpt", "readme.md"), "give the file itself"),
        (("sub/model_index.json",), "sub"),
        (("config.json", "model.safetensors"), "model.safetensors"),
        (("adapter_config.json", "adapter_model.safetensors"), "LoRA"),
        (("pytorch_lora_weights.safetensors",), "LoRA"),
    ],
)
def test_a_folder_of_something_else_is_called_that(tmp_path, capsys, names, says):
    folder_of(*names)(tmp_path / "m")
    line = refused(capsys, tmp_path / "m", tmp_path / "out")
    assert says in line.replace(str(tmp_path), "")


def test_a_part_of_a_folder_leads_to_the_whole(copied, tmp_path, capsys):
    assert "give that one" in refused(capsys, copied / "unet", tmp_path / "out")
