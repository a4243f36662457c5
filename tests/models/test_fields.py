"""Fields of a config.json that someone else wrote: every kind of wrong value is refused by name.

The families' tables (`FIELDS`) are the list of what is read, so that a field that is added to one
is tested here too.
"""

import contextlib
import json
import math

import pytest
from support import few

import lorax
from lorax import fields, models, tree
from lorax.models import decoder_families, falcon, rope
from lorax.models.decoder import FULL, SLIDING
from lorax.models.families import FAMILIES
from lorax.models.load import config_fields, skeleton

ENCODER = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 14,
}  # fmt: skip
DECODER = ENCODER | {"num_key_value_heads": 1}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "longrope": LONG | {"factor": 4.0, "original_max_position_embeddings": 7},
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
#: (family, the fields of a small model that are not the defaults)
SMALL = {
    "gpt2": {"vocab_size": 20, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 5},
    "qwen2": DECODER | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "ministral": DECODER | {"sliding_window": 5, "layer_types": [SLIDING, FULL]},
    "ministral3": DECODER,
    "qwen3": DECODER,
    "smollm3": DECODER | {"sliding_window": 5, "use_sliding_window": True},
    "olmo2": DECODER,
    "olmo3": DECODER | {"sliding_window": 5, "layer_types": [SLIDING, FULL]},
    "granite": DECODER,
    "gemma": DECODER,
    "gemma2": DECODER,
    "gemma3_text": DECODER | {"sliding_window_pattern": 2},
    "phi3": DECODER,
    **{f"llama {kind}": DECODER | {"rope_parameters": {"rope_type": kind} | more}
       for kind, more in ROPES.items()},
    "falcon": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 6},
    "falcon new": {"vocab_size": 20, "hidden_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    "bert": ENCODER,
    "roberta": ENCODER | {"pad_token_id": 1},
    "deberta-v2": ENCODER,
    "deberta-v2 relative": ENCODER | RELATIVE | {"conv_kernel_size": 3},
    "vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 12, "image_size": [8, 12], "patch_size": 4},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    | {"sample_size": 4},
    "clip_text_model": ENCODER,
    "UNet2DConditionModel": {"block_out_channels": [8, 16], "norm_num_groups": 4}
    | {"cross_attention_dim": 12, "attention_head_dim": 2, "layers_per_block": 1}
    | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
    "mlp": {"widths": [8, 6, 4]},
    "lenet": {"image_size": 20},
}  # fmt: skip
#: Of every type, sign and size that a file can hold.
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 32.0, 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf,
    2**20, 2**31, 2**63, 10**30, -(2**70), "", "0", "32", "8.0", "null", "gelu", [], [1], [0, 0],
    [-1, 4], [None], ["a"], [[4, 4]], [1e300] * 4, {}, {"a": 1}, {"0": {"rope_theta": 2.0}},
)  # fmt: skip
ROPE_PLACES = ("rope_parameters", "rope_scaling")


def kinds(family: str) -> dict:
    """What is read of a family's config.json."""
    table = FAMILIES[family][0].FIELDS
    return table[family] if family in ("mlp", "lenet") else table


def mutations(name: str):
    """(the field, a config.json with another value of it), all fields by all values."""
    family, config = name.split()[0], {"model_type": name.split()[0]} | SMALL[name]
    for field in kinds(family):
        for value in VALUES:
            yield field, config | {field: value}
    inner = {"falcon": falcon.ROPE_FIELDS, "llama": rope.ROPE_FIELDS}.get(family, {})
    for place in ROPE_PLACES:
        for field in inner:
            for value in VALUES:
                given = config.get("rope_parameters", {}) | {field: value}
                yield field, config | {place: given}
    for field in rope.ROPE_FIELDS if family == "olmo3" else ():
        for value in VALUES:
            yield field, config | {"rope_parameters": {SLIDING: {field: value}, FULL: {}}}


@pytest.mark.parametrize("name", SMALL)
def test_every_value_of_every_field_is_read_or_refused_by_name(name):
    module, _ = FAMILIES[name.split()[0]]
    for field, config in mutations(name):
        try:
            hash(module.config_from_hf(config))
        except ValueError as error:
            assert field in str(error), (config, error)
            assert len(str(error)) < 400, error


OTHER_ROWS = {*decoder_families.FAMILIES} - {"llama", "gemma2"}


@pytest.mark.parametrize("name", few(SMALL, {*SMALL} - OTHER_ROWS, ["gemma3_text"]))
def test_sizes_cost_nothing_before_the_weights(name, tmp_path):
    """The skeleton of a model that no machine can hold is made like any other."""
    module, config = FAMILIES[name.split()[0]][0], {"model_type": name.split()[0]} | SMALL[name]
    for field in kinds(name.split()[0]):
        for value in (2**20, 2**31 - 1):
            with contextlib.suppress(ValueError):
                module.config_from_hf(config | {field: value})
                config[field] = value
    lists = {"mlp": {"widths": [2**31 - 1] * 3}}
    lists |= {"UNet2DConditionModel": {"block_out_channels": [2**20] * 2}}
    config = config | lists.get(name, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tree.count(skeleton(f"random:{tmp_path}").params) > 2**40


def test_what_is_not_read_is_no_business_of_ours():
    given = {"n_embd": 8, "use_cache": "perhaps"}
    assert fields.read(given, {"n_embd": fields.SIZE, "n_head": fields.SIZE}) == {"n_embd": 8}


def test_every_field_of_a_family_that_a_file_sets_is_in_its_table():
    ours = {"dtype", "remat", "unroll", "head", "labels"}
    ours |= {"sliding_rope", "qkv_bias", "norms", "norm_offset", "qk_norm", "scale_embeddings"}
    ours |= {"attention_sinks", "expert_bias"}
    for family in FAMILIES:
        table = {*kinds(family)} | {"model_type"} | ours
        assert {*config_fields(family)} <= table, family


# ----------------------------------------------------------------------------------- in a directory


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | SMALL["gpt2"]))
    models.save(tmp_path / "saved", lorax.load(f"random:{tmp_path}"))
    return tmp_path / "saved"


def edit(directory, **given):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_embd": "32"}, 'n_embd: "32" given, must be a whole number from 1 to 1048576'),
        ({"n_layer": -1}, "n_layer: -1 given, must be a whole number"),
        ({"model_type": ["gpt2"]}, r'model_type: \["gpt2"\] given, must be a string'),
        ({"model_type": {}}, "model_type: {} given, must be a string"),
        ({"model_type": "gtp2"}, "model_type 'gtp2' is not one of gpt2, .*did you mean 'gpt2'"),
        ({"architectures": "GPT2LMHeadModel"}, "architectures: .* given, must be a list of values"),
        ({"quantization_config": [4]}, r"quantization_config: \[4\] given, must be an object"),
        ({"quantization_config": True}, "quantization_config: true given, must be an object"),
        ({"quantization_config": {"load_in_4bit": "yes"}}, 'load_in_4bit: "yes" given, must be t'),
        ({"quantization_config": {"quant_method": 4}}, "quant_method: 4 given, must be a string"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: None is not supported"),
    ],
)
def test_a_wrong_field_is_named_with_the_base(directory, given, message):
    edit(directory, **given)
    for read in (lorax.load, skeleton):
        with pytest.raises(ValueError, match=f"base: {directory}: .*{message}"):
            read(str(directory))


@pytest.mark.parametrize(
    "given", [{"vocab_size": 2**31 - 1}, {"n_layer": 2**20}, {"n_inner": 10**5}]
)
def test_sizes_that_the_files_cannot_hold_are_refused_before_anything_is_made(directory, given):
    edit(directory, **given)
    ((field, value),) = given.items()
    message = f"config.json: its sizes make .* parameters, more than .*{field} {value}"
    with pytest.raises(ValueError, match=message):
        lorax.load(str(directory))
    edit(directory, **{field: SMALL["gpt2"].get(field)})
    lorax.load(str(directory))
