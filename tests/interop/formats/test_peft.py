"""PEFT's files, read layer by layer, against the reading of whole files."""

import numpy as np
from peft_files import foreign

from lorax.interop import formats, peft


def draw(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def test_updates_are_those_of_the_whole_file(tmp_path):
    tensors = {"layers.0.q.lora_A.weight": draw(2, 8), "layers.0.q.lora_B.weight": draw(6, 2)}
    tensors |= {"layers.1.q.lora_A.default.weight": draw(4, 8)}
    tensors |= {"layers.1.q.lora_B.default.weight": draw(6, 4), "score.weight": draw(3, 8)}
    tensors = {name.replace(".default", ""): x for name, x in tensors.items()}
    config = dict(peft_type="LORA", r=2, lora_alpha=4, rank_pattern={"layers.1.q": 4})
    path = foreign(tmp_path / "adapter", tensors, **config, use_rslora=True)
    found, whole = formats.read(path), peft.load(path)
    assert found.format == "PEFT" and found.beside == {"score.weight": (3, 8)}
    assert [update.layer for update in found.updates] == [*whole.factors]
    for update in found.updates:
        a, b, s, m = update.read()
        want = whole.factors[update.layer]
        assert (s, update.scale, m) == (want.s, want.s, None)
        assert update.source == "config lora_alpha / sqrt r"
        np.testing.assert_array_equal(a, want.a)
        np.testing.assert_array_equal(b, want.b)
