"""Small adapter files for tests."""

import numpy as np
import safetensors.numpy

WIDTH = 32
NAMES = ("mlp_fc1", "self_attn_q_proj")


def kohya(path, layers: int, seed: int = 0, rank: int = 4):
    """Write a file of kohya's, of a text encoder: (path, {layer: its dW (in, out)})."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors, dense = {}, {}
    for name in (f"text_model_encoder_layers_{n}_{name}" for n in range(layers) for name in NAMES):
        down, up = draw(rank, WIDTH), draw(WIDTH, rank) * 0.1
        prefix = f"lora_te_{name}"
        tensors[f"{prefix}.lora_down.weight"], tensors[f"{prefix}.lora_up.weight"] = down, up
        tensors[f"{prefix}.alpha"] = np.array(rank / 2, np.float32)
        dense[prefix] = 0.5 * (up.astype(np.float64) @ down).T
    safetensors.numpy.save_file(tensors, path, {"ss_network_dim": str(rank)})
    return path, dense
