"""The JSON files of diffusers folders: every entry that the reference writes means what it means there, or is named.

The tables are compared with the constructors of the installed versions, the networks with the reference's on small
models with random weights.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import shutil
from functools import partial
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import convert
from convert.__main__ import main
from convert.diffusers_config import diffusers_json, folder_config
from convert.diffusers_fields import EARLIER, SCHEDULER, SCHEDULERS, TEXT, TOKENIZER, UNET, VAE
from convert.files.source import CheckpointError
from convert.write import write_diffusers
from sdjax.config import SD15, TINY, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig, unusual
from sdjax.diffusion.schedule import noise_schedule
from sdjax.load import BOX_FOLDER, describe
from sdjax.models.clip import TextEncoder
from sdjax.models.params import random_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE as Autoencoder
from sdjax.selftest import noise, relative_error
from sdjax.storage import checkpoint
from tests.checkpoint_files import FUZZ

BOUND = 2e-5  # relative, in float32
SMALL = dataclasses.replace(
    TINY,
    name="small",
    text=(CLIPConfig(width=32, layers=2, heads=2, mlp_width=64),),
    vae=VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
    unet=UNetConfig(
        channels=(16, 32), transformer_layers=(1, 0), heads=(2, 4), res_blocks=1, context_width=32, groups=8
    ),
)
FILES = {
    "unet": ("unet/config.json", UNET),
    "vae": ("vae/config.json", VAE),
    "text": ("text_encoder/config.json", TEXT),
    "scheduler": ("scheduler/scheduler_config.json", SCHEDULER),
}


# The tables


def defaults(constructor):
    """argument -> default, of those that go into a configuration."""
    parameters = inspect.signature(constructor).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind not in kinds}


def defaults_in_source(module, name):
    """The same of a class whose module cannot be imported here."""
    body = ast.parse(Path(importlib.util.find_spec(module).origin).read_text()).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    (init,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    arguments = [argument.arg for argument in init.args.args[1:]]
    return dict(zip(arguments, map(ast.literal_eval, init.args.defaults), strict=True))


def scheduler_defaults(name):
    if name == "DPMSolverSDEScheduler":
        return defaults_in_source("diffusers.schedulers.scheduling_dpmsolver_sde", name)
    return defaults(getattr(diffusers, name).__init__)


@pytest.mark.parametrize(
    ("table", "constructor"),
    [
        (UNET, diffusers.UNet2DConditionModel.__init__),
        (VAE, diffusers.AutoencoderKL.__init__),
        (TEXT, CLIPTextConfig.__init__),
        (TOKENIZER, CLIPTokenizer.__init__),
    ],
    ids=["unet", "vae", "text encoder", "tokenizer"],
)
def test_the_table_has_every_argument_of_the_reference_with_its_default(table, constructor):
    assert {name: entry.usual for name, entry in table.items()} == defaults(constructor)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_table_has_every_argument_of_every_scheduler_with_the_default_of_what_matters(name):
    expected = scheduler_defaults(name)
    assert set(expected) <= set(SCHEDULER)
    usual = {field: entry.usual for field, entry in SCHEDULER.items()} | SCHEDULERS[name]
    mattering = [field for field in expected if SCHEDULER[field].kind != "harmless"]
    assert {field: usual[field] for field in mattering} == {field: expected[field] for field in mattering}


def test_every_row_of_the_schedulers_is_written_by_one_of_them():
    assert {field for name in SCHEDULERS for field in scheduler_defaults(name)} == set(SCHEDULER)


def test_every_scheduler_that_the_reference_takes_for_stable_diffusion_is_known():
    other_process = {"EDMEulerScheduler"}  # no betas
    assert {scheduler.name for scheduler in KarrasDiffusionSchedulers} - other_process <= set(SCHEDULERS)


def test_what_is_not_honoured_has_a_reason():
    for table in (UNET, VAE, TEXT, TOKENIZER, SCHEDULER, *EARLIER.values()):
        assert all(entry.why for entry in table.values() if entry.kind != "honoured")


# Reading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small"
    write_diffusers(path, SMALL, random_params(SMALL))
    return path


@pytest.fixture
def described(tmp_path):
    """A folder of JSON files alone."""
    for name, content in diffusers_json(SMALL).items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_text(json.dumps(content))
    return tmp_path / "m"


def change(path, values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config_of(folder):
    return dataclasses.replace(folder_config(folder)[0], name="small")


def outcome(folder):
    """The configuration and the notes, or the message of the refusal."""
    try:
        return folder_config(folder)
    except CheckpointError as error:
        return str(error)


OTHER = {
    "unet": {
        "sample_size": 16,
        "in_channels": 9,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "only_cross_attention": True,
        "block_out_channels": [16, 48],
        "layers_per_block": [1, 2],
        "downsample_padding": 0,
        "mid_block_scale_factor": 1.5,
        "act_fn": "mish",
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
        "transformer_layers_per_block": [2, 1],
        "reverse_transformer_layers_per_block": [1, 3],
        "attention_head_dim": 8,
        "use_linear_projection": True,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": 48,
        "time_embedding_act_fn": "silu",
        "timestep_post_act": "gelu",
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
    },
    "vae": {
        "block_out_channels": [8, 24],
        "layers_per_block": 2,
        "act_fn": "relu",
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
    "text": {
        "vocab_size": 50000,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "scheduler": {
        "num_train_timesteps": 500,
        "beta_start": 0.001,
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "trained_betas": [0.5 / i for i in range(1000, 0, -1)],
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
}
"""Another value for every honoured entry that can change alone."""

TOGETHER = {
    "unet": {"out_channels", "cross_attention_dim"},
    "vae": {"in_channels", "out_channels", "latent_channels", "down_block_types", "up_block_types"},
    "text": {"hidden_size"},
    "scheduler": set(),
}
"""Honoured entries that only make a model together with others."""


def test_every_honoured_entry_is_tried_here():
    for part, (_, table) in FILES.items():
        honoured = {name for name, entry in table.items() if entry.kind == "honoured"}
        assert honoured == set(OTHER[part]) | TOGETHER[part]


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, values in OTHER.items() for name in values])
def test_every_honoured_entry_changes_the_configuration_and_comes_back(described, part, name):
    file = described / FILES[part][0]
    usual = config_of(described)
    change(file, {name: OTHER[part][name]})
    found = config_of(described)
    assert found != usual
    for path, content in diffusers_json(found).items():
        (described / path).write_text(json.dumps(content))
    assert config_of(described) == found
    assert ModelConfig.from_json(found.to_json()) == found


@pytest.mark.parametrize("part", FILES)
def test_an_absent_entry_has_the_default_of_the_reference(described, part):
    """Removed, and written out with its default, it means the same: a configuration, or the same refusal."""
    file = described / FILES[part][0]
    written = json.loads(file.read_text())
    overrides = SCHEDULERS["DDIMScheduler"] if part == "scheduler" else {}

    for name, entry in FILES[part][1].items():
        rest = {key: value for key, value in written.items() if key != name}
        file.write_text(json.dumps(rest))
        absent = outcome(described)
        file.write_text(json.dumps(rest | {name: overrides.get(name, entry.usual)}))
        assert outcome(described) == absent, name


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "DPMSolverSDEScheduler"])  # needs torchsde
def test_an_empty_scheduler_file_means_what_its_class_makes_of_it(described, name):
    expected = getattr(diffusers, name)()
    (described / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "PNDMScheduler"}))
    change(described / "model_index.json", {"scheduler": ["diffusers", name]})
    schedule = noise_schedule(config_of(described).schedule)
    np.testing.assert_allclose(schedule.alpha_bars, expected.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "beta_end": 0.01, "num_train_timesteps": 500},
        {"trained_betas": [0.001 + 1e-5 * i for i in range(1000)]},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "rescale_betas_zero_snr": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_the_betas_are_those_of_the_reference(described, values):
    change(described / "scheduler/scheduler_config.json", values)
    written = json.loads((described / "scheduler/scheduler_config.json").read_text())
    expected = diffusers.DDIMScheduler.from_config(written).alphas_cumprod.double().numpy()
    found = noise_schedule(config_of(described).schedule).alpha_bars
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)  # its tables are float32


# The networks


def build(part, values):
    """The reference's network for the small model's description with `values`, with random weights."""
    description = diffusers_json(SMALL)[FILES[part][0]] | values
    if part == "text":
        model = CLIPTextModel(CLIPTextConfig(**description))
    else:
        model = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part].from_config(description)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * (0.2 if "embedding" in name else parameter[0].numel() ** -0.5))
            else:
                parameter.copy_(0.1 * values + ("norm" in name and name.endswith("weight")))
    return model.eval()


def converted(folder, tmp_path, part, model):
    """The configuration and parameters that we read from what the reference saves."""
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    shutil.rmtree(copy / Path(FILES[part][0]).parent)
    model.save_pretrained(copy / Path(FILES[part][0]).parent)
    found = convert.read(copy)
    return found.config, found.params[part]


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).detach().numpy()


T = np.float32([801, 7])
LATENT, CONTEXT = noise(1, (2, 8, 6, 4)), noise(2, (2, 77, 32))


@torch.no_grad()
def reference_unet(model, latent=LATENT):
    return nhwc(model(nchw(latent), torch.from_numpy(T), torch.from_numpy(CONTEXT)).sample)


UNETS = {
    "the embedding of Ho et al.": {"flip_sin_to_cos": False, "freq_shift": 1},
    "a scaled middle": {"mid_block_scale_factor": 1.7, "norm_eps": 0.01, "act_fn": "mish"},
    "no middle": {"mid_block_type": None, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
    "a plain middle": {
        "mid_block_type": "UNetMidBlock2D",
        "resnet_time_scale_shift": "scale_shift",
        "center_input_sample": True,
        "act_fn": "ReLU",
    },
    "levels that differ": {
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": [1, 2],
        "transformer_layers_per_block": [2, 1],
        "reverse_transformer_layers_per_block": [3, 1],
        "only_cross_attention": [True, False],
        "attention_head_dim": [4, 2],
    },
    "only cross-attention": {"only_cross_attention": True, "use_linear_projection": True, "upcast_attention": True},
    "odd sizes": {"downsample_padding": 0, "conv_in_kernel": 1, "conv_out_kernel": 5},
    "another width of time": {
        "time_embedding_dim": 24,
        "timestep_post_act": "silu",
        "time_embedding_act_fn": "gelu",
        "act_fn": "gelu",
        "norm_num_groups": 4,
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_is_the_reference_s(folder, tmp_path, name):
    model = build("unet", UNETS[name])
    config, params = converted(folder, tmp_path, "unet", model)
    assert unusual(config)
    latent = noise(3, (2, 7, 5, 4)) if name == "odd sizes" else LATENT
    found = jax.jit(UNet(config.unet).apply)({"params": params}, latent, T, CONTEXT)
    assert relative_error(found, reference_unet(model, latent)) < BOUND


def test_several_texts_for_one_latent_are_separate_calls_where_only_text_is_attended_to(folder, tmp_path):
    model = build("unet", {"only_cross_attention": True, "mid_block_type": None})
    config, params = converted(folder, tmp_path, "unet", model)
    apply = partial(UNet(config.unet).apply, {"params": params})

    @jax.jit
    def both(latent, t, context):
        return apply(latent, apply(t, method="embed_timesteps"), apply(context, method="text_kv"), method="predict")

    found = both(LATENT, T, np.concatenate([CONTEXT, CONTEXT[::-1]]))
    with torch.no_grad():
        other = model(nchw(LATENT), torch.from_numpy(T), torch.from_numpy(CONTEXT[::-1].copy())).sample
    assert relative_error(found, np.concatenate([reference_unet(model), nhwc(other)])) < BOUND


HARMLESS = {
    "dropout": 0.5,
    "upcast_attention": True,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 2.0,
    "mid_block_only_cross_attention": True,
    "cross_attention_norm": "layer_norm",
    "addition_time_embed_dim": 8,
    "addition_embed_type_num_heads": 2,
    "projection_class_embeddings_input_dim": 8,
}


@pytest.fixture(scope="module")
def usual_unet():
    model = build("unet", {})
    return model.state_dict(), reference_unet(model)


@pytest.mark.parametrize("name", [name for name, entry in UNET.items() if entry.kind == "harmless"])
def test_what_is_harmless_in_a_unet_changes_nothing_in_the_reference(usual_unet, name):
    weights, expected = usual_unet
    model = build("unet", {name: HARMLESS[name]})
    model.load_state_dict(weights)
    np.testing.assert_allclose(reference_unet(model), expected, atol=1e-6)


VAES = {
    "usual": {"sample_size": 8, "force_upcast": False},
    "no 1x1 convolutions": {"use_quant_conv": False, "use_post_quant_conv": False, "act_fn": "mish"},
    "no attention": {"mid_block_add_attention": False, "layers_per_block": 2, "norm_num_groups": 8},
}


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_the_autoencoder_is_the_reference_s(folder, tmp_path, name):
    model = build("vae", VAES[name])
    config, params = converted(folder, tmp_path, "vae", model)
    apply = partial(Autoencoder(config.vae).apply, {"params": params})
    picture, latent = np.tanh(noise(3, (1, 8, 12, 3))), noise(4, (1, 4, 6, 4))
    posterior = jax.jit(partial(apply, method="encode"))(picture)
    expected = model.encode(nchw(picture)).latent_dist
    assert relative_error(posterior.mean, nhwc(expected.mean)) < BOUND
    assert relative_error(posterior.logvar, nhwc(expected.logvar)) < BOUND
    decoded = jax.jit(partial(apply, method="decode"))(latent)
    assert relative_error(decoded, nhwc(model.decode(nchw(latent)).sample)) < BOUND


@pytest.mark.parametrize("values", [{"hidden_act": "gelu", "layer_norm_eps": 0.01}, {"projection_dim": 8}])
@torch.no_grad()
def test_the_text_encoder_is_the_reference_s(folder, tmp_path, values):
    model = build("text", values | {"eos_token_id": 2, "bos_token_id": 0, "attention_dropout": 0.5})
    config, params = converted(folder, tmp_path, "text", model)
    ids = np.random.default_rng(0).integers(0, 49408, (2, 77))
    expected = model(torch.from_numpy(ids)).last_hidden_state
    found = jax.jit(TextEncoder(config.clip).apply)({"params": params}, ids)
    assert relative_error(found.last_hidden_state, expected) < BOUND


def test_what_is_unusual_is_shown_and_comes_back_through_every_format(folder, tmp_path, capsys):
    model = build("unet", UNETS["levels that differ"] | UNETS["the embedding of Ho et al."])
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    model.save_pretrained(copy / "unet")
    found = convert.read(copy)
    shown = describe(copy)
    assert "unusual     unet.cosine_first False\n" in shown
    assert "unusual     unet.up_transformer_layers (0, 1)\n" in shown
    checkpoint.save(tmp_path / "ours", found.config, found.params)
    assert checkpoint.read_config(tmp_path / "ours") == found.config
    assert "unusual     unet.frequency_shift 1.0\n" in describe(tmp_path / "ours")
    write_diffusers(tmp_path / "theirs", found.config, found.params)
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "theirs" / "unet")
    np.testing.assert_array_equal(reference_unet(back), reference_unet(model))
    assert main([str(tmp_path / "ours"), str(tmp_path / "one.safetensors")]) == 0
    assert "other programs cannot learn this from one.safetensors: unet.cosine_first False" in capsys.readouterr().err
    assert convert.read(tmp_path / "one.safetensors").config == found.config


def test_a_part_from_another_folder_comes_with_its_own_configuration(folder, tmp_path):
    values = {"scaling_factor": 0.5, "use_quant_conv": False, "layers_per_block": 2}
    build("vae", values).save_pretrained(tmp_path / "vae")
    build("text", {"hidden_act": "gelu", "layer_norm_eps": 1e-6}).save_pretrained(tmp_path / "other/text_encoder")
    found = convert.read(folder, vae=tmp_path / "vae", text_encoder=tmp_path / "other").config
    assert found.vae == dataclasses.replace(SMALL.vae, scaling_factor=0.5, quant_conv=False, res_blocks=2)
    assert found.clip == dataclasses.replace(SMALL.clip, activation="gelu", epsilon=1e-6)
    assert found.unet == SMALL.unet
    build("text", {"hidden_size": 64}).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"config\.json: does not go with the rest"):
        convert.read(folder, text_encoder=tmp_path / "wide")


# Our own configuration


def test_configurations_written_before_these_entries_are_read_and_written_as_they_were():
    old = json.loads(SD15.to_json())
    assert set(old["unet"]) == {
        *("in_channels", "out_channels", "channels", "attention", "heads", "res_blocks", "transformer_layers"),
        *("context_width", "groups", "linear_projection"),
    }
    assert set(old["schedule"]) == {"steps", "beta_start", "beta_end", "curve", "prediction", "zero_terminal_snr"}
    assert ModelConfig.from_json(json.dumps(old)) == SD15


def test_the_seal_of_the_model_in_the_box_is_still_valid():
    config, shapes = checkpoint.read_config(BOX_FOLDER), checkpoint.metadata(BOX_FOLDER)
    assert (BOX_FOLDER / "seal").read_text() == checkpoint._seal(config, shapes)


def test_usual_models_have_nothing_unusual():
    assert unusual(SD15) == []
    late = dataclasses.replace(SD15, schedule=ScheduleConfig(trained_betas=(0.01,) * 1000))
    assert unusual(late) == ["schedule.trained_betas of 1000 values"]


# Notes and refusals


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("unet", {"new_field": 3}, "new_field = 3"),
        ("vae", {"shift_factor": 0.1}, "shift_factor = 0.1"),
        ("scheduler", {"thresholding": True}, "thresholding = True"),
        ("unet", {"sample_size": [8, 16]}, "sample_size"),
    ],
)
def test_what_has_no_effect_is_named(described, part, values, says):
    change(described / FILES[part][0], values | {"_private": 1, "another_new_field": None})
    (note,) = folder_config(described)[1]
    assert says in note
    assert FILES[part][0] in note


def test_what_earlier_versions_write_of_other_tasks_needs_no_word(described):
    whole = {"is_decoder": False, "num_beams": 1, "top_k": 50, "id2label": {"0": "LABEL_0"}, "pruned_heads": {}}
    change(described / "text_encoder/config.json", whole | {"tie_word_embeddings": True, "use_bfloat16": False})
    token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}
    settings = {"errors": "replace", "max_length": 77, "stride": 0, "truncation_strategy": "longest_first"}
    engine = {"unk_token": token, "add_bos_token": False, "padding": "max_length", "pad_token_type_id": 0}
    (described / "tokenizer").mkdir()
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    (described / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (described / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (described / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings | engine))
    assert folder_config(described)[1] == []


def test_a_note_reaches_the_report(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    change(copy / "unet/config.json", {"new_field": 3})
    assert any("new_field" in note for note in convert.inspect(copy)[1].notes)


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ("unet/config.json", {"up_block_types": ["KUpBlock2D"] * 2}, "up_block_types"),
        ("unet/config.json", {"dual_cross_attention": True}, "dual_cross_attention"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds"),
        ("unet/config.json", {"encoder_hid_dim": 64}, "encoder_hid_dim"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type"),
        ("unet/config.json", {"conv_in_kernel": 4}, "conv_in_kernel"),
        ("unet/config.json", {"freq_shift": 8}, "freq_shift"),
        ("unet/config.json", {"cross_attention_dim": [32, 64]}, "cross_attention_dim"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups"),
        ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "_class_name"),
        ("vae/config.json", {"out_channels": 4}, "out_channels"),
        ("text_encoder/config.json", {"model_type": "xlm-roberta"}, "model_type"),
        ("text_encoder/config.json", {"pruned_heads": {"1": [0]}}, "pruned_heads"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.99}, "no signal"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1}, "num_train_timesteps must be at least 2"),
        ("model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "FlowMatch"),
        ("model_index.json", {"text_encoder": ["alt_diffusion", "RobertaSeriesModel"]}, "RobertaSeriesModel"),
        ("model_index.json", {"depth_estimator": ["transformers", "DPTForDepthEstimation"]}, "depth_estimator"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_architectures_are_refused_by_name(described, file, values, says):
    change(described / file, values)
    with pytest.raises(CheckpointError, match=says) as error:
        folder_config(described)
    assert "\n" not in str(error.value)


NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([-(10**9), 10**9, 10**400, 2**63, 0.5, 1e-5, 1e308, 1e-320]))
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=8), st.sampled_from(["silu", "gelu"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
PLACES = [(file, name) for part, (file, table) in FILES.items() for name in (*table, *EARLIER[part], "_class_name")]
PLACES += [("model_index.json", name) for name in ("_class_name", "unet", "scheduler", "adapter", "new\npart")]


@FUZZ
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_any_value_of_any_entry_gives_a_configuration_or_one_clear_line(described, changes):
    written = diffusers_json(SMALL)
    for (file, name), value in changes:
        written[file][name] = value
    for path, content in written.items():
        (described / path).write_text(json.dumps(content))
    found = outcome(described)
    if isinstance(found, str):
        assert str(described) in found
        lines = [found]
    else:
        config, lines = found
        assert config == ModelConfig.from_json(config.to_json())
    assert all("\n" not in line and len(line.replace(str(described), "")) < 700 for line in lines)


# The tokenizer


def write_vocabulary(folder, **files):
    """A tokenizer of the 256 byte symbols, a few of which stand for words, and its JSON files."""
    folder.mkdir(exist_ok=True)
    symbols = ["!", "a", "b", "!</w>", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"tokenizer_class": "CLIPTokenizer"}},
        {"tokenizer_config": {"pad_token": "!"}},
        {"tokenizer_config": {"pad_token": {"__type": "AddedToken"} | token("!")}},
        {"tokenizer_config": {"pad_token": "<|endoftext|>"}, "special_tokens_map": {"pad_token": "!"}},
        {"tokenizer_config": {"pad_token": "!"}, "special_tokens_map": {"pad_token": token("<|endoftext|>")}},
        {
            "tokenizer_config": {"pad_token": "!", "added_tokens_decoder": {"0": token("!")}},
            "special_tokens_map": {"pad_token": "<|endoftext|>"},
        },
        {"special_tokens_map": {"pad_token": "!"}},
    ],
    ids=range(7),
)
def test_the_padding_is_that_of_transformers(described, files):
    """Of two files that disagree, as Stable Diffusion 2's do, the same one wins."""
    change(described / "text_encoder/config.json", {"vocab_size": 8, "bos_token_id": 6, "eos_token_id": 7})
    write_vocabulary(described / "tokenizer", **files)
    expected = CLIPTokenizer.from_pretrained(described / "tokenizer").pad_token_id
    assert config_of(described).clip.pad_token == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class"),
        ({"pad_token": "[PAD]"}, "pad_token"),
        ({"model_max_length": 16}, "model_max_length"),
        ({"padding_side": "left"}, "padding_side"),
        ({"eos_token": "</s>"}, "eos_token"),
        ([], "JSON object"),
    ],
)
def test_other_tokenizers_are_refused(described, content, says):
    write_vocabulary(described / "tokenizer", tokenizer_config=content)
    with pytest.raises(CheckpointError, match=says):
        folder_config(described)


def test_added_tokens_that_no_vocabulary_file_has_are_named(described):
    change(described / "text_encoder/config.json", {"vocab_size": 8})
    write_vocabulary(described / "tokenizer", tokenizer_config={"added_tokens_decoder": {"8": token("<cat>")}})
    (note,) = folder_config(described)[1]
    assert "<cat>" in note


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [({}, "a c\n"), ({}, "a\n"), *(({"x": wrong}, "#version: 0.2\n") for wrong in (-1, 2**40, "1", None))],
)
def test_a_damaged_vocabulary_is_one_clear_line(described, vocabulary, merges):
    write_vocabulary(described / "tokenizer", tokenizer_config={})
    change(described / "tokenizer/vocab.json", vocabulary)
    (described / "tokenizer/merges.txt").write_text(merges)
    with pytest.raises(CheckpointError, match="not a CLIP tokenizer") as error:
        folder_config(described)
    assert "\n" not in str(error.value)


TOKENIZER_NAMES = [*TOKENIZER, *EARLIER["tokenizer"]]


@FUZZ
@given(content=st.dictionaries(st.sampled_from(TOKENIZER_NAMES), VALUES, max_size=3))
def test_any_value_in_a_tokenizer_s_settings_gives_a_configuration_or_one_clear_line(described, content):
    change(described / "text_encoder/config.json", {"vocab_size": 8})
    write_vocabulary(described / "tokenizer", tokenizer_config=content)
    found = outcome(described)
    if isinstance(found, str):
        assert str(described) in found
        assert "\n" not in found
