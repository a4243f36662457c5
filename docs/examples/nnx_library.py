"""A model of a public NNX library: Mamba-2 of mamba2-jax (pip install mamba2-jax), and a study.

    python -m lorax.run --config=docs/examples/nnx_library.py

The library's module returns a dictionary and takes more than tokens, so a wrapper of four lines
returns the logits. Nothing of the library is changed. Other libraries need as little:

    class Logits(nnx.Module):  # a model of google-tunix
        def __init__(self, model):
            self.model = model

        def __call__(self, tokens):
            b, t = tokens.shape
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t))
            return self.model(tokens, jnp.broadcast_to(jnp.arange(t), (b, t)), None, mask)[0]

Time: about a minute on two cores.
"""

from flax import nnx

from lorax import models
from lorax.config import default


class Logits(nnx.Module):
    """Tokens (B, T) int32 -> logits (B, T, V) float32."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens):
        return self.model(tokens)["logits"]


def mamba(rngs):
    """Random weights, gpt2-nano's tokenizer; `from_pretrained` of the library reads real ones."""
    import mamba2_jax  # here, so that the study can be read without it

    sizes = {"hidden_size": 32, "state_size": 8, "head_dim": 8, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 1024, "chunk_size": 128}
    model = mamba2_jax.Mamba2ForCausalLM(mamba2_jax.Mamba2Config(**sizes), rngs=rngs)
    return models.Model(Logits(model), vocabulary="gpt2-nano")


def get_config(arg=None):
    config = default()
    config.base = mamba
    config.method.targets = ("in_proj", "out_proj", "conv")
    config.train.batch_size = 8
    config.train.steps = 100
    config.eval.examples = 128
    config.sweep.rank = (1, 2)
    config.sweep.seed = (0, 1)
    return config
