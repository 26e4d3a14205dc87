"""CLIP's image tower against transformers, and what its output may depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig as TorchConfig
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from sdjax.config import CLIPVisionConfig
from sdjax.models.clip import ImageEncoder
from tests.arrays import normal

SMALL = CLIPVisionConfig(image_size=24, patch=6, width=32, layers=3, heads=4, mlp_width=48, projection=20)
IMAGES = np.tanh(normal(0, 3, 24, 24, 3))


def torch_config(config):
    return TorchConfig(
        image_size=config.image_size,
        patch_size=config.patch,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        hidden_act=config.activation,
        projection_dim=config.projection,
    )


def converted(model, layers):
    """The parameters of transformers' model as our tree."""
    state = {name.removeprefix("vision_model."): value.numpy() for name, value in model.state_dict().items()}

    def dense(name):
        return {"kernel": state.pop(f"{name}.weight").T} | (
            {"bias": state.pop(f"{name}.bias")} if f"{name}.bias" in state else {}
        )

    def norm(name):
        return {"scale": state.pop(f"{name}.weight"), "bias": state.pop(f"{name}.bias")}

    tree = {
        "class_embedding": state.pop("embeddings.class_embedding"),
        "patch_embedding": {"kernel": state.pop("embeddings.patch_embedding.weight").transpose(2, 3, 1, 0)},
        "position_embedding": state.pop("embeddings.position_embedding.weight"),
        "pre_norm": norm("pre_layrnorm"),
        "post_norm": norm("post_layernorm"),
        "projection": dense("visual_projection"),
    }
    for i in range(layers):
        at = f"encoder.layers.{i}"
        tree[f"layer_{i}"] = {
            "norm1": norm(f"{at}.layer_norm1"),
            "attention": {name: dense(f"{at}.self_attn.{name}_proj") for name in ("q", "k", "v", "out")},
            "norm2": norm(f"{at}.layer_norm2"),
            "fc1": dense(f"{at}.mlp.fc1"),
            "fc2": dense(f"{at}.mlp.fc2"),
        }
    assert set(state) <= {"embeddings.position_ids"}
    return tree


def both(config):
    """transformers' model with random weights everywhere, and the same weights as our tree."""
    model = CLIPVisionModelWithProjection(torch_config(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.1 * values)
    return model, converted(model, config.layers)


@pytest.fixture(scope="module")
def params():
    return both(SMALL)[1]


@jax.jit
def encode(params, images):
    return ImageEncoder(SMALL).apply({"params": params}, images)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_image_tower_is_that_of_transformers(activation):
    config = CLIPVisionConfig(24, 6, 32, 3, 4, 48, activation, 20)
    model, params = both(config)
    pixels = (torch.from_numpy(IMAGES) / 2 + 0.5 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    with torch.no_grad():
        expected = model(pixels.permute(0, 3, 1, 2)).image_embeds.numpy()
    found = np.asarray(ImageEncoder(config).apply({"params": params}, IMAGES))
    assert found.shape == expected.shape == (3, 20)
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)


def test_the_trees_leaves_are_those_of_the_checkpoint(params):
    abstract = jax.eval_shape(ImageEncoder(SMALL).init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, abstract) == jax.tree.map(lambda leaf: leaf.shape, params)


def test_the_default_is_the_size_of_vit_l_14():
    config = CLIPVisionConfig()
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tree = jax.eval_shape(ImageEncoder(config).init, jax.random.key(0), image)["params"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(torch_config(config))
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert count == 303_179_776 + 1024 * 768  # the tower, and the projection into the joint space


def test_an_embedding_does_not_depend_on_the_batch(params):
    alone = encode(params, IMAGES[1:2])
    np.testing.assert_allclose(encode(params, IMAGES)[1:2], alone, rtol=1e-5, atol=1e-5)


def test_the_class_token_sees_every_patch(params):
    """It comes first: behind a causal mask it would see nothing but itself."""
    plain = encode(params, IMAGES[:1])
    for row, column in ((0, 0), (0, 23), (12, 9), (23, 23)):
        changed = IMAGES[:1].copy()
        changed[0, row, column] += 0.5
        assert np.abs(encode(params, changed) - plain).max() > 1e-3


def test_parameters_in_bfloat16_give_embeddings_in_bfloat16(params):
    halves = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    found, exact = encode(halves, IMAGES), encode(params, IMAGES)
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(found.astype(jnp.float32) - exact) < 3e-2 * np.linalg.norm(exact)


def test_pictures_of_another_size_are_refused(params):
    with pytest.raises(ValueError, match=r"images must be f\[b, 24, 24, 3\], found shape \(3, 24, 12, 3\)"):
        encode(params, IMAGES[:, :, :12])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 225}, "image_size 225 is not a multiple of patch 14"),
        ({"heads": 15}, "width 1024 is not a multiple of heads 15"),
    ],
)
def test_numbers_that_make_no_tower_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPVisionConfig(**fields)
