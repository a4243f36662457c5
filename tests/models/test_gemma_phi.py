"""What Gemma and Phi have and other decoders have not; their logits are in test_decoder."""

import copy
import dataclasses
import functools
import json

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from decoders import LONG, SEEING, TINY, TOKENS
from quick import jit
from support import few, require

import lorax
from lorax import adapters, decode, models, tree
from lorax.interop import peft
from lorax.models import decoder, rope
from lorax.models.decoder import FULL, SLIDING
from lorax.models.decoder_families import config_from_hf, hf_config
from lorax.models.load import skeleton

NAMES = ("gemma2", "gemma3", "phi3")
LEFT = np.array([[1] * 12, [0] * 3 + [1] * 9, [0] * 8 + [1] * 4], np.int32)


@functools.cache
def base(name):
    return lorax.load(str(decoders.saved(name)))


def torch_logits(name, tokens, mask=None):
    torch = require("torch")
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        model = decoders.reference(name)
        return model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()


# ------------------------------------------------------------------------------ ways to read a text


@pytest.mark.parametrize("name", NAMES)
def test_padding_a_cache_and_packing_change_nothing(name):
    """Windows, rotations by layer type and caps, in whatever way texts come."""
    ours = base(name)
    apply = functools.partial(lorax.apply, ours.module, ours.params)
    whole, real = jit(apply), LEFT > 0
    want = torch_logits(name, TOKENS, LEFT)
    np.testing.assert_allclose(whole(TOKENS, LEFT)[real], want[real], rtol=0, atol=1e-4)

    @jit
    def read(tokens, segments, cache):
        hidden, cache = apply(tokens, segments, cache, method="hidden")
        return apply(hidden, method="logits"), cache

    cache, parts = ours.module.empty_cache(3, 13), []
    for part in (slice(0, 10), slice(10, 11), slice(11, 12)):
        logits, cache = read(TOKENS[:, part], LEFT[:, part], cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-4)

    segments = np.array([[1] * 5 + [2] * 7, [0] * 3 + [1] * 9, [3] * 6 + [1] * 5 + [0]], np.int32)
    packed = whole(TOKENS, segments)
    for row, number in ((0, 1), (0, 2), (2, 3), (2, 1)):
        at = segments[row] == number
        alone = torch_logits(name, TOKENS[row : row + 1, at])[0]
        np.testing.assert_allclose(packed[row, at], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", few(NAMES, ["gemma3", "phi3"]))
def test_greedy_text_beyond_the_window_is_that_of_transformers(name):
    torch, ours, new = require("torch"), base(name), 9
    assert ours.config.sliding_window == 3
    options = decode.DecodingOptions(max_new_tokens=new, ends=(2,), pad=0)
    key = jax.random.key(0)
    got = decode.generate(ours.module, ours.params, TOKENS, LEFT, key, options)
    want = decoders.reference(name).generate(
        torch.tensor(TOKENS).long(), attention_mask=torch.tensor(LEFT), max_new_tokens=new,
        do_sample=False, eos_token_id=2, pad_token_id=0,
    ).numpy()[:, 12:]  # fmt: skip
    np.testing.assert_array_equal(got, np.pad(want, ((0, 0), (0, new - want.shape[1]))))
    assert len({tuple(row) for row in want}) == 3


@pytest.mark.parametrize(("name", "remat"), [("gemma2", "full"), ("phi3", "dots")])
def test_gradients_are_those_of_transformers(name, remat):
    """Of the norms with an offset, through the caps, and of parts of fused tensors."""
    torch, model, ours = require("torch"), decoders.reference(name), base(name)
    model.zero_grad()
    logits = model(torch.from_numpy(TOKENS).long()).logits
    torch.logsumexp(logits, dim=-1).mean().backward()
    theirs = {key: value.grad.numpy() for key, value in model.named_parameters()}
    module = decoder.Decoder(dataclasses.replace(ours.config, remat=remat))
    loss = lambda params: jnp.mean(jax.nn.logsumexp(lorax.apply(module, params, TOKENS), axis=-1))
    grads = tree.flatten(jit(jax.grad(loss))(ours.params))
    for path, source in ours.sources.items():
        for layer in range(len(grads[path])) if "{}" in source.name else (...,):
            want = theirs[source.name.format(layer)]
            want = want.T if source.axes else want
            want = want if source.part is None else want[..., source.part]
            scale = np.abs(want).max()
            assert scale > 1e-5, path
            np.testing.assert_allclose(
                grads[path][layer], want, rtol=1e-3, atol=2e-4 * scale, err_msg=f"{path} {layer}"
            )


def test_embeddings_are_scaled_by_a_root_that_is_rounded_as_the_weights_are(tmp_path):
    """sqrt(24) = 4.899 is 4.906 in bfloat16. With an epsilon of 1e4 the last norm shows it."""
    torch, transformers = require("torch"), require("transformers")
    config = transformers.AutoConfig.for_model(
        "gemma3_text", **TINY | dict(num_hidden_layers=1, head_dim=6, rms_norm_eps=1e4)
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.endswith("norm.weight")
            parameter.copy_(-torch.ones_like(parameter) if norm else torch.randn_like(parameter))
        model.model.norm.weight.fill_(9.0)  # the layer itself adds nothing
    model = model.bfloat16()
    model.save_pretrained(tmp_path)
    ours = lorax.load(str(tmp_path), dtype="bfloat16", param_dtype="bfloat16")
    hidden = jit(functools.partial(lorax.apply, ours.module, method="hidden"))
    got = np.asarray(hidden(ours.params, TOKENS), np.float32)
    with torch.no_grad():
        want = model.model(torch.from_numpy(TOKENS).long()).last_hidden_state.float().numpy()
    np.testing.assert_array_equal(got, want)
    assert np.abs(want).max() > 0.1


# -------------------------------------------------------------------- models that read images, too


@functools.cache
def seeing():
    """A random Gemma 3 of texts and images, from transformers."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.Gemma3Config(**SEEING)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(5 * parameter + 0.2 * torch.randn_like(parameter))
    return model


def logits_of(model):
    torch = require("torch")
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def as_first_published(directory):
    """Renames the tensors in the file of a model as in Google's own files."""
    file = directory / "model.safetensors"
    tensors = {
        key.replace("model.language_model.", "language_model.model.").removeprefix("model."): x
        for key, x in safetensors.numpy.load_file(file).items()
    }
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("first", [False, True])
def test_the_text_part_of_gemma_3_is_read_and_the_part_for_images_kept(first, tmp_path):
    transformers, model = require("transformers"), seeing()
    model.save_pretrained(tmp_path / "theirs")
    if first:
        as_first_published(tmp_path / "theirs")
    ours = lorax.load(str(tmp_path / "theirs"))
    assert ours.family == "gemma3" and ours.config.types == (SLIDING, FULL)
    got = jit(functools.partial(lorax.apply, ours.module))(ours.params, TOKENS)
    np.testing.assert_allclose(got, logits_of(model), rtol=0, atol=1e-4)
    assert config_from_hf(hf_config(ours.config)) == ours.config
    changed = tree.flatten(ours.params)
    changed["norm/scale"] = changed["norm/scale"] + 1
    models.save(tmp_path / "ours", ours.replace(params=tree.unflatten(changed)))
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for (name, x), y in zip(back.state_dict().items(), model.state_dict().values(), strict=True):
        more = 1 if name == "model.language_model.norm.weight" else 0
        np.testing.assert_array_equal(x, y + more, err_msg=name)


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
def test_an_adapter_of_the_text_part_leaves_the_part_for_images_alone(tmp_path):
    library, model = require("peft"), seeing()
    model.save_pretrained(tmp_path / "theirs")
    ours = lorax.load(str(tmp_path / "theirs"))
    method = lorax.method("lora", rank=2, alpha=4, targets=("q", "v", "down"))
    state = method.init(jax.random.key(0), ours.params, ours.sites)
    draw = lambda x: 0.3 * np.random.default_rng(x.shape).standard_normal(x.shape, np.float32)
    state = state._replace(trainable=jax.tree.map(draw, state.trainable))
    adapter = adapters.factored(ours, method, state)
    peft.save(tmp_path / "adapter", adapter, ours.sources, str(tmp_path / "theirs"))
    bound = method.bind(*state, ours.params, sites=ours.sites)
    expected = jit(functools.partial(lorax.apply, ours.module))(bound, TOKENS)
    theirs = library.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    np.testing.assert_allclose(logits_of(theirs), expected, rtol=0, atol=1e-4)
    assert np.abs(logits_of(model) - expected).max() > 0.1
    adapted = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * 3 * 2 and all("language_model" in name for name in adapted)


def test_random_weights_have_no_part_for_images_to_save(tmp_path):
    seeing().config.save_pretrained(tmp_path)
    ours = skeleton(f"random:{tmp_path}")
    with pytest.raises(ValueError, match="gemma3 has a part that reads images, of which there are"):
        models.save(tmp_path / "ours", ours)


# ------------------------------------------------------------------------------------------- config


def test_five_of_six_layers_of_gemma_3_see_a_window():
    config = skeleton("random:gemma3-4b").config
    assert config.types == ((SLIDING,) * 5 + (FULL,)) * 5 + (SLIDING,) * 4
    assert config.sliding_rope == rope.Rope(rope_theta=1e4) and config.sliding_window == 1024
    assert config.rope_parameters == rope.Rope("linear", 1e6, 8.0)
    assert skeleton("random:gemma2-2b").config.types == (SLIDING, FULL) * 13


OLD = {
    "gemma": dict(hidden_act="gelu", hidden_activation=None, rope_theta=100.0),
    "gemma2": dict(hidden_act="relu", rope_theta=100.0, cache_implementation="hybrid"),
    "gemma3_text": dict(
        rope_theta=5000.0, rope_local_base_freq=30.0, sliding_window_pattern=3,
        rope_scaling=dict(rope_type="linear", factor=2.0), num_hidden_layers=4,
    ),
    "phi3": dict(
        rope_theta=100.0, rope_scaling=dict(LONG, type="su"), original_max_position_embeddings=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", OLD)
def test_older_files_mean_what_transformers_makes_of_them(model_type):
    hf = TINY | OLD[model_type] | {"model_type": model_type}
    hf.get("rope_scaling", {}).pop("rope_type", None) if model_type == "phi3" else None
    theirs = require("transformers").AutoConfig.for_model(**json.loads(json.dumps(hf))).to_dict()
    config = config_from_hf(hf)
    assert config == config_from_hf(theirs)
    assert config_from_hf(json.loads(json.dumps(hf_config(config)))) == config
    given = theirs["rope_parameters"]
    full = given.get(FULL, given)
    assert config.rope_parameters.rope_theta == full["rope_theta"]
    assert config.rope_parameters.rope_type == full["rope_type"]


def test_a_long_phi_is_written_for_transformers_4_and_5():
    """transformers 4 takes three fields and no other; the rest is beside them."""
    long = rope.Rope(
        "longrope", factor=8.0, original_max_position_embeddings=8, partial_rotary_factor=0.5,
        short_factor=(1.0, 2.0), long_factor=(1.0, 5.0),
    )  # fmt: skip
    config = decoder.Config(
        "phi3", hidden_size=32, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters=long,
    )  # fmt: skip
    written = json.loads(json.dumps(hf_config(config)))
    factors = {"short_factor": [1.0, 2.0], "long_factor": [1.0, 5.0]}
    assert written["rope_scaling"] == {"type": "longrope"} | factors
    assert written["original_max_position_embeddings"] == 8
    assert written["partial_rotary_factor"] == 0.5 and written["rope_theta"] == 10000.0
    theirs = require("transformers").AutoConfig.for_model(**written).to_dict()
    assert config_from_hf(written) == config_from_hf(theirs) == config
    other = dataclasses.replace(long, factor=4.0)  # not what the lengths say
    written = hf_config(dataclasses.replace(config, rope_parameters=other))
    assert written["rope_scaling"]["factor"] == 4.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(model_type="gemma2", use_bidirectional_attention=True),
            "use_bidirectional_attention",
        ),
        (
            dict(model_type="gemma3_text", attn_logit_softcapping=50.0),
            "50.0 is not supported for g",
        ),
        (dict(model_type="llama", final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
        (dict(model_type="gemma2", attn_logit_softcapping=0), "attn_logit_softcapping: 0 given"),
        (dict(model_type="gemma2", query_pre_attn_scalar=-1), "query_pre_attn_scalar: -1 given"),
        (dict(model_type="gemma2", hidden_activation="tanh"), "hidden_activation: .tanh. given"),
        (dict(model_type="gemma3_text", rope_local_base_freq=1), "rope_local_base_freq: 1 given"),
        (
            dict(model_type="gemma3", text_config=dict(model_type="t5")),
            "text_config: model_type .t5",
        ),
        (dict(model_type="gemma3", text_config=dict(head_dim=0)), "text_config: head_dim: 0 given"),
        (dict(model_type="phi3", partial_rotary_factor=0.5), "rotates 3 of 6 features"),
        (dict(model_type="phi3", attention_bias=True), "attention_bias=true .* for phi3"),
    ],
)
def test_what_the_module_does_not_compute_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(TINY | fields)
