"""A model that is saved keeps what is not ours to change."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import lorax
from lorax import models, quant, tree
from lorax.interop import hf
from lorax.models import bert, decoder_families, gpt2
from lorax.models.load import skeleton

GPT2 = gpt2.hf_config(gpt2.Config(vocab_size=20, n_positions=6, n_embd=8, n_layer=2, n_head=2))
LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=20, hidden_size=16,
    intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
)  # fmt: skip
BERT = dict(
    model_type="bert", architectures=["BertForSequenceClassification"], vocab_size=20,
    hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=12,
)  # fmt: skip
BESIDE = {
    "generation_config.json": '{"eos_token_id": [3, 4], "temperature": 0.6}',
    "tokenizer_config.json": '{"chat_template": "{{ messages }}", "eos_token": "</s>"}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "added_tokens.json": '{"<new>": 5}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "merges.txt": "#version: 0.2\n",
    "LICENSE": "as is\n",
}


def directory_of(where, config, dtype=np.float32, **tensors):
    """A model directory with random weights in `dtype`, but for those given: name=array."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "config.json").write_text(json.dumps(config))
    base, rng = skeleton(str(where)), np.random.default_rng(0)
    flat = {p: rng.standard_normal(x.shape) for p, x in tree.flatten(base.params).items()}
    hf.write(where, config, base.sources, flat, dict.fromkeys(flat, np.dtype(dtype)))
    if tensors:
        file = where / "model.safetensors"
        safetensors.numpy.save_file(safetensors.numpy.load_file(file) | tensors, file)
    return where


def fields(where):
    return json.loads((where / "config.json").read_text())


def kinds(where):
    """{tensor: its dtype in the file}."""
    with safetensors.safe_open(where / "model.safetensors", framework="numpy") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_files_and_fields_that_are_not_ours_stay(tmp_path):
    own = dict(eos_token_id=3, bos_token_id=1, pad_token_id=2, task_specific_params={"x": 1})
    theirs = directory_of(tmp_path / "theirs", GPT2 | own | {"transformers_version": "4.57.6"})
    for name, text in BESIDE.items():
        (theirs / name).parent.mkdir(exist_ok=True)
        (theirs / name).write_text(text)
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate("abcdefgh")}, unk_token="a"))
    tokenizer.enable_truncation(5)  # which `load` switches off for itself
    tokenizer.save(str(theirs / "tokenizer.json"))
    models.save(tmp_path / "ours", lorax.load(str(theirs)))
    names = sorted(str(f.relative_to(theirs)) for f in theirs.rglob("*") if f.is_file())
    ours = tmp_path / "ours"
    assert names == sorted(str(f.relative_to(ours)) for f in ours.rglob("*") if f.is_file())
    for name in set(names) - {"config.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert fields(ours) == fields(theirs) | {"dtype": "float32", "torch_dtype": "float32"}


def test_a_vocabulary_of_the_users_own_is_written(tmp_path):
    theirs = directory_of(tmp_path / "theirs", GPT2 | {"eos_token_id": 0})
    (theirs / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}')
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(theirs / "tokenizer.json"))
    base = lorax.load(str(theirs))
    models.save(tmp_path / "ours", base.replace(vocabulary=base.vocabulary._replace(ends=(1,))))
    assert lorax.load(str(tmp_path / "ours")).vocabulary.ends == (1,)
    generation = json.loads((tmp_path / "ours/generation_config.json").read_text())
    assert generation["temperature"] == 0.6 and generation["eos_token_id"] == 1


def test_a_chat_template_comes_with_the_vocabulary(tmp_path):
    theirs = directory_of(tmp_path / "theirs", GPT2 | {"eos_token_id": 0})
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text('{"eos_token": "a", "chat_template": "x"}')
    models.save(tmp_path / "random", lorax.load(f"random:{theirs}"))
    base = lorax.load(str(theirs))
    texts = {"default": "y", "tool_use": "z"}
    changed = base.replace(vocabulary=base.vocabulary._replace(templates=texts))
    models.save(tmp_path / "changed", changed)
    for name, expected in (("random", {"default": "x"}), ("changed", texts)):
        words = lorax.load(str(tmp_path / name)).vocabulary
        assert words.templates == expected and words.special == {"eos_token": "a"}


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_weights_stay_in_the_dtype_of_the_files(name, tmp_path):
    theirs = directory_of(tmp_path / "theirs", GPT2 | {"torch_dtype": name}, jnp.dtype(name))
    models.save(tmp_path / "ours", lorax.load(str(theirs)))
    files = [directory / "model.safetensors" for directory in (theirs, tmp_path / "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    said = fields(tmp_path / "ours")
    assert said["dtype"] == said["torch_dtype"] == name


def test_a_norm_in_float32_among_bfloat16_stays_one(tmp_path):
    norm = {f"transformer.h.{i}.ln_1.weight": np.full(8, 1.001, np.float32) for i in (0, 1)}
    theirs = directory_of(tmp_path / "theirs", GPT2, ml_dtypes.bfloat16, **norm)
    base = lorax.load(str(theirs))
    models.save(tmp_path / "ours", base)
    assert kinds(tmp_path / "ours") == kinds(theirs)
    assert fields(tmp_path / "ours")["dtype"] == "bfloat16"
    models.save(tmp_path / "wide", base, jnp.float32)
    assert set(kinds(tmp_path / "wide").values()) == {"F32"}
    assert fields(tmp_path / "wide")["torch_dtype"] == "float32"


def test_random_weights_are_written_as_they_are_held(tmp_path):
    directory_of(tmp_path, GPT2)
    for name in ("float32", "bfloat16"):
        base = lorax.load(f"random:{tmp_path}", param_dtype=jnp.dtype(name))
        models.save(tmp_path / name, base)
        assert set(kinds(tmp_path / name).values()) == {{"float32": "F32"}.get(name, "BF16")}
        said = {"dtype": name, "torch_dtype": name} if name == "bfloat16" else {}
        assert fields(tmp_path / name) == GPT2 | said


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 5000.0, "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3],
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("generation", [4, 5])
def test_both_generations_of_transformers_find_their_rope(kind, generation, tmp_path):
    turning = ROPES[kind]
    old = {"rope_theta": turning["rope_theta"], "rope_scaling": None}
    if kind != "default":
        old["rope_scaling"] = {k: v for k, v in turning.items() if k != "rope_theta"}
    new = {"rope_parameters": turning}
    theirs = directory_of(tmp_path / "theirs", LLAMA | (old if generation == 4 else new))
    base = lorax.load(str(theirs))
    models.save(tmp_path / "ours", base)
    said = fields(tmp_path / "ours")
    assert {name: said[name] for name in old} == old and said["rope_parameters"] == turning
    for gone in (old, new):  # each reads its own
        half = {name: x for name, x in said.items() if name not in gone}
        assert decoder_families.config_from_hf(half) == base.config
    if kind == "longrope":  # where transformers 4 looks for it
        assert said["original_max_position_embeddings"] == 16


def test_names_of_classes_stay_with_their_head_and_go_with_it(tmp_path):
    labels = {"id2label": {"0": "NO", "1": "YES"}, "label2id": {"NO": 0, "YES": 1}}
    own = labels | {"problem_type": "single_label_classification"}
    theirs = str(directory_of(tmp_path / "theirs", BERT | own))
    models.save(tmp_path / "same", lorax.load(theirs))
    said = fields(tmp_path / "same")
    assert {name: said[name] for name in own} == own
    models.save(tmp_path / "other", lorax.load(theirs, head="classification", labels=3))
    said = fields(tmp_path / "other")
    assert said["id2label"]["2"] == "LABEL_2" and "problem_type" not in said
    models.save(tmp_path / "none", lorax.load(theirs, head="mlm"))
    assert fields(tmp_path / "none")["architectures"] == ["BertForMaskedLM"]
    foreign = directory_of(tmp_path / "foreign", BERT)
    (foreign / "config.json").write_text(json.dumps(BERT | {"architectures": ["BertForTokens"]}))
    base = lorax.load(str(foreign), head="classification", labels=2)
    models.save(tmp_path / "new", base)
    assert fields(tmp_path / "new")["architectures"] == BERT["architectures"]
    assert bert.config_from_hf(fields(tmp_path / "new")) == base.config


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.nan, "NaN or inf"), (np.inf, "NaN or inf"), (7e4, "7e.04 in it is too large")],
)
def test_no_model_is_written_with_numbers_that_are_none(value, words, tmp_path):
    theirs = directory_of(tmp_path / "theirs", GPT2, np.float16)
    base = lorax.load(str(theirs))
    flat = tree.flatten(base.params)
    flat["h/mlp/up/kernel"] = flat["h/mlp/up/kernel"].at[1, 2, 3].set(value)
    with pytest.raises(ValueError, match=f"^transformer.h.1.mlp.c_fc.weight: {words}"):
        models.save(tmp_path / "ours", base.replace(params=tree.unflatten(flat)))
    assert not (tmp_path / "ours").exists()


def test_weights_in_codes_are_saved_decoded(tmp_path):
    theirs = directory_of(tmp_path / "theirs", LLAMA | {"quantization_config": None})
    base = lorax.load(str(theirs))
    coded = base.replace(params=quant.quantize(base.params, sites=base.sites))
    models.save(tmp_path / "ours", coded)
    back = lorax.load(str(tmp_path / "ours"))
    assert "quantization_config" not in fields(tmp_path / "ours")
    plain = lambda x: np.asarray(x.decoded() if hasattr(x, "decoded") else x)
    for path, leaf in tree.flatten(coded.params).items():
        np.testing.assert_array_equal(tree.flatten(back.params)[path], plain(leaf))


def test_the_hub_is_asked_for_the_files_beside(monkeypatch, tmp_path):
    asked = []
    theirs = directory_of(tmp_path, GPT2)

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(theirs)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    lorax.load("someone/something")
    assert {"config.json", *hf.SIDE} <= set(asked)


def test_large_models_are_written_as_several_files_and_an_index(monkeypatch, tmp_path):
    config = gpt2.hf_config(
        gpt2.Config(vocab_size=20, n_positions=6, n_embd=8, n_layer=3, n_head=2)
    )
    base = lorax.load(str(directory_of(tmp_path / "one", config)))
    monkeypatch.setattr(hf, "FILE", 3000)
    where = tmp_path / "several"
    where.mkdir()
    (where / hf.SINGLE).write_bytes(b"of another model, read first if it stayed")
    models.save(where, base)
    files = sorted(file.name for file in where.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 4500 for file in where.glob("*.safetensors"))
    index = json.loads((where / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == tree.nbytes(base.params)
    jax.tree.map(np.testing.assert_array_equal, lorax.load(str(where)).params, base.params)
    before = {file.name: file.read_bytes() for file in where.iterdir()}
    broken = jax.tree.map(lambda x: x * np.nan, base.params["ln_f"])
    with pytest.raises(ValueError, match="ln_f.* NaN or infinity"):
        models.save(where, base.replace(params=base.params | {"ln_f": broken}))
    assert {file.name: file.read_bytes() for file in where.iterdir()} == before
