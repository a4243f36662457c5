"""The U-Net against diffusers': outputs, files, options, and adapters in both directions."""

import copy
import dataclasses
import functools
import json

import jax
import numpy as np
import parity
import pytest
import small
from quick import jit
from support import few, require

import lorax
from lorax import adapters, convert, models, quant, tree
from lorax.methods import targets
from lorax.models import unet
from lorax.models.load import skeleton

SMALL = dict(
    sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=12,
    attention_head_dim=2, layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
CASES = {
    "as in Stable Diffusion 1": SMALL,
    "as in Stable Diffusion 2": SMALL | dict(
        attention_head_dim=(1, 4), use_linear_projection=True, upcast_attention=True,
    ),
    "each option": SMALL | dict(
        block_out_channels=(8, 16, 24), layers_per_block=(1, 2, 1), norm_num_groups=2,
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2D", flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3,
        downsample_padding=0, center_input_sample=True, conv_in_kernel=5, in_channels=3,
        out_channels=6, act_fn="swish",
    ),
    "no attention": SMALL | dict(
        down_block_types=2 * ("DownBlock2D",), up_block_types=2 * ("UpBlock2D",),
        mid_block_type=None, in_channels=5,
    ),
}  # fmt: skip
NAMES = [*CASES]
FIRST = NAMES[0]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """name -> (diffusers' model of random weights, ours from its directory)."""

    @functools.cache
    def made(name):
        torch, diffusers = require("torch"), require("diffusers")
        torch.manual_seed(0)
        theirs = diffusers.UNet2DConditionModel(**CASES[name]).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        directory = tmp_path_factory.mktemp("pipeline")
        theirs.save_pretrained(directory / "unet")
        (directory / "model_index.json").write_text("{}")
        return theirs, lorax.load(str(directory))

    return made


def inputs(config, size=(16, 16)):
    """x, t and the hidden states of 7 tokens, for two images."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    t = np.array([3, 917], np.int32)
    return draw(2, *size, config.in_channels), t, draw(2, 7, config.cross_attention_dim)


def predicted(theirs, x, t, context) -> np.ndarray:
    """diffusers' output as (batch, height, width, channels)."""
    torch = require("torch")
    x = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        y = theirs(x, torch.tensor(t), torch.tensor(context)).sample
    return y.numpy().transpose(0, 2, 3, 1)


@functools.lru_cache(maxsize=1)
def program(base):
    """Parameters -> our outputs, compiled once for equal trees."""
    run = jit(functools.partial(lorax.apply, base.module))
    return lambda params: np.asarray(run(params, *inputs(base.config)))


@pytest.mark.parametrize("name", few(NAMES, [FIRST]))
def test_it_predicts_what_diffusers_does(name, make):
    theirs, base = make(name)
    assert tree.flatten(base.params).keys() == {*base.sources}
    assert tree.count(base.params) == sum(p.numel() for p in theirs.parameters())
    expected = predicted(theirs, *inputs(base.config))
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(program(base)(base.params), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [FIRST, "each option"])
def test_images_whose_sides_are_not_halved_without_remainder(name, make):
    """The two pad a convolution that halves an image differently."""
    theirs, base = make(name)
    given = inputs(base.config, (10, 14))
    got = jit(functools.partial(lorax.apply, base.module))(base.params, *given)
    np.testing.assert_allclose(got, predicted(theirs, *given), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stable_diffusion_by_its_size():
    """runwayml/stable-diffusion-v1-5, unet/: 859,520,964 parameters."""
    base = skeleton("random:stable-diffusion-1-unet")
    assert tree.count(base.params) == 859_520_964
    assert base.input_shape == (64, 64, 4) and base.traits.condition.shape == (77, 768)


def test_diffusers_reads_what_is_saved(make, tmp_path):
    diffusers = require("diffusers")
    theirs, base = make(FIRST)
    models.save(tmp_path, base)
    again, report = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    # Where a config came from, and which values nobody gave, are not part of it.
    where = {"_name_or_path": "", "_use_default_values": []}
    described = lambda model: json.loads(json.dumps(model.config | where))
    assert described(again) == described(theirs)
    state = again.state_dict()
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(state[name].numpy(), value.numpy())


# ------------------------------------------------------------------------------------ what is not


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("encoder_hid_dim_type", "text_proj"),
        ("num_class_embeds", 10),
        ("dual_cross_attention", True),
        ("only_cross_attention", [True, False]),
        ("resnet_time_scale_shift", "scale_shift"),
        ("time_embedding_type", "fourier"),
        ("time_cond_proj_dim", 256),
        ("act_fn", "gelu"),
        ("dropout", 0.1),
        ("mid_block_scale_factor", 2),
        ("norm_num_groups", None),
        ("num_attention_heads", 4),
        ("an_option_of_next_year", 1),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("layers_per_block", [1, 1, 1]),
        ("attention_head_dim", [3, 2]),
        ("block_out_channels", [6, 16]),
        ("cross_attention_dim", [12, 12]),
    ],
)
def test_an_option_that_is_not_computed_is_refused_by_name(field, value, tmp_path):
    described = {"_class_name": "UNet2DConditionModel"} | SMALL | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"base: random:{tmp_path}: .*{field}"):
        lorax.load(f"random:{tmp_path}")


def test_inputs_of_other_widths_are_refused():
    module = unet.UNet(unet.config_from_hf(SMALL))
    x, t, context = inputs(module.config)
    init = functools.partial(jax.eval_shape, functools.partial(module.init, jax.random.key(0)))
    with pytest.raises(
        ValueError, match=r"x: \(2, 16, 16, 3\) given, must be \(batch, height, wid"
    ):
        init(x[..., :3], t, context)
    with pytest.raises(ValueError, match=r"encoder_hidden_states: \(2, 7, 5\) given, must be"):
        init(x, t, context[..., :5])


# -------------------------------------------------------------------------------------- adapters


def test_words_mean_its_matrices(make):
    _, base = make(FIRST)
    count = lambda *words: len(targets.resolve(words, base.sites))
    blocks = sum(path.endswith("ff/up/kernel") for path in base.sites)
    assert blocks == 4
    assert count("q") == 2 * blocks and count("attention") == 8 * blocks
    assert count("mlp") == 3 * blocks and count("re:.*/attn2/[kv]/kernel") == 2 * blocks
    convolutions = {path for path, site in base.sites.items() if site.kind == "conv"}
    assert {*targets.resolve(("conv",), base.sites)} == convolutions
    assert count("all-linear") == len(base.sites)


def trained(base, words):
    """LoRA with random factors: (ours with it, its `Trained`)."""
    method = lorax.method("lora", rank=2, alpha=3, targets=words)
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=small.noisy(state.trainable))
    bound = method.bind(*state, base.params, sites=base.sites)
    return bound, adapters.from_training(base, method, state)


@pytest.fixture(scope="module")
def exported(make, tmp_path_factory):
    """LoRA of ours on all matrices in files of PEFT, diffusers and kohya: (folder, our outputs)."""
    _, base = make(FIRST)
    folder = tmp_path_factory.mktemp("exported")
    bound, adapter = trained(base, ("all-linear",))
    assert not adapters.save(folder / "peft", adapter)
    for format, end in (("diffusers", ""), ("kohya", ".safetensors")):
        out = str(folder / f"{format}{end}")
        assert convert.main(["to", format, str(folder / "peft"), out]) == 0
    expected = program(base)(bound)
    assert np.abs(expected - program(base)(base.params)).max() > 0.1
    return folder, expected


FILES = {"peft": "peft", "diffusers": "diffusers", "kohya": "kohya.safetensors"}


@pytest.mark.parametrize("format", FILES)
def test_its_files_are_read_back(format, exported, make):
    (folder, expected), (_, base) = exported, make(FIRST)
    loaded = adapters.load(folder / FILES[format], base)
    assert len(loaded.updates) == len(base.layers)
    np.testing.assert_allclose(program(base)(loaded.bind()), expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")  # what diffusers warns about is not ours
@pytest.mark.parametrize("format", few(FILES, ["diffusers"]))
def test_diffusers_loads_our_adapter(format, exported, make):
    (folder, expected), (theirs, base) = exported, make(FIRST)
    model, file = copy.deepcopy(theirs), folder / FILES[format]
    if format == "peft":
        model = require("peft").PeftModel.from_pretrained(model, file).eval()
    elif format == "diffusers":
        name = "pytorch_lora_weights.safetensors"
        model.load_lora_adapter(file, prefix="unet", weight_name=name)
    else:
        loader = require("diffusers").StableDiffusionPipeline
        state, alphas = loader.lora_state_dict(file, unet_config=model.config)
        loader.load_lora_into_unet(state, alphas, model)
    given = inputs(base.config)
    np.testing.assert_allclose(predicted(model, *given), expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def foreign(make):
    """diffusers' model with an adapter of its own: (it, its outputs)."""
    peft, (theirs, base) = require("peft"), make(FIRST)
    model = copy.deepcopy(theirs)
    words = ["to_q", "to_out.0", "proj", "net.2", "conv1", "conv_shortcut", "proj_in", "conv"]
    model.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=words, rank_pattern={"conv1": 2})
    )
    parity.disturb(model)
    return model, predicted(model, *inputs(base.config))


def test_an_adapter_that_diffusers_saved_is_loaded(foreign, make, tmp_path):
    (model, expected), (_, base) = foreign, make(FIRST)
    assert np.abs(expected - program(base)(base.params)).max() > 0.1
    model.save_lora_adapter(tmp_path)
    got = program(base)(adapters.load(tmp_path, base).bind())
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_a_part_of_a_pipeline_s_adapter_is_loaded(foreign, make, tmp_path):
    """The other part is a text encoder's."""
    peft, diffusers = require("peft"), require("diffusers")
    (model, expected), (_, base) = foreign, make(FIRST)
    layers = peft.get_peft_model_state_dict(model)
    name = "text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    torch = require("torch")
    text = {name.format(x): torch.ones(shape) for x, shape in (("A", (2, 6)), ("B", (6, 2)))}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, text_encoder_lora_layers=text,
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 matrices of text_encoder left out"):
        loaded = adapters.load(tmp_path, base)
    np.testing.assert_allclose(program(base)(loaded.bind()), expected, rtol=0, atol=2e-5)


def test_what_is_recomputed_is_not_kept(make):
    _, base = make(FIRST)
    given = inputs(base.config)
    method = lorax.method("lora", rank=2, targets=("attention",))
    trainable, constants = method.init(jax.random.key(0), base.params, base.sites)

    def kept(remat):
        """Numbers that the backward pass holds."""
        module = unet.UNet(dataclasses.replace(base.config, remat=remat))

        def outputs(trainable):
            bound = method.bind(trainable, constants, base.params, sites=base.sites)
            return lorax.apply(module, bound, *given)

        pull = jax.eval_shape(lambda trainable: jax.vjp(outputs, trainable)[1], trainable)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    none, dots, full = map(kept, ("none", "dots", "full"))
    assert full < 0.8 * dots and dots < 0.8 * none


@pytest.mark.soak  # the family table has a quicker case
def test_four_bits(make):
    """Linear kernels are coded, convolutions stay as they are; LoRA on both works."""
    _, base = make(FIRST)
    coded = lorax.quantize(base)
    held = {k for k, x in tree.flatten(coded.params).items() if isinstance(x, quant.Quantised)}
    linear = {path for path, site in base.sites.items() if site.kind == "linear"}
    assert held == linear
    run = program(base)
    decoded = lorax.dequantize(coded).params
    assert np.abs(run(decoded) - run(base.params)).max() > 0.01
    onto, _ = trained(coded, ("q", "conv"))
    plain, _ = trained(base.replace(params=decoded), ("q", "conv"))
    np.testing.assert_allclose(run(onto), run(plain), rtol=0, atol=2e-5)
