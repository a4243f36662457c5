"""LoRA-XS: the dense formula, what is frozen, and the subspaces that it can't leave."""

import jax
import numpy as np
import pytest
from small import noisy, three_layers

from lorax import methods, tree
from lorax.methods.lora_xs import lora_xs


def test_the_update_is_the_dense_formula():
    """It lies in the span of w's first singular vectors, on either side."""
    base = three_layers()
    method = lora_xs(rank=3, alpha=6, targets=("q", "down"), layers=(0, 2))
    state = method.init(jax.random.key(0), base.params, base.sites)
    assert method.count(base.params, base.sites) == 2 * 2 * 9
    assert not any(np.any(x) for x in tree.flatten(state.trainable).values())
    state = state._replace(trainable=noisy(state.trainable))
    flat, deltas = tree.flatten(base.params), method.delta(*state, base.params, base.sites)
    assert len(deltas) == 2
    for path, dw in deltas.items():
        assert not np.any(dw[1])
        for layer in (0, 2):
            u, sigma, vt = np.linalg.svd(flat[path][layer], full_matrices=False)
            m = np.asarray(methods.joined(state.trainable)[path]["m"][layer], np.float64)
            # The signs of singular vectors are the decomposition's own; u and v share them.
            a = np.asarray(methods.joined(state.constants)[path]["a"][layer])
            signs = np.sign(np.sum(a * u[:, :3], axis=0))
            left, right = u[:, :3] * sigma[:3] * signs, signs[:, None] * vt[:3]
            np.testing.assert_allclose(dw[layer], 2 * left @ m @ right, rtol=0, atol=1e-5)


def test_the_papers_start_is_nearly_the_base():
    base = three_layers()
    method = lora_xs(rank=3, std=1e-5)
    state = method.init(jax.random.key(0), base.params, base.sites)
    drawn = np.concatenate([np.ravel(x) for x in tree.flatten(state.trainable).values()])
    assert 0.5e-5 < drawn.std() < 2e-5
    with pytest.raises(ValueError, match="method.std: -1 given, must be at least 0"):
        lora_xs(std=-1)
    with pytest.raises(ValueError, match="method.rank: 9 given, but .* is 8 x 8: at most 8"):
        lora_xs(rank=9).count(base.params, base.sites)
