"""The three networks: published sizes, what each output may depend on, dtypes; Stable Diffusion 2's parts by PyTorch.

tests/parity compares the networks as wholes with PyTorch. Here are the identities, on models of a few thousand
parameters, and the parts that only Stable Diffusion 2 has.
"""

import dataclasses
import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from flax.traverse_util import flatten_dict
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdjax.config import SD15, SD15_INPAINT, SD21, TINY, CLIPConfig, UNetConfig, VAEConfig
from sdjax.devices.platform import use_platform
from sdjax.models.clip import TextEncoder
from sdjax.models.layers import SCORE_BOUND
from sdjax.models.params import abstract_params, count_parameters, random_params
from sdjax.models.unet import Transformer, UNet, timestep_embedding
from sdjax.models.vae import VAE, Posterior
from sdjax.pipeline.functions import predict_noise, transformed_kernels
from sdjax.storage.checkpoint import LAYOUT
from tests.arrays import equations, largest, normal

SMALL = dataclasses.replace(
    TINY,
    text=(CLIPConfig(vocab_size=64, length=12, width=32, layers=3, heads=2, mlp_width=64, projection=16, pad_token=0),),
    vae=VAEConfig(channels=(8, 8, 8, 16), res_blocks=1, groups=4),
    unet=UNetConfig(
        channels=(16, 32), transformer_layers=(1, 0), heads=(2, 4), res_blocks=1, context_width=32, groups=8
    ),
)
FOLLOWING = dataclasses.replace(SD15, name="following", unet=UNetConfig(in_channels=8))  # an image to follow
PARAMS = random_params(SMALL)
IDS = np.random.default_rng(0).integers(0, 63, (2, 12))
CONTEXT = normal(1, 4, 12, 32)
LATENT = normal(2, 2, 6, 10, 4)


@partial(jax.jit, static_argnames=("config", "method"))
def unet(params, *inputs, config=SMALL.unet, method=None):
    return UNet(config).apply({"params": params}, *inputs, method=method)


@partial(jax.jit, static_argnames="method")
def vae(params, inputs, method=None):
    return VAE(SMALL.vae).apply({"params": params}, inputs, method=method)


@partial(jax.jit, static_argnames="skip")
def text(params, ids, skip=None):
    return TextEncoder(SMALL.clip).apply({"params": params}, ids, skip)


def rows_of(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 0.5 + 0.2 * noise)


def norm_of(tensors, name):
    return dict(scale=tensors[name + ".weight"], bias=tensors[name + ".bias"])


def dense_of(tensors, name):
    bias = {"bias": tensors[name + ".bias"]} if name + ".bias" in tensors else {}
    return dict(kernel=tensors[name + ".weight"].T, **bias)


# Parameters


@pytest.mark.parametrize(
    ("config", "unet_count", "text_count"),
    [
        (SD15, 859_520_964, 123_060_480),
        (SD15_INPAINT, 859_535_364, 123_060_480),  # 5 channels more in the first convolution: 5 * 320 * 9
        (FOLLOWING, 859_532_484, 123_060_480),  # 4 more: 4 * 320 * 9
        (SD21, 865_910_724, 354_032_641),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_presets_have_the_published_number_of_parameters(config, unet_count, text_count):
    assert count_parameters(config) == {"text": text_count, "vae": 83_653_863, "unet": unet_count}


def test_shapes_of_parameters_take_no_memory():
    leaves = jax.tree.leaves(abstract_params(SD15))
    assert len(leaves) == 686 + 248 + 196  # 196: without position_ids, which files carry and no network needs
    assert all(type(leaf) is jax.ShapeDtypeStruct and leaf.dtype == jnp.float32 for leaf in leaves)


def test_other_names_or_shapes_of_parameters_take_another_number_of_layout():
    """Sealed checkpoints are trusted to fit the networks: if this fails, count `checkpoint.LAYOUT` up."""
    leaves = jax.tree.leaves_with_path([abstract_params(config) for config in (SD15, SD21, SMALL)])
    listed = "\n".join(f"{jax.tree_util.keystr(path)} {leaf.shape}" for path, leaf in leaves)
    assert (LAYOUT, hashlib.sha256(listed.encode()).hexdigest()[:16]) == (1, "046c20f19c010ff2")


def test_random_parameters_fill_every_leaf_by_their_seed_alone():
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(SMALL))
    assert jax.tree.map(np.shape, PARAMS) == shapes
    jax.tree.map(np.testing.assert_array_equal, PARAMS, random_params(SMALL, seed=0))
    other = random_params(SMALL, seed=1, dtype="bfloat16")
    for (path, one), two in zip(jax.tree.leaves_with_path(PARAMS), jax.tree.leaves(other), strict=True):
        assert two.dtype == jnp.bfloat16
        if path[-1].key != "logit_scale":
            assert not np.isin(one, (0, 1)).any()
            assert (one != two.astype(np.float32)).mean() > 0.9


# Text encoder


def test_text_encoder_hands_out_every_layer():
    found = text(PARAMS["text"], IDS)
    embedded = PARAMS["text"]["token_embedding"][IDS] + PARAMS["text"]["position_embedding"]
    assert [state.shape for state in found.hidden_states] == [(2, 12, 32)] * 4
    np.testing.assert_allclose(found.hidden_states[0], embedded, atol=1e-6)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_norms_an_earlier_layer(skip):
    found = text(PARAMS["text"], IDS, skip)
    state = np.asarray(found.hidden_states[3 - skip])
    normed = (state - state.mean(-1, keepdims=True)) / np.sqrt(state.var(-1, keepdims=True) + 1e-5)
    norm = PARAMS["text"]["final_norm"]
    np.testing.assert_allclose(found.last_hidden_state, normed * norm["scale"] + norm["bias"], atol=1e-4)
    np.testing.assert_array_equal(found.pooled, text(PARAMS["text"], IDS).pooled)  # always of the last layer


@pytest.mark.parametrize("skip", [-1, 3])
def test_clip_skip_out_of_range_is_refused(skip):
    with pytest.raises(ValueError, match=rf"skip must lie in \[0, 3\), found {skip}"):
        text(PARAMS["text"], IDS, skip)


def test_tokens_do_not_see_later_ones():
    changed = IDS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 63
    before, after = text(PARAMS["text"], IDS), text(PARAMS["text"], changed)
    for one, two in zip(before.hidden_states, after.hidden_states, strict=True):
        np.testing.assert_array_equal(one[:, :5], two[:, :5])
    difference = np.abs(before.last_hidden_state - after.last_hidden_state).max((0, 2))
    assert (difference[5:] > 1e-4).all(), "every token sees the earlier ones, padding included"


def test_a_short_text_needs_no_padding():
    whole, part = text(PARAMS["text"], IDS), text(PARAMS["text"], IDS[:, :7])
    np.testing.assert_allclose(part.last_hidden_state, whole.last_hidden_state[:, :7], atol=1e-5)


@torch.no_grad()
def test_the_text_tower_of_stable_diffusion_2_is_transformers():
    """Exact GELU, the penultimate layer, and the projection of the state at the first end-of-text token."""
    config = dataclasses.replace(SMALL.clip, activation="gelu", skip=1)
    sizes = dict(hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=3, num_attention_heads=2)
    special = dict(bos_token_id=62, eos_token_id=63, pad_token_id=0)
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=64, max_position_embeddings=12, hidden_act="gelu", **sizes, **special)
    ).eval()
    randomize(model)
    tensors = {name.removeprefix("text_model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    params = dict(
        token_embedding=tensors["embeddings.token_embedding.weight"],
        position_embedding=tensors["embeddings.position_embedding.weight"],
        final_norm=norm_of(tensors, "final_layer_norm"),
        projection=dense_of(tensors, "text_projection"),
        logit_scale=np.float32(0),
    )
    for i in range(3):
        layer = f"encoder.layers.{i}."
        names = dict(q="q_proj", k="k_proj", v="v_proj", out="out_proj")
        params[f"layer_{i}"] = dict(
            norm1=norm_of(tensors, layer + "layer_norm1"),
            attention={ours: dense_of(tensors, f"{layer}self_attn.{theirs}") for ours, theirs in names.items()},
            norm2=norm_of(tensors, layer + "layer_norm2"),
            fc1=dense_of(tensors, layer + "mlp.fc1"),
            fc2=dense_of(tensors, layer + "mlp.fc2"),
        )
    ids = IDS.copy()
    ids[0, 4:6] = ids[1, 9] = 63
    expected = model(torch.from_numpy(ids), output_hidden_states=True)
    found = TextEncoder(config).apply({"params": params}, ids)
    np.testing.assert_allclose(found.pooled, expected.text_embeds, atol=2e-5)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    penultimate = model.text_model.final_layer_norm(expected.hidden_states[-2])
    np.testing.assert_allclose(found.last_hidden_state, penultimate, atol=2e-5)


# Autoencoder


def test_pictures_of_any_size_divisible_by_8_go_through_the_autoencoder_by_its_mean():
    picture = np.tanh(normal(0, 2, 8, 24, 3))
    posterior = vae(PARAMS["vae"], picture, method="encode")
    assert posterior.mean.shape == posterior.logvar.shape == (2, 1, 3, 4)
    decoded = vae(PARAMS["vae"], posterior.mean, method="decode")
    assert decoded.shape == picture.shape
    np.testing.assert_allclose(vae(PARAMS["vae"], picture), decoded, atol=1e-5)
    encode = partial(VAE(SD15.vae).apply, method="encode")
    found = jax.eval_shape(encode, {"params": abstract_params(SD15)["vae"]}, shape(1, 520, 776, 3))
    assert found.mean.shape == (1, 65, 97, 4)


def test_log_variance_is_clipped_to_what_float32_can_square():
    moments = np.array([0.5, -0.5, 100.0, -100.0, -100.0, 100.0, -3.0, 5.0], np.float32)  # four means, four logvars
    quant_conv = dict(kernel=np.zeros((1, 1, 8, 8), np.float32), bias=moments)
    posterior = vae({**PARAMS["vae"], "quant_conv": quant_conv}, normal(0, 2, 8, 24, 3), method="encode")
    np.testing.assert_array_equal(posterior.mean[0, 0, 0], moments[:4])
    np.testing.assert_array_equal(posterior.logvar[0, 0, 0], [-30, 20, -3, 5])


def test_a_sample_of_the_posterior_has_its_mean_and_variance():
    posterior = Posterior(jnp.full((1, 200, 200, 1), 3.0), jnp.full((1, 200, 200, 1), 2 * jnp.log(0.5)))
    draw = posterior.sample(jax.random.key(0))
    np.testing.assert_allclose([draw.mean(), draw.std()], [3, 0.5], atol=0.01)
    np.testing.assert_array_equal(draw, posterior.sample(jax.random.key(0)))
    assert (draw != posterior.sample(jax.random.key(1))).mean() > 0.99
    sharp = Posterior(posterior.mean, jnp.full_like(posterior.mean, -30.0))
    np.testing.assert_allclose(sharp.sample(jax.random.key(0)), 3, atol=1e-5)


# UNet


def test_channels_behind_the_latent_change_nothing_until_their_kernels_do():
    config = dataclasses.replace(SMALL.unet, in_channels=9)
    concat = normal(5, 2, 6, 10, 5)
    kernel = PARAMS["unet"]["conv_in"]["kernel"]
    wide = np.concatenate([kernel, np.zeros((3, 3, 5, 16), np.float32)], axis=2)
    params = {**PARAMS["unet"], "conv_in": {**PARAMS["unet"]["conv_in"], "kernel": wide}}
    inputs = np.concatenate([LATENT, concat], -1), np.float32([500, 20]), CONTEXT[:2]
    plain = unet(PARAMS["unet"], LATENT, *inputs[1:])
    np.testing.assert_allclose(unet(params, *inputs, config=config), plain, atol=1e-5)
    wide[:, :, 4:] = 0.1
    assert np.abs(unet(params, *inputs, config=config) - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "size"),
    [(SD15, (96, 13)), (FOLLOWING, (1, 1)), (SD15_INPAINT, (5, 7))],
    ids=["4 channels", "8 channels", "9 channels"],
)
def test_latents_of_any_size_and_any_channels_behind_them_give_a_latent_of_that_size(config, size):
    inputs = shape(2, *size, config.unet.in_channels), shape(2), shape(2, 77, 768)
    found = jax.eval_shape(partial(unet, config=config.unet), abstract_params(config)["unet"], *inputs)
    assert found.shape == (2, *size, 4)


def test_images_of_a_batch_do_not_see_each_other():
    """The second image, its timestep and its text change, the first one's prediction does not."""
    t = np.float32([500, 20])
    found = unet(PARAMS["unet"], LATENT, t, CONTEXT[:2])
    other = unet(PARAMS["unet"], LATENT * [[[[1.0]]], [[[2.0]]]], t * [1, 2], CONTEXT[[0, 3]])
    np.testing.assert_array_equal(found[0], other[0])
    assert np.abs(found[1] - other[1]).max() > 0.1


def test_timestep_embedding_is_cosines_then_sines():
    t = np.array([0, 1, 400.5, 999])
    angles = t[:, None] * 10000.0 ** (-np.arange(160) / 160)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 320), expected, atol=2e-4)
    whole = timestep_embedding(jnp.array([7]), 320)
    np.testing.assert_array_equal(whole, timestep_embedding(jnp.array([7.0]), 320))


def test_the_time_table_of_many_steps_is_the_table_of_each():
    t = np.float32([[999, 500.5], [20, 1]])
    table = unet(PARAMS["unet"], t, method="embed_timesteps")
    for i, j in np.ndindex(2, 2):
        one = unet(PARAMS["unet"], t[i, j], method="embed_timesteps")
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), rows_of(table, (i, j)), one)


def test_the_parts_of_the_network_make_the_whole():
    """Shifts for one t common to all rows, and keys and values of all prompts at once."""
    kv = unet(PARAMS["unet"], CONTEXT, method="text_kv")
    time = unet(PARAMS["unet"], np.float32(700), method="embed_timesteps")
    found = unet(PARAMS["unet"], LATENT, time, rows_of(kv, slice(0, 2)), method="predict")
    np.testing.assert_allclose(found, unet(PARAMS["unet"], LATENT, np.full(2, 700.0), CONTEXT[:2]), atol=2e-5)


@pytest.mark.parametrize("attention", [(True, False), (False, False)], ids=["from the top", "in the middle"])
def test_several_prompts_for_one_latent_are_separate_calls(attention):
    """Row i of the latents meets prompts i and i + 2, wherever the text enters first."""
    config = dataclasses.replace(SMALL.unet, transformer_layers=tuple(map(int, attention)))
    params = random_params(dataclasses.replace(SMALL, unet=config))["unet"]
    kv = unet(params, CONTEXT, config=config, method="text_kv")
    time = unet(params, np.float32(700), config=config, method="embed_timesteps")
    predict = partial(unet, params, LATENT, time, config=config, method="predict")
    first, second = predict(rows_of(kv, slice(0, 2))), predict(rows_of(kv, slice(2, 4)))
    np.testing.assert_allclose(predict(kv), np.concatenate([first, second]), atol=5e-5)
    assert np.abs(first - second).max() > 1e-2


def test_what_comes_before_the_text_is_computed_once_for_all_prompts():
    kv = unet(PARAMS["unet"], CONTEXT, method="text_kv")
    time = unet(PARAMS["unet"], np.float32(700), method="embed_timesteps")
    predict = partial(UNet(SMALL.unet).apply, {"params": PARAMS["unet"]}, method="predict")
    with use_platform("gpu"):  # where a convolution is one operation
        traced = jax.make_jaxpr(predict)(LATENT, time, kv)
    rows = [
        equation.outvars[0].aval.shape[0]
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    ]
    assert rows == [2] * 3 + [4] * (len(rows) - 3)  # conv_in and the first residual block


def test_a_loop_over_steps_has_its_kernels_transformed_once_before_it():
    config = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, channels=(64, 96), heads=(2, 2)))
    x = normal(3, 1, 48, 32, 4)
    params = random_params(config)["unet"]
    ready = transformed_kernels({"unet": params}, x, config=config)
    names = {"/".join(path) for path in flatten_dict(ready)}
    assert "down_0/res_0/conv1/kernel" in names
    assert "up_1/res_1/conv2/kernel" in names  # of the finer level
    assert "mid/res_0/conv1/kernel" not in names  # too few positions
    assert "conv_in/kernel" not in names  # too few features
    time, kv = (
        UNet(config.unet).apply({"params": params}, *of, method=name)
        for name, *of in (("embed_timesteps", jnp.array([7])), ("text_kv", CONTEXT[:1]))
    )
    predict = partial(predict_noise, params, x, time, kv, config=config)

    def transforms(transformed):
        """How many kernels are transformed inside: products with 16 rows of 9."""
        traced = jax.make_jaxpr(lambda: predict(transformed=transformed))()
        return sum(
            equation.primitive.name == "dot_general" and equation.invars[0].aval.shape == (16, 9)
            for equation in equations(traced.jaxpr)
        )

    assert transforms(ready) == 0
    assert transforms(None) > 0
    np.testing.assert_allclose(predict(transformed=ready), predict(transformed=None), atol=2e-5)
    with use_platform("tpu"):
        assert transformed_kernels({"unet": params}, x, config=config) == {}
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert transformed_kernels({"unet": halves}, x, config=config) == {}


def test_heads_follow_the_level():
    """64 channels for every head in Stable Diffusion 2.1, 8 heads in 1.5."""
    for config, expected in ((SD15, (8, 8, 8, 8)), (SD21, (5, 10, 20, 20))):
        context = shape(2, 77, config.unet.context_width)
        kv = jax.eval_shape(
            partial(unet, config=config.unet, method="text_kv"), abstract_params(config)["unet"], context
        )
        levels = [{leaf.shape for leaf in jax.tree.leaves(part)} for part in kv]
        attending = [{(2, 77, n, c // n)} for n, c in zip(expected, config.unet.channels, strict=True)]
        down, middle = [*attending[:3], set()], attending[3]
        assert levels == [*down, middle, *down[::-1]]


@torch.no_grad()
def test_the_transformer_of_stable_diffusion_2_is_diffusers():
    """Linear projections, heads of a fixed width, several layers."""
    model = Transformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=32,
        num_layers=2,
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    ).eval()
    randomize(model)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = dict(
        norm=norm_of(tensors, "norm"), proj_in=dense_of(tensors, "proj_in"), proj_out=dense_of(tensors, "proj_out")
    )
    for i in range(2):
        layer = f"transformer_blocks.{i}."
        names = dict(q="to_q", k="to_k", v="to_v", out="to_out.0")
        params[f"layer_{i}"] = {f"norm{k}": norm_of(tensors, f"{layer}norm{k}") for k in (1, 2, 3)} | {
            block: {ours: dense_of(tensors, f"{layer}{place}.{theirs}") for ours, theirs in names.items()}
            for block, place in (("self_attention", "attn1"), ("cross_attention", "attn2"))
        }
        params[f"layer_{i}"] |= dict(
            ff_in=dense_of(tensors, layer + "ff.net.0.proj"), ff_out=dense_of(tensors, layer + "ff.net.2")
        )
    x, context = normal(0, 2, 3, 5, 32), normal(1, 2, 7, 24)
    module = Transformer(width=32, heads=4, layers=2, groups=8)
    kv = module.apply({"params": params}, context, method="text_kv")
    expected = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(context)).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(module.apply({"params": params}, x, kv), expected, atol=1e-4)


# Dtypes and memory

NETWORKS = {
    "text": (TextEncoder(SMALL.clip), "text", [shape(2, 12, dtype=jnp.int32)], None),
    "unet": (UNet(SMALL.unet), "unet", [shape(2, 16, 16, 4), shape(2), shape(2, 12, 32)], None),
    "encode": (VAE(SMALL.vae), "vae", [shape(2, 128, 128, 3)], "encode"),
    "decode": (VAE(SMALL.vae), "vae", [shape(2, 16, 16, 4)], "decode"),
}


def is_broadcast(equation):
    """Whether it is layers.over_rows: a product that sums over one term only."""
    if equation.primitive.name != "dot_general":
        return False
    (contracted, _), _ = equation.params["dimension_numbers"]
    return all(equation.invars[0].aval.shape[axis] == 1 for axis in contracted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_products_have_the_dtype_of_the_parameters_and_norms_and_softmax_float32(name, dtype):
    module, part, inputs, method = NETWORKS[name]
    params = jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=dtype), abstract_params(SMALL)[part])
    traced = jax.make_jaxpr(partial(module.apply, method=method))({"params": params}, *inputs)
    found = {}
    for equation in equations(traced.jaxpr):
        operands = [variable.aval for variable in equation.invars if variable.aval.shape]
        if not is_broadcast(equation):
            found.setdefault(equation.primitive.name, set()).update(str(operand.dtype) for operand in operands)
    assert found["dot_general"] | found.get("conv_general_dilated", set()) == {dtype}
    assert found["rsqrt"] == found["exp"] == {"float32"}  # of norms; of softmax
    results = {str(variable.aval.dtype) for variable in traced.jaxpr.outvars}
    assert results == ({"float32"} if name == "encode" else {dtype})  # a posterior is float32


def test_float16_stays_close_to_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), PARAMS["unet"])
    inputs = LATENT, np.float32([500, 20]), CONTEXT[:2]
    expected, found = unet(PARAMS["unet"], *inputs), unet(half, *inputs).astype(np.float32)
    assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)


def test_the_full_size_network_holds_nothing_larger_than_the_bound():
    """One guided step at 768 pixels, where the scores of one attention alone would be ten times as large."""
    params = {"params": abstract_params(SD15)["unet"]}
    with use_platform("tpu"):
        held = largest(UNet(SD15.unet).apply, params, shape(2, 96, 96, 4), shape(2), shape(2, 77, 768))
    assert held <= SCORE_BOUND < 2 * 8 * (96 * 96) ** 2 / 10
