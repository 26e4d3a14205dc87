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
from convert.diffusers_config import diffusers_json, folder_config
from convert.diffusers_fields import EARLIER, SCHEDULER, SCHEDULERS, TEXT, TOKENIZER, UNET, VAE
from convert.source import CheckpointError
from convert.write import write_diffusers
from sdjax import checkpoint
from sdjax.config import SD15, TINY, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig, unusual
from sdjax.diffusion.schedule import noise_schedule
from sdjax.load import BOX_FOLDER, describe
from sdjax.models.clip import TextEncoder
from sdjax.models.params import random_params
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE as Autoencoder
from sdjax.selftest import noise, relative_error
from tests.checkpoint_files import FUZZ

BOUND = 2e-5  # relative, in float32
SMALL = dataclasses.replace(
    TINY,
    name="small",
    clip=CLIPConfig(width=32, layers=2, heads=2, mlp_width=64),
    vae=VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(True, False), heads=(2, 4), res_blocks=1, context_width=32, groups=8),
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


OTHER = {
    "unet": {
        "sample_size": 32,
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
        "in_channels": None,  # with out_channels, below
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
        assert honoured == set(OTHER[part]) - {"in_channels" if part == "vae" else ""} | TOGETHER[part]
