"""Images of texts: a pipeline of diffusers and lorax, with each other's adapters, make the same."""

import json

import jax
import numpy as np
import parity
import pytest
import small
from support import require

import lorax
from lorax import adapters, convert, sampling
from lorax.models.load import skeleton

UNET = dict(
    sample_size=8, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=12,
    attention_head_dim=2, layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
)  # fmt: skip
#: As in Stable Diffusion 1.
SCHEDULE = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
STEPS, GUIDANCE = 5, 3.0
rng = np.random.default_rng(0)
TEXTS = rng.normal(size=(2, 7, 12)).astype(np.float32)
EMPTY = rng.normal(size=(7, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(diffusers' pipeline of random weights, ours from its directory)."""
    torch, diffusers = require("torch"), require("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    small_vae = diffusers.AutoencoderKL(norm_num_groups=4, block_out_channels=(4,))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=small_vae, text_encoder=None, tokenizer=None, unet=unet, safety_checker=None,
        scheduler=diffusers.DDIMScheduler(**SCHEDULE), feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    directory = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(directory)
    return pipeline, lorax.load(str(directory))


def theirs(pipeline, base, guidance: float) -> np.ndarray:
    """Latents of diffusers' pipeline as (batch, height, width, channels)."""
    torch = require("torch")
    noise = np.asarray(sampling.noise(base, 0, range(len(TEXTS)))).transpose(0, 3, 1, 2)
    latents = pipeline(
        prompt_embeds=torch.tensor(TEXTS), guidance_scale=guidance, num_inference_steps=STEPS,
        negative_prompt_embeds=torch.tensor(np.stack([EMPTY, EMPTY])),
        latents=torch.tensor(noise.copy()), output_type="latent",
    )  # fmt: skip
    return latents.images.numpy().transpose(0, 2, 3, 1)


def ours(base, params) -> np.ndarray:
    return sampling.sample(
        base, TEXTS, params, steps=STEPS, guidance=GUIDANCE, none=EMPTY, as_pixels=False
    )


def check(pipeline, base, params) -> None:
    """The two make the same images, which are others without the adapter or without guidance."""
    expected = theirs(pipeline, base, GUIDANCE)
    np.testing.assert_allclose(ours(base, params), expected, rtol=0, atol=1e-3)
    assert np.abs(expected - theirs(pipeline, base, 1.0)).max() > 0.05
    pipeline.disable_lora()
    assert np.abs(expected - theirs(pipeline, base, GUIDANCE)).max() > 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what diffusers warns about is not ours
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_pipeline_with_our_adapter_makes_our_images(format, made, tmp_path):
    pipeline, base = made
    method = lorax.method("lora", rank=2, alpha=3, targets=("all-linear",))
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=small.noisy(state.trainable))
    assert not adapters.save(tmp_path / "peft", adapters.from_training(base, method, state))
    out = tmp_path / ("out.safetensors" if format == "kohya" else "out")
    assert convert.main(["to", format, str(tmp_path / "peft"), str(out)]) == 0
    pipeline.load_lora_weights(out)
    try:
        check(pipeline, base, method.bind(*state, base.params, sites=base.sites))
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what diffusers warns about is not ours
def test_an_adapter_of_a_pipeline_makes_its_images_here(made, tmp_path):
    peft, (pipeline, base) = require("peft"), made
    words = ["to_q", "to_v", "to_out.0", "net.2", "conv1", "conv_shortcut", "proj_in"]
    pipeline.unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=words))
    try:
        parity.disturb(pipeline.unet)
        pipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
            unet_lora_adapter_metadata=pipeline.unet.peft_config["default"].to_dict(),
        )
        check(pipeline, base, adapters.load(tmp_path, base).bind())
    finally:
        pipeline.unload_lora_weights()


@pytest.mark.parametrize(
    ("conditions", "settings", "message"),
    [
        ([1, 2], {}, r"conditions: \(2,\) given, must be \(N, tokens, 12\)"),
        (TEXTS[..., :5], {}, r"conditions: \(2, 7, 5\) given, must be \(N, tokens, 12\)"),
        (TEXTS, {"none": EMPTY[:3]}, r"none: \(3, 12\) given, must be \(7, 12\)"),
        (TEXTS, {"batch_size": 0}, "batch_size: 0 given, must be 1 or more"),
        (TEXTS, {"guidance": 2.0}, "guidance: 2 given, but .* reads texts: give `none`"),
    ],
)
def test_conditions_that_do_not_fit(conditions, settings, message, tmp_path):
    described = {"_class_name": "UNet2DConditionModel"} | UNET
    (tmp_path / "config.json").write_text(json.dumps(described))
    base = skeleton(f"random:{tmp_path}")
    with pytest.raises(ValueError, match=message):
        sampling.sample(base, conditions, **settings)


@pytest.mark.parametrize("wrong", [-1, 11, 1.5])
def test_classes_that_the_base_does_not_know(wrong):
    base = lorax.load("dit-digits")
    message = (
        f'conditions: class {wrong} given, must be a whole number from 0 to 9, or 10 for "none"'
    )
    with pytest.raises(ValueError, match=message):
        sampling.sample(base, [1, wrong])
