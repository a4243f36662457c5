"""The table of docs/formats.md: each kind of update in each format is exact, or is refused."""

import json
import pathlib
import re

import numpy as np
import pytest
from format_files import dense, draw, written
from peft_files import foreign

from lorax.interop import formats
from lorax.interop.formats import image_names, names

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "formats.md"
LINES = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
HEAD, *ROWS = ([cell.strip() for cell in line] for line in LINES if len(line) == 6)
CELLS = {
    (row[0], target): cell
    for row in ROWS[1:]
    for target, cell in zip(HEAD[1:], row[1:], strict=True)
}
BASE = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
IMAGE = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_out"
TEXT = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
LORA = {"lora_A.weight": (2, 24), "lora_B.weight": (16, 2)}
HADA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 24), "hada_w2_a": (16, 2), "hada_w2_b": (2, 24)}
CORES = {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}
CORES |= {"hada_w1_a": (2, 16), "hada_w2_a": (2, 16)}
LOKR = {"lokr_w1": (4, 4), "lokr_w2": (4, 6)}
CONV = {"lora_A.weight": (2, 24, 3, 3), "lora_B.weight": (16, 2, 1, 1)}
MID = {
    "lora_A.weight": (2, 24, 1, 1),
    "lora_B.weight": (16, 2, 1, 1),
    "lora_mid.weight": (2, 2, 3, 3),
}
#: {row: [(format of the source, words of both modules, words of the second, config of PEFT's)]}
SOURCES = {
    "LoRA": [("kohya", LORA, {}, {}), ("peft", LORA, {}, {})],
    "LoRA of several ranks": [
        ("peft", LORA, {"lora_A.weight": (4, 24), "lora_B.weight": (16, 4)},
         {"rank_pattern": {TEXT[1]: 4}, "alpha_pattern": {TEXT[1]: 16}}),
    ],
    "LoRA of several scales": [("peft", LORA, {}, {"alpha_pattern": {TEXT[1]: 16}})],
    "LoRA of an embedding": [
        ("peft", {"lora_embedding_A": (2, 24), "lora_embedding_B": (16, 2)}, None, {}),
    ],
    "AdaLoRA": [
        ("peft", {"lora_A": (2, 24), "lora_B": (16, 2), "lora_E": (2, 1)}, {},
         {"peft_type": "ADALORA", "init_r": 2}),
    ],
    "DoRA": [
        ("kohya", LORA | {"dora_scale": (16, 1)}, {}, {}),
        ("peft", LORA | {"lora_magnitude_vector": (16,)}, {}, {"use_dora": True}),
    ],
    "DoRA with a length for each input": [("kohya", LORA | {"dora_scale": (1, 24)}, {}, {})],
    "LoCon, also with Tucker's core": [
        ("kohya", CONV, {}, {}), ("kohya", MID, {}, {}), ("peft", CONV, {}, {})
    ],
    "LoHa, also with Tucker's cores": [
        ("kohya", HADA, {}, {}), ("kohya", HADA | CORES, {}, {}),
        ("peft", HADA, {}, {"peft_type": "LOHA"}),
    ],
    "LoKr": [("kohya", LOKR, {}, {}), ("peft", LOKR, {}, {"peft_type": "LOKR", "alpha": 2})],
    "LoHa or LoKr with lengths": [
        ("kohya", HADA | {"dora_scale": (16, 1)}, {}, {}),
        ("kohya", LOKR | {"dora_scale": (16, 1)}, {}, {}),
    ],
    "weights trained in full (`diff`)": [("kohya", {"diff": (16, 24)}, {}, {})],
    "biases and norms beside (`diff_b`, `w_norm`)": [
        ("kohya", LORA | {"diff_b": (16,)}, {"w_norm": (16,), "b_norm": (16,)}, {}),
    ],
    "PEFT's weights trained in full": [("peft", LORA, {"weight": (16, 24)}, {})],
    "PEFT's experts": [
        ("peft", {"lora_A.weight": (4, 24), "lora_B.weight": (16, 4)}, None,
         {"target_parameters": ["mlp.experts.down_proj"]}),
    ],
}  # fmt: skip


def source(path, kind, words, second, config, modules):
    """An adapter of two modules, or of one if `second` is None."""
    if kind == "kohya":
        to_kohya = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
        tensors = {}
        for module, own in zip(modules, (words, words | second), strict=True):
            own = {to_kohya.get(word, word): draw(*shape) for word, shape in own.items()}
            tensors |= {f"{module}.{word}": x for word, x in own.items()}
            if "diff" not in own and "lokr_w2" not in own:
                tensors[f"{module}.alpha"] = np.float32(3)
        return written(path, tensors)
    apart = second is not None and "weight" in second
    each = [words] if second is None else [words, second if apart else words | second]
    tensors = {
        f"{module}.{word}": draw(*shape)
        for module, own in zip(modules, each, strict=False)
        for word, shape in own.items()
    }
    directory = foreign(path / "adapter", tensors, **config)
    if config.get("peft_type") in ("LOHA", "LOKR"):
        fields = json.loads((directory / "adapter_config.json").read_text())
        fields.pop("lora_alpha")
        (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def common(layer):
    """What a matrix is called in all formats."""
    name = image_names.diffusers(layer) or names.hugging_face(layer)
    return re.sub(r"^unet\.", "", name)


def test_the_table_has_all_rows():
    assert set(HEAD[1:]) == set(formats.WRITERS)
    assert {row for row, _ in CELLS} == set(SOURCES)


@pytest.mark.parametrize("row, target", CELLS)
def test_a_cell_of_the_page_holds(tmp_path, row, target):
    """Exact: dW, scale and all tensors beside are the same; no: one line with the reason."""
    tried = 0
    for i, (kind, words, second, config) in enumerate(SOURCES[row]):
        image = target in ("kohya", "diffusers", "peft")
        if kind == "kohya" and not image and CELLS[row, target] == "yes":
            continue  # names of an image model
        modules = IMAGE if kind == "kohya" else TEXT
        if kind == "peft" and image:
            modules = [common(layer) for layer in IMAGE]
            ours = dict(zip(TEXT, modules, strict=True))
            config = config | {
                field: {ours[module]: x for module, x in value.items()}
                for field, value in config.items()
                if field.endswith("_pattern")
            }
        if row == "LoRA of an embedding":
            modules = ["model.embed_tokens"]
        if row == "PEFT's experts":
            modules = ["model.layers.0.mlp.experts"]
        (tmp_path / str(i)).mkdir()
        given = source(tmp_path / str(i), kind, words, second, config, modules)
        if target == "gguf":
            pytest.importorskip("gguf")
        found = formats.read(given, BASE, as_stored=True)
        out = tmp_path / f"out{i}{'.safetensors' if target == 'kohya' else '.gguf'}"
        if CELLS[row, target] == "no":
            with pytest.raises(ValueError, match="can't hold it: .") as error:
                formats.WRITERS[target](out, found, BASE)
            assert "\n" not in str(error.value) and not out.exists()
        else:
            written_there = formats.WRITERS[target](out, found, BASE)
            there = formats.read(written_there, BASE, as_stored=True)
            check_same(found, there, 1e-7 if target == "gguf" else 0)
        tried += 1
    assert tried


def check_same(found, there, rounding):
    """rounding: of the scale, which GGUF stores in 32 bits."""
    theirs, ours = ({common(one.layer): one for one in file.updates} for file in (found, there))
    assert theirs.keys() == ours.keys()
    for name, one in theirs.items():
        assert ours[name].scale == pytest.approx(one.scale, rel=rounding, abs=0)
        assert ours[name].dtype == one.dtype
        np.testing.assert_allclose(dense(ours[name]), dense(one), rtol=rounding, atol=0)
        m, n = (getattr(x.read(), "m", None) for x in (one, ours[name]))
        np.testing.assert_array_equal(m if m is not None else 0, n if n is not None else 0)
    assert found.beside == there.beside and found.changes.keys() == there.changes.keys()
    for name, tensor in found.changes.items():
        np.testing.assert_array_equal(tensor.read(), there.changes[name].read())
