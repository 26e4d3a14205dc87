"""The converter: every name both ways, every layout that people have, and refusals that leave nothing behind."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
from pathlib import Path

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

import convert
from convert.__main__ import main
from convert.diffusers import without_unused_layers
from convert.files.open import open_source
from convert.files.source import CheckpointError
from convert.names import PARTS, ema_name, entries, text_spelling
from convert.write import write_diffusers, write_safetensors
from sdjax.config import SD15, SD15_INPAINT, SD21, SD21_BASE, TINY
from sdjax.models.params import random_params
from sdjax.storage import checkpoint
from sdjax.text.tokenizer import clip_tokenizer
from tests.checkpoint_files import write_ckpt
from tests.checkpoint_files import write_safetensors as write_raw
from tests.children import interruptible

DATA = Path(__file__).parent / "data"
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
OPENCLIP = dataclasses.replace(
    TINY,
    name="tiny-2",
    text=(dataclasses.replace(TINY.clip, layers=3, activation="gelu", skip=1, projection=64, pad_token=0),),
    unet=dataclasses.replace(TINY.unet, linear_projection=True),
    schedule=dataclasses.replace(TINY.schedule, prediction="v"),
)


def table(name):
    with open(DATA / name) as file:
        return {
            row["name"]: (tuple(json.loads(row["shape"])), row["diffusers_name"], row["dtype"])
            for row in csv.DictReader(file, delimiter="\t")
        }


def assert_same(found, expected):
    """Equal trees of equal bits."""
    assert jax.tree.structure(found) == jax.tree.structure(dict(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def tensors(tmp_path_factory, request):
    """The tiny model as a single file has it: original name -> numpy array."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    write_safetensors(path, TINY, random_params(TINY))
    with open_source(path) as source:
        return {name: source.read(name) for name in source.tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as a diffusers folder."""
    path = tmp_path_factory.mktemp("tiny") / "tiny"
    write_diffusers(path, TINY, random_params(TINY))
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


# The map of names


@pytest.mark.parametrize(("config", "file"), [(SD15, "sd15_ckpt_keys.tsv"), (SD21, "sd21_ckpt_keys.tsv")])
def test_every_name_and_shape_of_the_public_files_is_in_the_map(config, file):
    text = "cond_stage_model.model." if config == SD21 else "cond_stage_model.transformer.text_model."
    spellings = {"unet": "compvis", "vae": "compvis", "text": text_spelling(config.clip)}
    ours = {
        (PREFIXES | {"text": text})[part] + entry.name: entry.shape
        for part in PARTS
        for entry in entries(config, part, spellings[part])
    }
    published = {name: shape for name, (shape, *_) in table(file).items()}
    assert ours.items() <= published.items()
    left = set(published) - set(ours)
    assert all("." not in name or name.startswith("model_ema.") or "position_ids" in name for name in left)


def test_the_two_spellings_mean_the_same_parameters():
    """Against the published table of (original name, diffusers name)."""
    for config, file in ((SD15, "sd15_ckpt_keys.tsv"), (SD21, "sd21_ckpt_keys.tsv")):
        rows = table(file)
        for part, folder_ in (("unet", "unet/"), ("vae", "vae/"), ("text", "text_encoder/text_model.")):
            old = text_spelling(config.clip) if part == "text" else "compvis"
            prefix = PREFIXES.get(
                part, "cond_stage_model.model." if config == SD21 else "cond_stage_model.transformer.text_model."
            )
            new = {entry.leaves[0]: entry.name for entry in entries(without_unused_layers(config), part, "diffusers")}
            for entry in entries(config, part, old):
                expected = rows[prefix + entry.name][1]
                names = [folder_ + new[leaf] for leaf in entry.leaves if leaf in new]
                assert ";".join(names) == (expected if expected != "-" else "")


def test_moving_averages_have_names_of_their_own():
    names = [ema_name(entry.name) for entry in entries(SD15, "unet", "compvis")]
    assert len(set(names)) == len(names) == 686
    assert ema_name("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


def test_no_map_for_a_spelling_that_lacks_layers():
    with pytest.raises(ValueError, match="no diffusers name"):
        entries(SD21, "text", "diffusers")


# Round trips


@pytest.mark.parametrize("config", [TINY, OPENCLIP], ids=["sd1", "sd2"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_round_trip_keeps_every_bit(config, dtype, tmp_path):
    params = random_params(config, dtype=dtype)
    write_safetensors(tmp_path / "m.safetensors", config, params)
    converted = convert.read(tmp_path / "m.safetensors", dtype="keep")
    assert converted.config == config
    assert_same(converted.params, params)


@pytest.mark.parametrize("config", [TINY, OPENCLIP], ids=["sd1", "sd2"])
def test_diffusers_loads_our_folder_and_we_load_diffusers(config, tmp_path):
    params = random_params(config)
    write_diffusers(tmp_path / "ours", config, params)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    pipe.save_pretrained(tmp_path / "theirs")
    converted = convert.read(tmp_path / "theirs")
    reduced = without_unused_layers(config)
    assert dataclasses.replace(converted.config, name=config.name) == reduced
    kept = {name: tree for name, tree in params["text"].items() if name not in ("layer_2", "projection", "logit_scale")}
    assert_same(converted.params, dict(params) | {"text": kept})


def test_our_tokenizer_files_give_our_ids_in_transformers(folder):
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    prompts = ["a red heart", "", "It's 3 o'clock, naïve café! 😀"]
    found = [theirs(prompt, padding="max_length", truncation=True).input_ids for prompt in prompts]
    np.testing.assert_array_equal(found, clip_tokenizer()(prompts))


def test_ckpt_and_our_checkpoint_round_trip(tensors, tmp_path):
    write_ckpt(tmp_path / "m.ckpt", tensors)
    converted = convert.read(tmp_path / "m.ckpt", config=TINY)
    assert_same(converted.params, random_params(TINY))
    checkpoint.save(tmp_path / "ours", converted.config, converted.params)
    write_safetensors(tmp_path / "back.safetensors", *checkpoint.restore(tmp_path / "ours"))
    with open_source(tmp_path / "back.safetensors") as source:
        for name, array in tensors.items():
            assert source.read(name).tobytes() == array.tobytes()


def test_a_tokenizer_folder_comes_along(folder, tmp_path):
    converted = convert.read(folder)
    assert converted.tokenizer == folder / "tokenizer"
    checkpoint.save(tmp_path / "ours", converted.config, converted.params, tokenizer=converted.tokenizer)
    assert (tmp_path / "ours" / "tokenizer" / "vocab.json").is_file()


# What people have


def read_file(tmp_path, tensors, **options):
    write_raw(tmp_path / "m.safetensors", tensors)
    return convert.read(tmp_path / "m.safetensors", **{"config": TINY} | options)


def test_public_extras_are_ignored_and_reported(tensors, tmp_path):
    extras = {
        "betas": np.zeros(1000, "f4"),
        "model_ema.decay": np.float32(1).reshape(()),
        "logvar": np.zeros(1000, "f4"),
    }
    extras["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.full((1, 77), 0.999, "f2")
    converted = read_file(tmp_path, tensors | extras)
    assert_same(converted.params, random_params(TINY))
    assert set(converted.report.ignored) == set(extras)
    assert set(converted.report.used) == set(tensors)


def test_text_names_without_text_model_are_taken(tensors, tmp_path):
    renamed = {name.replace("transformer.text_model.", "transformer."): array for name, array in tensors.items()}
    assert_same(read_file(tmp_path, renamed).params, random_params(TINY))


def test_moving_averages_are_taken_when_all_are_there(tensors, tmp_path):
    prefix = PREFIXES["unet"]
    shadows = {
        ema_name(name.removeprefix(prefix)): array + 1 for name, array in tensors.items() if name.startswith(prefix)
    }
    plain, both = random_params(TINY)["unet"], tensors | shadows
    averaged = read_file(tmp_path, both)
    np.testing.assert_array_equal(averaged.params["unet"]["conv_in"]["bias"], plain["conv_in"]["bias"] + 1)
    assert_same(read_file(tmp_path, both, ema="no").params["unet"], plain)
    shadows.popitem()
    assert_same(read_file(tmp_path, tensors | shadows).params["unet"], plain)
    with pytest.raises(CheckpointError, match="--ema no"):
        read_file(tmp_path, tensors | shadows, ema="yes")


def test_missing_parts_come_from_other_files(tensors, folder, tmp_path):
    unet = {name: array for name, array in tensors.items() if name.startswith(PREFIXES["unet"])}
    with pytest.raises(CheckpointError, match=r"the text encoder is missing; give it by --text-encoder"):
        read_file(tmp_path, unet)
    vae = {name.removeprefix(PREFIXES["vae"]): 2 * a for name, a in tensors.items() if name.startswith(PREFIXES["vae"])}
    write_ckpt(tmp_path / "vae.pt", vae | {"loss.logvar": np.zeros(1, "f4")})
    expected = random_params(TINY)
    for text in (folder, folder / "text_encoder"):
        converted = read_file(tmp_path, unet, vae=tmp_path / "vae.pt", text_encoder=text)
        assert_same(converted.params["text"], expected["text"])
        assert_same(converted.params["vae"], jax.tree.map(lambda leaf: 2 * leaf, expected["vae"]))
    replaced = read_file(tmp_path, tensors, vae=tmp_path / "vae.pt")
    assert_same(replaced.params["vae"], jax.tree.map(lambda leaf: 2 * leaf, expected["vae"]))
    assert "replaced" in replaced.report.ignored["first_stage_model.quant_conv.bias"]


def test_parts_alone_are_named(tensors, tmp_path):
    vae = {name: array for name, array in tensors.items() if name.startswith(PREFIXES["vae"])}
    with pytest.raises(CheckpointError, match=r"holds an autoencoder \(VAE\) and no UNet"):
        read_file(tmp_path, vae, config=None)
    bare = {name.removeprefix(PREFIXES["unet"]): a for name, a in tensors.items() if name.startswith(PREFIXES["unet"])}
    with pytest.raises(CheckpointError, match="the text encoder is missing"):
        read_file(tmp_path, bare)


def test_dtypes_are_cast_or_kept(tensors, tmp_path):
    half = {name: array.astype("f2") for name, array in tensors.items()}
    params = read_file(tmp_path, half).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read_file(tmp_path, half, dtype="keep").params)} == {"float16"}
    mixed = read_file(tmp_path, tensors, dtype="float16").params
    assert mixed["vae"]["quant_conv"]["kernel"].dtype == "float32"
    assert mixed["unet"]["conv_in"]["kernel"].dtype == "float16"
    other = {
        name: array.astype("f8") if i % 2 else array.astype(ml_dtypes.bfloat16)
        for i, (name, array) in enumerate(tensors.items())
    }
    kept = read_file(tmp_path, other, dtype="keep").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {"float32", "bfloat16"}


def test_too_large_numbers_are_refused_and_strange_ones_are_noted(tensors, tmp_path):
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(CheckpointError, match=f"{name} is too large for float16"):
        read_file(tmp_path, tensors | {name: np.full(4, 1e6, "f4")}, dtype="float16")
    strange = tensors | {name: np.array([np.nan, np.inf, 1, 2], "f4")}
    strange["first_stage_model.quant_conv.weight"] = np.zeros_like(tensors["first_stage_model.quant_conv.weight"])
    notes = read_file(tmp_path, strange).report.notes
    assert f"{name} holds NaN or infinite values" in notes
    assert "first_stage_model.quant_conv.weight is zero everywhere" in notes


# Which model is this


def sparse_file(path, shapes):
    """A .ckpt-sized .safetensors of the given shapes that takes no room on the disk."""
    header, end = {}, 0
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * {"F32": 4, "F16": 2, "I64": 8, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def shapes_of(name):
    return {name: (shape, dtype) for name, (shape, _, dtype) in table(name).items()}


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("sd15_ckpt_keys.tsv", {}, SD15),
        (
            "sd15_ckpt_keys.tsv",
            {"model.diffusion_model.input_blocks.0.0.weight": ((320, 9, 3, 3), "F32")},
            SD15_INPAINT,
        ),
        ("sd21_ckpt_keys.tsv", {}, SD21_BASE),  # zeros in place of weights: the rule of thumb says epsilon
    ],
)
def test_public_layouts_are_recognised(file, change, expected, tmp_path):
    sparse_file(tmp_path / "m.safetensors", shapes_of(file) | change)
    config, report = convert.inspect(tmp_path / "m.safetensors")
    assert config == expected
    assert report.complete


def test_relatives_are_recognised(tmp_path):
    path = tmp_path / "m.safetensors"
    wide = shapes_of("sd15_ckpt_keys.tsv") | {"model.diffusion_model.input_blocks.0.0.weight": ((320, 8, 3, 3), "F32")}
    sparse_file(path, wide)
    assert convert.inspect(path)[0].unet.in_channels == 8
    fewer = {name: shape for name, shape in shapes_of("sd21_ckpt_keys.tsv").items() if "resblocks.23." not in name}
    for name in ("cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"):
        fewer.pop(name)
    sparse_file(path, fewer)
    config, report = convert.inspect(path)
    assert (config.clip.layers, config.clip.skip, config.clip.projection) == (23, 0, None)
    assert report.complete
    conv = {
        name: ((*shape, 1, 1) if ".proj_in.weight" in name or ".proj_out.weight" in name else shape, dtype)
        for name, (shape, dtype) in shapes_of("sd21_ckpt_keys.tsv").items()
    }
    conv = {name: ((*shape[:2], 1, 1) if len(shape) == 6 else shape, dtype) for name, (shape, dtype) in conv.items()}
    sparse_file(path, conv)
    assert convert.inspect(path)[1].complete


def test_sd2_prediction_is_decided_and_said(tmp_path):
    sparse_file(tmp_path / "m.safetensors", shapes_of("sd21_ckpt_keys.tsv"))
    _, report = convert.inspect(tmp_path / "m.safetensors")
    assert any("prediction epsilon" in note and "--prediction" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("conditioner.embedders.1.model.ln_final.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("emb_params", "textual inversion"),
        ("taesd_decoder.1.weight", "TAESD"),
        ("depth_model.model.pretrained.cls_token", "depth"),
        ("something.else", "no UNet"),
    ],
)
def test_other_models_are_refused_by_name(name, says, tmp_path):
    write_raw(tmp_path / "m.safetensors", {name: np.zeros((4, 4), "f4")})
    with pytest.raises(CheckpointError, match=says):
        convert.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("channels", "says"), [(5, "depth"), (7, "upscaler"), (6, "unknown")])
def test_other_channel_counts_are_refused(channels, says, tmp_path):
    change = {"model.diffusion_model.input_blocks.0.0.weight": ((320, channels, 3, 3), "F32")}
    sparse_file(tmp_path / "m.safetensors", shapes_of("sd15_ckpt_keys.tsv") | change)
    with pytest.raises(CheckpointError, match=says):
        convert.read(tmp_path / "m.safetensors")


# Strictness


def test_every_difference_is_named(tensors, tmp_path):
    name = "model.diffusion_model.time_embed.0.weight"
    wrong = {key: value for key, value in tensors.items() if key != "first_stage_model.quant_conv.bias"}
    wrong |= {
        name: tensors[name].T.copy(),
        "model.diffusion_model.extra": np.zeros(1, "f4"),
        "stray": np.zeros(1, "f4"),
    }
    with pytest.raises(CheckpointError) as caught:
        read_file(tmp_path, wrong)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("missing: vae quant_conv.bias", "model.diffusion_model.extra", "stray", f"{name} (expected (128, 32)"):
        assert part in line
    write_raw(tmp_path / "ints.safetensors", tensors | {name: tensors[name].astype("i4")})
    with pytest.raises(CheckpointError, match="expected floating point, found I32"):
        convert.read(tmp_path / "ints.safetensors", config=TINY)
    kept = tensors | {"stray.x": np.zeros(1, "f4")}
    assert read_file(tmp_path, kept, ignore=["stray.*"]).report.ignored == {"stray.x": "as asked"}


def test_two_names_for_one_parameter_are_refused_unless_they_say_the_same(tensors, tmp_path):
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    other = name.replace("text_model.", "")
    with pytest.raises(CheckpointError, match=f"two names for one thing, {name} and {other}; .*--ignore {other}"):
        read_file(tmp_path, tensors | {other: tensors[name] + 1})
    for more, options in (({other: tensors[name]}, {}), ({other: tensors[name] + 1}, {"ignore": [other]})):
        converted = read_file(tmp_path, more | tensors, **options)
        assert_same(converted.params, random_params(TINY))


@pytest.mark.parametrize("options", [dict(ema="maybe"), dict(dtype="int8"), dict(prediction="x0")])
def test_wrong_arguments_are_named(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        convert.read(tmp_path / "m.ckpt", **options)


# diffusers folders


def test_old_attention_names_and_bin_files_are_read(copied):
    vae = copied / "vae" / "diffusion_pytorch_model.safetensors"
    with open_source(vae) as source:
        state = {name: torch.from_numpy(source.read(name)) for name in source.tensors}
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for name, value in state.items()}
    torch.save(state, vae.with_suffix(".bin"))
    vae.unlink()
    converted = convert.read(copied)
    assert_same(converted.params, random_params(TINY))
    assert converted.report.parts["vae"].startswith(str(vae.with_suffix(".bin")))


def test_fp16_variants_are_taken_when_nothing_else_is_there(copied):
    unet = copied / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    report = convert.read(copied).report
    assert report.parts["unet"].startswith(str(unet))
    assert report.notes == []
    unet.unlink()
    assert "unet: read diffusion_pytorch_model.fp16.safetensors, a variant" in convert.read(copied).report.notes


def split(unet, names=("-00001-of-00002", "-00002-of-00002")):
    """Two shards and an index in place of one file; returns the index's path."""
    with open_source(unet) as source:
        tensors = {name: source.read(name) for name in source.tensors}
    files = [f"diffusion_pytorch_model{name}.safetensors" for name in names]
    keys = list(tensors)
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        write_raw(unet.parent / file, {key: tensors[key] for key in half})
    unet.unlink()
    weight_map = {key: file for file, half in zip(files, halves, strict=True) for key in half}
    index = unet.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_joined(copied):
    split(copied / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(convert.read(copied).params, random_params(TINY))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: dict.fromkeys(m, "../../secret.safetensors"), "not a plain file name"),
        (lambda m: dict.fromkeys(m, "/etc/passwd"), "not a plain file name"),
        (lambda m: dict.fromkeys(m, "absent.safetensors"), "missing"),
        (lambda m: dict.fromkeys(m, 5), "not a plain file name"),
        (lambda m: {}, "no weight_map"),
        (lambda m: dict(list(m.items())[1:]), "does not say"),
        (lambda m: m | {"more": next(iter(m.values()))}, "lacks more"),
    ],
)
def test_wrong_shard_indices_are_refused(copied, change, says):
    index = split(copied / "unet" / "diffusion_pytorch_model.safetensors")
    data = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": change(data["weight_map"])}))
    with pytest.raises(CheckpointError, match=says):
        convert.read(copied)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("vae/config.json", {"scaling_factor": "0.18"}, "scaling_factor must be float"),
        ("vae/config.json", {"scaling_factor": -1.0}, "scaling_factor"),
        ("vae/config.json", {"block_out_channels": "wide"}, "block_out_channels"),
        ("vae/config.json", {"block_out_channels": [10**9]}, "out of range"),
        ("unet/config.json", {"in_channels": None}, "in_channels"),
        ("unet/config.json", {"_class_name": "os.system"}, "_class_name"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"down_block_types": ["Other"] * 4}, "down_block_types"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "missing"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
    ],
)
def test_wrong_config_files_are_refused(copied, file, change, says):
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=says):
        convert.read(copied)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\0"])
def test_config_files_that_are_no_json_are_refused(copied, content):
    (copied / "unet" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert.read(copied)


def test_huge_config_files_are_refused_unread(copied):
    with open(copied / "unet" / "config.json", "wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match="larger than"):
        convert.read(copied)


def test_incomplete_folders_are_refused(copied, tmp_path):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights here"):
        convert.read(copied)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without model_index\.json"):
        convert.read(tmp_path / "empty")


# The command line


def test_command_converts_in_all_directions(tensors, tmp_path, capsys):
    write_ckpt(tmp_path / "m.ckpt", tensors)
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    common = ["--config", str(tmp_path / "tiny.json")]
    assert main([str(tmp_path / "m.ckpt"), str(tmp_path / "ours"), *common, "--report", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["used"]) == len(tensors)
    assert main([str(tmp_path / "ours"), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert main([str(tmp_path / "folder"), str(tmp_path / "m.safetensors"), "--report", "-"]) == 0
    assert "656 tensors used" in capsys.readouterr().out
    assert_same(convert.read(tmp_path / "m.safetensors").params, random_params(TINY))


def test_nothing_is_overwritten_without_force(folder, tmp_path, capsys):
    for name in ("there", "there.safetensors"):
        (tmp_path / name).write_text("precious")
        assert main([str(folder), str(tmp_path / name)]) == 2
        assert "--force" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "precious"
        assert main([str(folder), str(tmp_path / name), "--force"]) == 0
    assert checkpoint.is_checkpoint(tmp_path / "there")
    assert main([str(folder), str(tmp_path / "there"), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent.ckpt", "out"], "no such file"),
        (["{folder}", "no/such/out"], "no such folder"),
        (["{folder}", "out.ckpt"], "pickles are not written"),
        (["{folder}", "out", "--dtype", "int4"], "dtype"),
        (["{folder}", "out", "--config", "absent.json"], "--config"),
        (["{folder}", "out", "--vae", "absent.pt"], "no such file"),
    ],
)
def test_wrong_commands_end_in_one_line_and_leave_nothing(arguments, says, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(folder=folder) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_file_leaves_a_report_and_nothing_else(tensors, tmp_path, capsys):
    write_raw(tmp_path / "m.safetensors", dict(tensors) | {"stray": np.zeros(1, "f4")})
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    arguments = [str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--config", str(tmp_path / "tiny.json")]
    assert main([*arguments, "--report", str(tmp_path / "r.txt")]) == 2
    assert "unexpected: stray" in (tmp_path / "r.txt").read_text()
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--ignore", "stray"]) == 0


def test_unwritable_places_are_named(folder, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("sdjax.storage.tensors.in_order", full)
    assert main([str(folder), str(tmp_path / "out.safetensors")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_interrupting_leaves_nothing(folder, tmp_path):
    code = (
        "import sys, time, sdjax.storage.tensors as w\n"
        "whole = w.in_order\n"
        "def slow(*options):\n"
        "    for array in whole(*options):\n"
        "        print('.', flush=True); time.sleep(0.2); yield array\n"
        "w.in_order = slow\n"
        "from convert.__main__ import main\n"
        f"sys.exit(main([{str(folder)!r}, {str(tmp_path / 'out.safetensors')!r}]))\n"
    )
    process = subprocess.Popen(interruptible("-c", code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == ".\n"
    assert any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was written" in error
    assert list(tmp_path.iterdir()) == []
