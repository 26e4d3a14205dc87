"""The configuration: JSON and back without loss, and one clear line for every entry that makes no model."""

import dataclasses
import json
import typing

import pytest

from sdjax.config import (
    BOX,
    PRESETS,
    SD15,
    SD15_INPAINT,
    SD21,
    SD21_BASE,
    TINY,
    CLIPConfig,
    ModelConfig,
    SamplerName,
    ScheduleConfig,
    Spacing,
    UNetConfig,
    VAEConfig,
)
from sdjax.diffusion import names
from sdjax.diffusion.noise import SOURCES
from sdjax.diffusion.samplers import SAMPLERS, TABLES
from sdjax.diffusion.spacings import SPACINGS
from sdjax.diffusion.upscale import LATENT_UPSCALERS, PICTURE_UPSCALERS

VARIATION = dataclasses.replace(
    TINY,
    name="variation é",
    text=(dataclasses.replace(TINY.clip, projection=32, skip=1, activation="gelu"),),
    vae=dataclasses.replace(TINY.vae, scaling_factor=0.1 + 0.2),
    unet=dataclasses.replace(TINY.unet, transformer_layers=(1, 0, 1, 0), linear_projection=True),
    schedule=ScheduleConfig(curve="linear", prediction="v", zero_terminal_snr=True, beta_end=1 / 3),
)


def refusal(text: str) -> str:
    """The message of the error that `from_json` raises: a ValueError and nothing else, in one line."""
    with pytest.raises(ValueError) as error:
        ModelConfig.from_json(text)
    message = str(error.value)
    assert "\n" not in message
    return message


def places(tree, path=()):
    """Every entry of the JSON as a path of names and list positions, the whole one left out."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def changed(path, value) -> str:
    """The JSON of `VARIATION` with the entry at `path` set to `value`."""
    data = json.loads(VARIATION.to_json())
    parent = data
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    return json.dumps(data)


def named(path) -> str:
    return "config" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


PLACES = list(places(json.loads(VARIATION.to_json())))
ENTRIES = [path for path in PLACES if not isinstance(path[-1], int)]


@pytest.mark.parametrize("config", [*PRESETS.values(), VARIATION], ids=lambda config: config.name)
def test_json_there_and_back_is_the_same_configuration(config):
    back = ModelConfig.from_json(config.to_json())
    assert back == config
    assert hash(back) == hash(config)
    assert back.to_json() == config.to_json()


def test_presets_are_listed_under_their_own_names():
    assert {name: config.name for name, config in PRESETS.items()} == {name: name for name in PRESETS}
    assert set(PRESETS.values()) == {SD15, SD15_INPAINT, SD21, SD21_BASE, TINY, BOX}


def test_the_names_that_a_configuration_takes_are_those_that_sampling_knows():
    assert list(typing.get_args(SamplerName)) == list(names.TRAITS) == list(SAMPLERS) == list(TABLES)
    assert list(typing.get_args(Spacing)) == list(names.ALL_SPACINGS) == list(SPACINGS)


def test_names_that_are_known_before_anything_is_loaded_are_those_of_what_there_is():
    assert list(names.UPSCALERS) == [*LATENT_UPSCALERS, *PICTURE_UPSCALERS]
    assert list(names.NOISES) == list(SOURCES)


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SD15.unet.in_channels = 9


@pytest.mark.parametrize("path", PLACES, ids=named)
def test_every_entry_of_the_wrong_type_is_named(path):
    for wrong in ({"a": 1}, [{}], 0 if path == ("name",) else "?"):
        assert refusal(changed(path, wrong)).startswith(named(path))


@pytest.mark.parametrize("path", ENTRIES, ids=named)
def test_every_missing_entry_is_named(path):
    data = json.loads(VARIATION.to_json())
    parent = data
    for name in path[:-1]:
        parent = parent[name]
    del parent[path[-1]]
    assert refusal(json.dumps(data)) == f"{named(path[:-1])}: missing entries ['{path[-1]}'], unknown entries []"


@pytest.mark.parametrize("where", [(), ("clip",), ("vae",), ("unet",), ("schedule",)], ids=named)
def test_an_unknown_entry_is_named(where):
    assert refusal(changed((*where, "colour"), 3)) == f"{named(where)}: missing entries [], unknown entries ['colour']"


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "nul", '{"name": "a" "clip": 1}', "[" * 100_000], ids=range(6))
def test_text_that_is_not_json_is_refused(text):
    assert refusal(text).startswith("config.json is not valid JSON")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"sd15"'])
def test_json_that_is_no_object_is_refused(text):
    assert refusal(text).startswith("config must be an object, found ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("unet", "in_channels"), 4.0),
        (("unet", "in_channels"), True),
        (("unet", "linear_projection"), 1),
        (("vae", "scaling_factor"), True),
        (("vae", "scaling_factor"), "0.18215"),
        (("vae", "scaling_factor"), 10**400),
        (("clip", "projection"), 1024.0),
        (("schedule", "curve"), "cosine"),
        (("schedule", "prediction"), "x0"),
        (("schedule", "prediction"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_are_never_converted_to_make_them_fit(path, value):
    assert refusal(changed(path, value)).startswith(named(path))


def test_a_whole_number_may_stand_for_a_float_and_null_for_what_is_optional():
    assert ModelConfig.from_json(changed(("vae", "scaling_factor"), 1)).vae.scaling_factor == 1.0
    assert ModelConfig.from_json(changed(("clip", "projection"), None)).clip.projection is None


NO_MODEL = [
    (("clip", "vocab_size"), 0),
    (("clip", "length"), -77),
    (("clip", "layers"), 10**9),
    (("clip", "heads"), 3),
    (("clip", "width"), 96),
    (("clip", "skip"), 2),
    (("clip", "skip"), -1),
    (("clip", "pad_token"), 49408),
    (("clip", "pad_token"), -1),
    (("clip", "projection"), 0),
    (("vae", "channels"), []),
    (("vae", "channels"), [16, 32, 32, 30]),
    (("vae", "channels"), [8] * 9),
    (("vae", "groups"), 0),
    (("vae", "latent_channels"), 8),
    (("vae", "scaling_factor"), 0.0),
    (("vae", "scaling_factor"), float("nan")),
    (("vae", "scaling_factor"), float("inf")),
    (("unet", "in_channels"), 3),
    (("unet", "out_channels"), 3),
    (("unet", "channels"), [32, 64, 64]),
    (("unet", "channels"), [32, 64, 64, 65]),
    (("unet", "attention"), [True]),
    (("unet", "heads"), [2, 2, 2, 7]),
    (("unet", "heads"), [2, 2, 2, 0]),
    (("unet", "res_blocks"), 0),
    (("unet", "context_width"), 768),
    (("unet", "groups"), 7),
    (("schedule", "steps"), 1),
    (("schedule", "steps"), 10**6),
    (("schedule", "beta_start"), 0.0),
    (("schedule", "beta_start"), 0.9),
    (("schedule", "beta_end"), 1.0),
    (("schedule", "beta_end"), float("nan")),
    (("image_size",), 100),
    (("image_size",), 0),
    (("image_size",), -64),
]


@pytest.mark.parametrize(("path", "value"), NO_MODEL, ids=lambda value: str(value))
def test_numbers_that_make_no_model_are_refused(path, value):
    message = refusal(changed(path, value))
    assert message.startswith("variation é: ")
    assert ("betas" if path[-1].startswith("beta_") else path[-1]) in message


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match=r"odd: unet\.context_width 512 is not clip\.width 768"):
        ModelConfig("odd", unet=UNetConfig(context_width=512))
    with pytest.raises(ValueError, match=r"clip\.skip 12 must lie in \[0, 12\)"):
        ModelConfig("odd", text=(CLIPConfig(skip=12),))


def test_downscale_is_the_side_of_a_latent_cell_in_pixels():
    assert VAEConfig().downscale == 8
    assert VAEConfig(channels=(32, 32)).downscale == 2
