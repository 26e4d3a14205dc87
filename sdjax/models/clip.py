"""CLIP: pre-norm transformers over text, causal, and over pictures (Radford et al. 2021, section 2.4).

Stable Diffusion uses the text encoder alone; the image encoder is what the text encoder is learnt with. Stable
Diffusion 1 has OpenAI's ViT-L/14 (quick-GELU, last hidden state), Stable Diffusion 2 OpenCLIP's ViT-H/14 (exact GELU,
penultimate hidden state). Neither masks padding: padded positions are attended to.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from sdjax.config import CLIPConfig, CLIPVisionConfig
from sdjax.models.layers import ACTIVATIONS, Conv, Dense, LayerNorm, attention
from sdjax.types import Array

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the red, green and blue of CLIP's training pictures, in [0, 1]."""

PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviation, in the same units."""


class TextOutput(NamedTuple):
    """last_hidden_state: f[b, l, d] after the final norm, `config.skip` layers left out.

    hidden_states: layers + 1 arrays f[b, l, d] without the final norm: the embeddings, then the
    output of every layer.
    pooled: f[b, projection], the last layer's state at the first end-of-text token, projected; None
    without that matrix.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...]
    pooled: Array | None


class SelfAttention(nn.Module):
    width: int
    heads: int
    causal: bool = True

    def setup(self) -> None:
        self.q = Dense(self.width)
        self.k = Dense(self.width)
        self.v = Dense(self.width)
        self.out = Dense(self.width)

    def __call__(self, x: Array, seen: Array | None = None) -> Array:
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        mixed = attention(split(self.q(x)), split(self.k(x)), split(self.v(x)), seen, causal=self.causal)
        return self.out(mixed.reshape(x.shape))


class Layer(nn.Module):
    config: CLIPConfig | CLIPVisionConfig
    causal: bool = True
    epsilon: float = 1e-5

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.epsilon)
        self.attention = SelfAttention(self.config.width, self.config.heads, self.causal)
        self.norm2 = LayerNorm(self.epsilon)
        self.fc1 = Dense(self.config.mlp_width)
        self.fc2 = Dense(self.config.width)

    def __call__(self, x: Array, seen: Array | None = None) -> Array:
        x = x + self.attention(self.norm1(x), seen)
        return x + self.fc2(ACTIVATIONS[self.config.activation](self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """Token ids i32[b, l] with l <= config.length -> TextOutput."""

    config: CLIPConfig

    def setup(self) -> None:
        config = self.config
        small = nn.initializers.normal(0.02)
        self.token_embedding = self.param("token_embedding", small, (config.vocab_size, config.width))
        self.position_embedding = self.param("position_embedding", small, (config.length, config.width))
        self.layer = [Layer(config, epsilon=config.epsilon) for _ in range(config.layers)]
        self.final_norm = LayerNorm(config.epsilon)
        if config.projection is not None:
            self.projection = Dense(config.projection, bias=False)
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(jnp.log(1 / 0.07)), ())

    def __call__(
        self, ids: Array, skip: int | None = None, *, vectors: Array | None = None, seen: Array | None = None
    ) -> TextOutput:
        """Texts, encoded.

        skip: overrides `config.skip`: 1 leaves out the last layer ("clip skip 2" in other tools), and so on.
        vectors: f[pictures, n, d], embeddings that were learnt since; id vocab_size + i is number i of the picture that
            a text belongs to, each picture having as many texts as any other.
        seen: bool[b, l], tokens that others may attend to; None: all.

        Raises:
            ValueError: `skip` is not in [0, layers).
        """
        skip = self.config.skip if skip is None else skip
        if not 0 <= skip < self.config.layers:
            raise ValueError(f"skip must lie in [0, {self.config.layers}), found {skip}")
        x = self.token_embedding[ids]
        if vectors is not None:
            picture = jnp.arange(ids.shape[0])[:, None] // (ids.shape[0] // vectors.shape[0])
            learnt = vectors[picture, jnp.maximum(ids - self.config.vocab_size, 0)]
            x = jnp.where(ids[..., None] >= self.config.vocab_size, learnt.astype(x.dtype), x)
        hidden_states = [x + self.position_embedding[: ids.shape[1]]]
        for layer in self.layer:
            hidden_states.append(layer(hidden_states[-1], seen))
        last_hidden_state = self.final_norm(hidden_states[-1 - skip])
        pooled = None
        if self.config.projection is not None:
            end = jnp.argmax(ids == self.config.end, axis=1)
            states = self.final_norm(hidden_states[-1])
            pooled = self.projection(states[jnp.arange(ids.shape[0]), end])
        return TextOutput(last_hidden_state, tuple(hidden_states), pooled)


class ImageEncoder(nn.Module):
    """Pictures f[b, H, W, 3] in [-1, 1], H = W = config.image_size -> f[b, projection], not normalised.

    CLIP's own standardisation of the pixels happens inside.
    """

    config: CLIPVisionConfig

    def setup(self) -> None:
        config = self.config
        patches = (config.image_size // config.patch) ** 2
        small = nn.initializers.normal(config.width**-0.5)
        self.patch_embedding = Conv(config.width, size=config.patch, stride=config.patch, padding=(0, 0), bias=False)
        self.class_embedding = self.param("class_embedding", small, (config.width,))
        self.position_embedding = self.param("position_embedding", small, (1 + patches, config.width))
        self.pre_norm = LayerNorm()
        self.layer = [Layer(config, causal=False) for _ in range(config.layers)]
        self.post_norm = LayerNorm()
        self.projection = Dense(config.projection, bias=False)

    def __call__(self, images: Array) -> Array:
        """The embeddings of a batch of pictures.

        Raises:
            ValueError: pictures of another size.
        """
        b, size = images.shape[0], self.config.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be f[b, {size}, {size}, 3], found shape {images.shape}")
        pixels = (0.5 * images + 0.5 - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
        patches = self.patch_embedding(pixels).reshape(b, -1, self.config.width)
        first = jnp.broadcast_to(self.class_embedding, (b, 1, self.config.width))
        x = self.pre_norm(jnp.concatenate([first, patches], axis=1) + self.position_embedding)
        for layer in self.layer:
            x = layer(x)
        return self.projection(self.post_norm(x[:, 0]))
