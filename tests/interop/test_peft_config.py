"""Adapters that others wrote: every field and every tensor is used, refused or known to do nothing.

Configs of nonsense are read without a model; what the fields of the other methods do to their
arrays is tested with them, in test_peft_methods.py.
"""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from peft_files import UNTIED, assert_same, dense, foreign, lora_of, random_adapter
from support import require

from lorax import convert
from lorax.interop import loralib, peft
from lorax.interop.hf import Source
from lorax.interop.peft import norms, whole
from lorax.interop.peft.config import ANY, FIELDS
from lorax.interop.places import Places

CLASSES = {
    "LORA": "LoraConfig",
    "ADALORA": "AdaLoraConfig",
    "LOHA": "LoHaConfig",
    "LOKR": "LoKrConfig",
    "VERA": "VeraConfig",
    "IA3": "IA3Config",
    "MISS": "MissConfig",
    "HIRA": "HiraConfig",
    "SHIRA": "ShiraConfig",
    "GRALORA": "GraloraConfig",
    "OFT": "OFTConfig",
    "FOURIERFT": "FourierFTConfig",
    "HRA": "HRAConfig",
    "RANDLORA": "RandLoraConfig",
    "LN_TUNING": "LNTuningConfig",
    "PREFIX_TUNING": "PrefixTuningConfig",
    "PROMPT_TUNING": "PromptTuningConfig",
    "ADAPTION_PROMPT": "AdaptionPromptConfig",
}
#: Fields of PEFT before 0.3.
OLD = {"merge_weights", "enable_lora"}
NONSENSE = (
    *(None, True, False, 0, 1, 8, -1, 2**31, 10**30, 0.5, 8.0, 1e39, -1e308),
    *(float("nan"), float("inf"), "", "8", "none", "(", "a{9999999999999}", "CAUSAL_LM"),
    *([], [[]], [None], ["q_proj"], ["(", 1], [-1], [0], [True], {}, {"a": "b"}, {"(": 2}),
    *({"q_proj": 0}, {"q_proj": 2}, {"q_proj": None}, {"q_proj": [True]}, {"q_proj": float("nan")}),
)


def test_every_kind_and_every_field_of_peft_is_known():
    library = require("peft")
    assert set(FIELDS) == set(CLASSES)
    for kind, name in CLASSES.items():
        theirs = {field.name for field in dataclasses.fields(getattr(library, name))}
        more = OLD if kind in ("LORA", "ADALORA") else set()
        assert set(FIELDS[kind]) == theirs | more, kind


@pytest.mark.parametrize("kind", CLASSES)
def test_what_peft_itself_writes_is_read(kind, tmp_path):
    options = {"total_step": 9} if kind == "ADALORA" else {}
    options |= {"adapter_len": 2, "adapter_layers": 1} if kind == "ADAPTION_PROMPT" else {}
    options |= {"num_virtual_tokens": 2} if kind in ("PREFIX_TUNING", "PROMPT_TUNING") else {}
    options |= {"encoder_hidden_size": 4} if kind == "PREFIX_TUNING" else {}
    getattr(require("peft"), CLASSES[kind])(**options).save_pretrained(tmp_path)
    assert peft.read_config(tmp_path / peft.CONFIG)["peft_type"] == kind


@pytest.mark.parametrize("kind", CLASSES)
def test_a_field_of_any_other_value_is_read_or_named(kind, tmp_path):
    """All fields of each kind, each as something else; numbers too large for float32 never pass."""
    file, refused = tmp_path / peft.CONFIG, 0
    for field in FIELDS[kind]:
        for value in NONSENSE:
            file.write_text(json.dumps({"peft_type": kind, field: value}))
            try:
                peft.read_config(file)
            except ValueError as error:
                assert str(error).startswith(f"{file}: {field}"), (field, value)
                refused += 1
                continue
            wanted = FIELDS[kind][field]
            if wanted is not ANY and isinstance(value, (int, float)):
                assert abs(value) < 1e39, (field, value)
    assert refused > 10 * len(FIELDS[kind]) - 150


@pytest.mark.parametrize("foreigner", [True, False])
def test_a_lora_of_any_other_config_is_read_or_named(foreigner, tmp_path):
    """What is read has the tensors' own shapes and a scale that is finite in float32."""
    if foreigner:
        foreign(tmp_path / "x", lora_of("transformer.h.0.attn.c_attn", 16, 48))
    else:
        peft.save(tmp_path / "x", random_adapter(), UNTIED, "gpt2")
    file = tmp_path / "x" / peft.CONFIG
    fields = json.loads(file.read_text())
    for field in FIELDS["LORA"]:
        for value in NONSENSE:
            file.write_text(json.dumps(fields | {field: value}))
            try:
                adapter = peft.load(tmp_path / "x", UNTIED)
            except ValueError as error:
                assert str(error).startswith(str(tmp_path)), (field, value)
                assert field in str(error) or "scale" in str(error), (field, value)
                continue
            assert all(np.isfinite(np.float32(own.s)) for own in adapter.factors.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000, "nested too deep"),
        ('{"peft_type": "LORA", "r": ' + "8" * 5_000 + "}", "too many digits"),
        ('{"peft_type": "LORA", "target_modules": ["\\ud83d"]}', "half of a character"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha: nan given; .* a finite number"),
        ('{"peft_type": "LORA", "r": "8"}', "r: '8' given; it should be a whole number of at le"),
        ('{"peft_type": "LORA", "rank_pattern": [1]}', r"rank_pattern: \[1\] given"),
        ('{"peft_type": ["LORA"]}', r"peft_type \['LORA'\] can't be read"),
        ('{"r": 8}', "peft_type is missing; supported are LORA, ADALORA, LOHA"),
        ('{"peft_type": "POLY"}', "'POLY' can't be read; supported are LORA, ADALORA, LOHA"),
        ("[1]", "a JSON object is expected"),
    ],
)
def test_a_config_from_outside_is_checked_where_it_comes_in(text, words, tmp_path, capsys):
    """Also by the commands, which ask for no base before they know what the adapter is."""
    (tmp_path / peft.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=rf"{peft.CONFIG}(?s:.)*{words}"):
        peft.read_config(tmp_path / peft.CONFIG)
    assert convert.main(["show", str(tmp_path)]) == 2
    assert "--base" not in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(tmp_path):
    foreign(tmp_path / "x", lora_of("transformer.h.0.attn.c_attn", 16, 48))
    file = tmp_path / "x" / peft.CONFIG
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(peft.load(tmp_path / "x", UNTIED).factors) == 3


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_a_pickle_gets_a_word_and_is_not_opened(name, tmp_path, capsys):
    foreign(tmp_path / "x", lora_of("transformer.h.0.attn.c_attn", 16, 48))
    (tmp_path / "x" / peft.WEIGHTS).unlink()
    (tmp_path / "x" / name).write_bytes(b"no pickle at all")
    for path in (tmp_path / "x", tmp_path / "x" / name):
        assert convert.main(["show", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"{name}: a pickle can run code" in said and "save_pretrained" in said


def test_a_rank_of_zero_is_named(tmp_path):
    """By a pattern (PEFT's own error: r should be positive), and by tensors that hold nothing."""
    tensors = lora_of("transformer.h.0.attn.c_attn", 16, 48)
    foreign(tmp_path / "x", tensors, rank_pattern={"c_attn": 0})
    with pytest.raises(ValueError, match="rank_pattern: .*'c_attn': 0.* at least 1"):
        peft.load(tmp_path / "x", UNTIED)
    empty = {key: x[:0] if "lora_A" in key else x[:, :0] for key, x in tensors.items()}
    foreign(tmp_path / "y", empty)
    with pytest.raises(ValueError, match=r"c_attn: need A \(r, in\) and B \(out, r\), got"):
        peft.load(tmp_path / "y", UNTIED)


# ------------------------------------------------------------------------------- names of tensors


def as_running(tensors: dict, name="default") -> dict:
    """The names of a running model, whose adapter's name follows the word."""
    return {key.replace(".weight", f".{name}.weight"): x for key, x in tensors.items()}


@pytest.mark.parametrize("name", ["default", "mine", "0"])
def test_a_running_models_names_are_read(name, tmp_path):
    lora = lora_of("transformer.h.0.attn.c_attn", 16, 48)
    norm = {"weight": np.ones(16, np.float32), "bias": np.full(16, 2, np.float32)}
    plain = {f"transformer.ln_f.{word}": x for word, x in norm.items()}
    running = as_running(lora, name)
    for word, x in norm.items():
        running[f"transformer.ln_f.modules_to_save.{name}.{word}"] = x
        running[f"transformer.ln_f.original_module.{word}"] = 0 * x
    want = peft.load(foreign(tmp_path / "x", lora | plain, modules_to_save=["ln_f"]), UNTIED)
    got = peft.load(foreign(tmp_path / "y", running, modules_to_save=["ln_f"]), UNTIED)
    assert_same(got, want)
    np.testing.assert_array_equal(got.weights["ln_f/bias"], norm["bias"])


def test_a_trained_module_is_read_beside_factors_without_a_name(tmp_path):
    bias = np.ones(16, np.float32)
    tensors = lora_of("transformer.h.0.attn.c_attn", 16, 48)
    for word in ("weight", "bias"):
        tensors[f"transformer.ln_f.modules_to_save.default.{word}"] = bias
        tensors[f"transformer.ln_f.modules_to_save.{word}"] = bias
    loaded = peft.load(foreign(tmp_path / "x", tensors), UNTIED)
    assert set(loaded.weights) == {"ln_f/scale", "ln_f/bias"}


C_ATTN, LN = "transformer.h.0.attn.c_attn", "transformer.ln_f"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (as_running(lora_of(C_ATTN, 16, 48), "b"), "several adapters, a, b; one can be read"),
        (lora_of(C_ATTN, 16, 48), "several adapters, a, one without a name"),
        ({f"{LN}.original_module.bias": np.ones(16)}, "original_module.bias: the base's own mod"),
        ({f"{LN}.modules_to_save.x.bias": np.ones(16)}, "ln_f.x.bias was trained in full, and"),
        (
            {f"{LN}.modules_to_save.a.bias": np.ones(16), f"{LN}.bias": np.zeros(16)},
            "transformer.ln_f.bias occurs twice, with different values",
        ),
        ({f"{C_ATTN}.lora_B.a.bias": np.ones(48)}, "c_attn.lora_B.bias: no factor of LoRA"),
        ({f"{C_ATTN}.lora_diag.a": np.ones(2)}, "c_attn.lora_diag.a: no factor of LoRA"),
        ({f"{LN}.running_mean": np.ones(16)}, "ln_f.running_mean: no factor of LoRA"),
        (
            {"transformer.wte.token_adapter.trainable_tokens_delta": np.ones((2, 16))},
            "trainable_tokens_delta: no factor of LoRA",
        ),
        ({f"{C_ATTN}.lora_magnitude_vector.a.weight": np.ones(48)}, "says use_dora=False"),
    ],
)
def test_no_tensor_is_left_out(more, words, tmp_path):
    """`more` beside an adapter that is called a."""
    tensors = as_running(lora_of(C_ATTN, 16, 48), "a")
    foreign(tmp_path / "x", tensors | {key: np.float32(x) for key, x in more.items()})
    with pytest.raises(ValueError, match=f"{peft.WEIGHTS}: (?s:.)*{words}"):
        peft.load(tmp_path / "x", UNTIED)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["c_fc"]}, "target_modules: .*c_fc.* leaves out .*c_attn"),
        ({"target_modules": r".*\.c_fc"}, "target_modules: .* leaves out .*c_attn"),
        ({"target_modules": "c_attn"}, "target_modules: 'c_attn' leaves out"),  # a regex, in full
        ({"exclude_modules": ["attn.c_attn"]}, "exclude_modules: .* leaves out"),
        ({"exclude_modules": r".*c_attn"}, "exclude_modules: .* leaves out"),
        ({"target_modules": ["c_attn"], "layers_to_transform": [1]}, "layers_to_transform: "),
        ({"target_modules": ["c_attn"], "layers_to_transform": 1}, "layers_to_transform: 1 leaves"),
        (
            {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "layers"},
            "layers_to_transform: ",
        ),
        ({"modules_to_save": ["c_attn"]}, "modules_to_save: .*c_attn"),
        ({"modules_to_save": ["lm_head"]}, "lm_head was trained whole .* lm_head.weight is miss"),
        ({"modules_to_save": ["1.ln_2"]}, "1.ln_2 was trained whole .*ln_2.weight is missing"),
        ({"enable_lora": [True, False, True]}, "enable_lora: "),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_named(fields, words, tmp_path):
    """PEFT would leave out the factors, or stop at a module that it trained whole."""
    tensors = lora_of("transformer.h.0.attn.c_attn", 16, 48)
    with pytest.raises(ValueError, match=words):
        peft.load(foreign(tmp_path / "x", tensors, **fields), UNTIED)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": r"transformer\.h\.\d+\.attn\.c_attn"},
        {"target_modules": ["attn.c_attn"], "exclude_modules": ["c_proj", "tn"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 5], "layers_pattern": ["l", "h"]},
        {"target_modules": ["c_attn"], "layers_to_transform": 0, "layers_pattern": ""},
        {"target_modules": [C_ATTN], "layers_to_transform": [7]},
        {"modules_to_save": ["score", "classifier"]},
        {"bias": "all", "r": 2, "alpha_pattern": {"h.1.attn": 7}},
    ],
)
def test_what_peft_adapts_is_no_contradiction(fields, tmp_path):
    """The rule is PEFT's own."""
    tensors = lora_of(C_ATTN, 16, 48)
    assert len(peft.load(foreign(tmp_path / "x", tensors, **fields), UNTIED).factors) == 3
    library = require("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    if fields.get("target_modules") not in (None, "all-linear"):
        assert check_target_module_exists(library.LoraConfig(**fields), C_ATTN)


def test_norms_of_numbered_modules_that_are_not_stacked():
    """A loop of modules in a model from outside: each has a tensor of its own, with its number."""
    words = {"scale": "weight", "bias": "bias"}
    places = Places({f"block_1/norm/{p}": Source(f"block.1.norm.{x}") for p, x in words.items()})
    stored = {f"block.1.norm.{x}": np.ones(3) for x in words.values()}
    tensors, config, rest = norms.write(stored, places)
    assert len(tensors) == 2 and config == {"target_modules": ["block.1.norm"]} and not rest
    for module in ("norm", "1.norm", "block.1.norm"):
        whole.check_saved({"modules_to_save": [module]}, stored, places, "F")
        with pytest.raises(ValueError, match=f"F: .*{module} was .* block.1.norm.bias is missing"):
            whole.check_saved({"modules_to_save": [module]}, [*stored][:1], places, "F")


# ------------------------------------------------------------------------------------- metadata


def hostile(own: dict, path: tuple, value) -> dict:
    """The metadata with another value at a path."""
    own = json.loads(json.dumps(own))
    inner = own
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return own


def test_hostile_metadata_changes_nothing_or_is_named(tmp_path):
    """Every field of every entry as something else, or gone: the adapter as it was, or an error."""
    peft.save(tmp_path, random_adapter(), UNTIED, "gpt2")
    file = tmp_path / peft.WEIGHTS
    tensors, want = safetensors.numpy.load_file(file), peft.load(tmp_path, UNTIED)
    with safetensors.safe_open(file, framework="np") as stored:
        own = json.loads(stored.metadata()["lorax"])
    paths = [("factors",), ("weights",), ("tied",)]
    paths += [(kind, path) for kind in ("factors", "weights") for path in own[kind]]
    paths += [(*path, key) for path in paths[3:] for key in own[path[0]][path[1]]]
    values = (None, True, 0, 8, -1, 10**30, 1e39, 1e-44, float("nan"), "", "8", [], [[]], {})
    values += (KeyError, "0:1", "1:0", "0:0", "-1:4", "0:9999999999", [0, 0], [0, 1], [0, 10**30])
    refused, texts = 0, [json.dumps(hostile(own, path, x)) for path in paths for x in values]
    for text in (*texts, "[" * 100_000, '{"factors": ' + "1" * 5_000 + "}", '"\\ud83d"', "NaN"):
        file.write_bytes(safetensors.numpy.save(tensors, {"lorax": text}))
        for sources in (UNTIED, None) if len(text) % 3 == 0 else (UNTIED,):
            try:
                got = peft.load(tmp_path, sources)
            except ValueError as error:
                assert str(error).startswith(f"{file}: its metadata 'lorax' does not fit: ")
                assert len(str(error)) < 600
                refused += 1
                continue
            if sources is not None:  # otherwise the paths are the file's own
                assert got.weights.keys() == want.weights.keys()
                for path, own in want.factors.items():  # another scale goes into b, rounded
                    np.testing.assert_allclose(dense(got.factors[path]), dense(own), 0, 1e-5)
    assert refused > 0.9 * len(texts)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16"])
def test_a_scale_that_is_no_number_is_named_of_loralib_too(alpha, tmp_path):
    tensors = {"a.lora_A": np.ones((2, 4)), "a.lora_B": np.ones((4, 2))}
    np.savez(tmp_path / "x.npz", **{key: np.float32(x) for key, x in tensors.items()})
    with pytest.raises(ValueError, match="alpha: .* given; it should be a finite number"):
        loralib.load(tmp_path / "x.npz", alpha)
    assert loralib.load(tmp_path / "x.npz", 4).factors["a"].s == 2.0


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.lora_A": np.ones((0, 4)), "a.lora_B": np.ones((4, 0))}, "need lora_A .r, in. and"),
        (
            {"a.lora_A": np.ones((2, 4)), "a.lora_B": np.ones((4, 2)), "module.a.lora_A": 0},
            "module.a.lora_A occurs twice",
        ),
    ],
)
def test_nothing_of_loralib_is_left_out(tensors, words, tmp_path):
    np.savez(tmp_path / "x.npz", **{key: np.float32(x) for key, x in tensors.items()})
    with pytest.raises(ValueError, match=words):
        loralib.load(tmp_path / "x.npz", 4)
