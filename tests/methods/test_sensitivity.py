"""Evidence: gradients and inputs against torch, and a ranking that finds what matters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from quick import jit
from support import require

import lorax
from lorax import ops, tree
from lorax.methods import sensitivity, starts
from lorax.models import Base, gpt2
from lorax.tasks.kinds import ARRAYS, TEXTS

pytestmark = pytest.mark.usefixtures("unoptimised")
PATHS = ("h/attn/q/kernel", "h/attn/o/kernel", "h/mlp/down/kernel")
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return parity.pair("llama", tmp_path_factory.mktemp("llama"))


def rows(n: int = 2) -> dict:
    """n batches of 3 rows, each with a prompt that does not count and a padded tail."""
    tokens = parity.batches()[:n]
    mask = np.zeros(tokens.shape, np.float32)
    for row, end in enumerate((11, 8, 5)):
        mask[:, row, 3:end] = 1
    return {"tokens": tokens, "mask": mask}


@pytest.fixture(scope="module")
def found(pair):
    return sensitivity.evidence(pair[0], TEXTS, rows(), PATHS, sensitivity.STATISTICS)


def heard(model, batches) -> tuple[dict, dict]:
    """({module: inputs of each batch (B, T, in)}, {module: gradient of the mean loss (out, in)})
    of a transformers model, by hooks and by torch's own backward pass."""
    torch = require("torch")
    names = [f"model.layers.{i}.{m}" for i in range(parity.LAYERS) for m in MODULES]
    inputs = {name: [] for name in names}
    hear = lambda name: lambda module, args, out: inputs[name].append(args[0].detach().numpy())
    hooks = [model.get_submodule(n).register_forward_hook(hear(n)) for n in names]
    weights = [model.get_submodule(name).weight for name in names]
    total = 0
    for tokens, mask in zip(batches["tokens"], batches["mask"], strict=True):
        tokens, mask = torch.tensor(tokens).long(), torch.tensor(mask)[:, 1:]
        logits = model(input_ids=tokens[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        total = total + (each * mask.flatten()).sum()
    grads = torch.autograd.grad(total / float(batches["mask"][:, :, 1:].sum()), weights)
    for hook in hooks:
        hook.remove()
    return inputs, {name: g.numpy() for name, g in zip(names, grads, strict=True)}


def test_gradients_and_inputs_are_what_torch_hears(pair, found):
    inputs, grads = heard(pair[1], rows())
    for path, module in zip(PATHS, MODULES, strict=True):
        for i in range(parity.LAYERS):
            name, own = f"model.layers.{i}.{module}", {k: x[i] for k, x in found[path].items()}
            scale = np.abs(grads[name]).max()
            np.testing.assert_allclose(own["gradient"], grads[name].T, atol=2e-5 * scale)
            moments, covariance = 0, 0
            for batch in inputs[name]:
                for x, end in zip(batch, (10, 7, 4), strict=True):
                    wide = np.concatenate([x[:end], np.ones((end, 1))], axis=1)
                    moments = moments + wide.T @ wide
                    x = x[:end] / abs(x[:end].max())
                    covariance = covariance + x.T @ x / 6
            for kind, want in (("moments", moments), ("covariance", covariance)):
                np.testing.assert_allclose(own[kind], want, atol=2e-5 * np.abs(want).max())
            assert own["moments"][-1, -1] == 2 * (10 + 7 + 4)


def test_remat_and_segments_change_nothing(pair, found):
    """The same tokens are real, once by the mask and once by segments."""
    base, batches = pair[0], rows()
    segments = np.zeros_like(batches["tokens"])
    for row, end in enumerate((10, 7, 4)):
        segments[:, row, :end] = 1
    module = base.module.clone(config=dataclasses.replace(base.config, remat="full"))
    base, batches = base.replace(module=module), batches | {"segments": segments}
    again = sensitivity.evidence(base, TEXTS, batches, PATHS, sensitivity.STATISTICS)
    for path, kinds in found.items():
        for kind, want in kinds.items():
            assert again[path][kind].dtype == jnp.float32
            np.testing.assert_allclose(again[path][kind], want, atol=1e-5 * np.abs(want).max())


def test_the_energy_of_a_model_where_one_matrix_matters():
    """Layer 1 writes a word's embedding through `down` only: nothing else has a gradient."""
    base = one_matters()
    paths = [path for path, site in base.sites.items() if site.kind == "linear"]
    found = sensitivity.evidence(base, TEXTS, rows(1), paths)
    ranking = sensitivity.rank_matrices(found, rank=2)
    best = ranking[0]
    assert (best.path, best.index) == ("h/mlp/down/kernel", (1,))
    assert best.energy * best.share > 100 * max(m.energy for m in ranking[1:])
    assert best.parameters == 2 * (4 * 16 + 16) and 0 < best.share <= 1
    assert [m.score for m in ranking] == sorted((m.score for m in ranking), reverse=True)

    chosen = sensitivity.choose(ranking, rank=2, n=1)
    assert {m for m, r in chosen.items() if r} == {("h/mlp/down/kernel", (1,))}
    ranks = starts.by_path(chosen)
    assert ranks == {"h/mlp/down/kernel": [0, 2]}
    method = lorax.method("lora", rank=2, targets=("mlp", "attention"), ranks=ranks)
    assert method.count(base.params, base.sites) == best.parameters
    # A rank beyond the average goes where the gradient is.
    auto = starts.redistribute(sensitivity.spectra(found), rank=1, rho=3)
    assert sum(auto.values()) == len(auto) and auto["h/mlp/down/kernel", (1,)] == 3


def one_matters() -> Base:
    config = gpt2.Config(
        vocab_size=parity.VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2
    )
    module = gpt2.GPT2(config)
    params = jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    flat = tree.flatten(params)
    for path in flat:
        if path.endswith(("o/kernel", "down/kernel")):  # blocks that write nothing: only what
            flat[path] = jnp.zeros_like(flat[path])  # writes has a gradient
        if path.endswith("mlp/up/kernel"):  # and up's outputs are what down's gradient is made of
            flat[path] = flat[path] * jnp.array([0.0, 100.0])[:, None, None]
        if path.endswith("attn/v/kernel"):
            flat[path] = jnp.zeros_like(flat[path])
    sites = ops.sites_from_shapes(params)
    return Base(module, tree.unflatten(flat), config, None, sites, "gpt2", "-")


def test_a_budget_passes_over_what_does_not_fit():
    of = lambda path, parameters, energy: sensitivity.Matrix(path, (), energy, 1.0, parameters)
    ranking = [of("a", 60, 9.0), of("b", 50, 5.0), of("c", 40, 1.0), of("d", 1, 0.001)]
    taken = lambda **how: {p for (p, _), r in sensitivity.choose(ranking, 4, **how).items() if r}
    assert taken(budget=100) == {"a", "c"} and taken(n=2) == {"a", "b"}
    assert taken(n=1, budget=55) == {"b"}
    with pytest.raises(ValueError, match="n, budget: None, 0 given: no matrix fits"):
        taken(budget=0)


@pytest.mark.parametrize(
    ("paths", "kinds", "message"),
    [
        (("h/attn/q/kernel",), ("moment",), "statistics: 'moment' is not one of gradient, moments"),
        (("h/attn/x/kernel",), ("gradient",), "paths: h/attn/x/kernel can't be adapted; there is"),
        (
            ("embed/embedding",),
            ("moments",),
            "paths: embed/embedding: the inputs of its kind, embed",
        ),
        (("lm_head/kernel",), ("covariance",), "paths: lm_head/kernel: a language model's head"),
    ],
)
def test_what_can_not_be_read_is_one_clear_error(pair, paths, kinds, message):
    with pytest.raises(ValueError, match=message):
        sensitivity.evidence(pair[0], TEXTS, rows(), paths, kinds)


def test_of_arrays_the_inputs_are_the_scaled_pixels():
    base = lorax.load("random:mlp-12-6-3")
    rng = np.random.default_rng(0)
    batches = {
        "inputs": rng.integers(0, 256, (2, 5, 2, 6, 1)).astype(np.uint8),
        "label": rng.integers(0, 3, (2, 5)).astype(np.int32),
        "weight": np.ones((2, 5), np.float32),
    }
    paths = ("dense_1/kernel", "head/kernel")
    read = sensitivity.evidence(base, ARRAYS, batches, paths, ("gradient", "moments"))
    pixels = batches["inputs"].reshape(10, 12).astype(np.float32) / 255
    x = np.column_stack([pixels, np.ones(10)])
    np.testing.assert_allclose(read["dense_1/kernel"]["moments"], x.T @ x, rtol=1e-5)

    def loss(kernel):
        params = base.params | {"head": base.params["head"] | {"kernel": kernel}}
        nats = jax.nn.log_softmax(lorax.apply(base.module, params, pixels))
        return -jnp.mean(nats[jnp.arange(10), batches["label"].reshape(10)])

    want = jax.jit(jax.grad(loss))(base.params["head"]["kernel"])
    np.testing.assert_allclose(read["head/kernel"]["gradient"], want, rtol=1e-4, atol=1e-7)
