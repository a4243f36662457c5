"""LoRAs on parts of a fused matrix, stored as one: as tinker-cookbook's converter stores them."""

import numpy as np
import pytest
from language_files import dense, directory, draw

from lorax.interop import formats

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["in_proj"]}


def adapter(path, parts, **changes):
    """parts: [(A (r, in), B (out, r))], as `_merge_fused_projections` joins them."""
    ranks, outs = [len(A) for A, _ in parts], [len(B) for _, B in parts]
    B = np.zeros((sum(outs), sum(ranks)), np.float32)
    for i, (_, one) in enumerate(parts):
        row, column = sum(outs[:i]), sum(ranks[:i])
        B[row : row + outs[i], column : column + ranks[i]] = one
    module = "base_model.model.backbone.layers.0.mixer.in_proj"
    tensors = {f"{module}.lora_A.weight": np.concatenate([A for A, _ in parts])}
    tensors[f"{module}.lora_B.weight"] = B
    patterns = {"in_proj": sum(ranks)}, {"in_proj": 2 * sum(ranks)}
    config = CONFIG | dict(zip(("rank_pattern", "alpha_pattern"), patterns, strict=True))
    return directory(path, tensors | changes, config)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 9), (6, 2, 7)])
def test_parts_come_apart_with_their_own_rank(tmp_path, sizes):
    parts = [(draw(4, 16) + i, draw(n, 4)) for i, n in enumerate(sizes)]
    updates = formats.read(adapter(tmp_path, parts)).updates
    assert [one.layer[-len("in_proj.0") :] for one in updates] == [
        f"in_proj.{i}" for i in range(len(sizes))
    ]
    for update, (A, B) in zip(updates, parts, strict=True):
        assert (update.rank, update.scale, update.shape) == (4, 2.0, (16, len(B)))
        want = 2 * (B.astype(np.float64) @ A).T
        np.testing.assert_allclose(dense(update), want, rtol=1e-6, atol=1e-6)


def test_one_lora_stays_one(tmp_path):
    (update,) = formats.read(adapter(tmp_path, [(draw(4, 16), draw(12, 4))])).updates
    assert update.rank == 4 and update.layer.endswith("in_proj")
    twice = [(draw(2, 16), draw(6, 2)), (draw(2, 16), draw(6, 2))]
    (update,) = formats.read(adapter(tmp_path, twice), as_stored=True).updates
    assert update.rank == 4
