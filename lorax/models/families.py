"""The model families of lorax: their modules, inputs and outputs."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax.interop.hf import Source
from lorax.models import (
    bert,
    clip,
    deberta,
    decoder,
    decoder_families,
    dit,
    falcon,
    gpt2,
    unet,
    vision,
    vit,
)

#: Hugging Face's model_type, or diffusers' _class_name -> (module with its layout in their files,
#: its Linen class)
FAMILIES = {
    "gpt2": (gpt2, gpt2.GPT2),
    **dict.fromkeys(decoder_families.FAMILIES, (decoder_families, decoder.Decoder)),
    "falcon": (falcon, falcon.Falcon),
    **dict.fromkeys(("bert", "roberta"), (bert, bert.BERT)),
    "deberta-v2": (deberta, deberta.DeBERTa),
    "clip_text_model": (clip, clip.TextEncoder),
    "vit": (vit, vit.ViT),
    "mlp": (vision, vision.MLP),
    "lenet": (vision, vision.LeNet),
    "DiTTransformer2DModel": (dit, dit.DiT),
    "UNet2DConditionModel": (unet, unet.UNet),
}
#: Names that older files give a family.
ALIASES = {"Transformer2DModel": "DiTTransformer2DModel"}
CAUSAL = ("gpt2", *decoder_families.FAMILIES, "falcon")
#: Diffusion models: called as module(x, t, condition), with a `condition` in their configs.
DIFFUSION = ("DiTTransformer2DModel", "UNet2DConditionModel")
#: Families that read images.
IMAGES = ("vit", "mlp", "lenet", *DIFFUSION)
#: Families without pretrained weights: the whole network is initialised at random, not just a head.
WHOLE = ("mlp", "lenet")


class Traits(NamedTuple):
    """A model's inputs and outputs, and how it is stored.

    causal: whether it is a language model: tokens (B, T) int32 -> logits (B, T, V) float32, where
        the logits of a position depend only on the tokens up to it. Such a module has `hidden`,
        `logits` and `empty_cache` (see `gpt2.GPT2`), and `head` names the parameters that `logits`
        reads.
    input_shape: shape of one float32 input array; None for a model that reads tokens.
    smallest_shape: of a model that takes arrays of any size, the smallest that it takes.
    flat: whether it takes an array of any shape with as many numbers as `input_shape`.
    condition: shape and dtype of what one image of a diffusion model is made from, None for other
        models. Such a model is called with noisy images x (B, height, width, channels), timesteps
        t (B,), from 0 to 999, and conditions (B, ...): classes () int32, or the hidden states
        (tokens, features) float32 of a text. It returns an array like x, or one of twice the
        channels, of which the second half says what the variance is.
    no_class: the class "none" of a diffusion model that has one, for rows whose class is dropped.
    outputs: number of scores, (B, outputs) float32; None for a model without scores.
    positions: the longest input in tokens, None without a limit.
    array_positions: positions that one array becomes inside (ViT: its patches and the class token;
        a diffusion model: its patches or pixels).
    stream: whether the outputs of its layers can be captured (`nn.scan`ned, called "h").
    head: first path components of the parameters that turn hidden states into logits.
    packs: whether it takes `segments`, so that several texts share a row without seeing each other.
    sources: {parameter path: its place in Hugging Face's tensors}.
    config: the fields of the config.json that goes with these tensors.
    whole: paths of kernels that the module also reads in a way for which an operator leaf has to be
        made a plain kernel (NNX modules).
    notes: what a user should know about the model, a line each.
    """

    causal: bool = False
    input_shape: tuple[int, ...] | None = None
    smallest_shape: tuple[int, ...] | None = None
    flat: bool = False
    condition: jax.ShapeDtypeStruct | None = None
    no_class: int | None = None
    outputs: int | None = None
    positions: int | None = None
    array_positions: int = 1
    stream: bool = False
    head: tuple[str, ...] = ()
    packs: bool = True
    sources: Mapping[str, Source] = {}
    config: Mapping = {}
    whole: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def examples(self) -> tuple[jax.Array, ...]:
        """The smallest inputs of the model, all zeros: a batch of one token, or of one array, with
        its timestep and condition for a diffusion model."""
        if self.input_shape is None:
            return (jnp.zeros((1, 1), jnp.int32),)
        array = jnp.zeros((1, *(self.smallest_shape or self.input_shape)), jnp.float32)
        if self.condition is None:
            return (array,)
        condition = jnp.zeros((1, *self.condition.shape), self.condition.dtype)
        return array, jnp.zeros(1, jnp.int32), condition


def traits(family: str, config) -> Traits:
    """The traits of a shipped family's model; config: the family's Config."""
    layout, model = FAMILIES[family]
    images, causal, diffusion = (family in kind for kind in (IMAGES, CAUSAL, DIFFUSION))
    scores = images and not diffusion or getattr(config, "head", None) == "classification"
    return Traits(
        causal=causal,
        input_shape=config.image_shape if images else None,
        smallest_shape=getattr(config, "smallest_shape", None),
        flat=family == "mlp",
        condition=config.condition if diffusion else None,
        no_class=getattr(config, "no_class", None),
        outputs=config.labels if scores else None,
        positions=None if images else _positions(config),
        array_positions=getattr(config, "positions", 1) if images else 1,
        stream=not images,
        head=() if images else model.head,
        sources=layout.hf_tensors(config),
        config=layout.hf_config(config),
    )


def _positions(config) -> int:
    if isinstance(config, gpt2.Config):
        return config.n_positions
    return config.max_position_embeddings - getattr(config, "first_position", 0)
