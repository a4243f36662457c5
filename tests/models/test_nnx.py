"""NNX modules as bases: docs/examples/nnx_*.py, and what other modules do."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import linen as nn
from flax import nnx
from support import require

import lorax
from lorax import adapters, convert, decode, outside, quant, tree
from lorax.methods import targets
from lorax.models import Model
from lorax.models.load import skeleton
from lorax.models.nnx import to_nnx

ROOT = pathlib.Path(lorax.__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
TINY, BRIDGE = f"{EXAMPLES / 'nnx_model.py'}:tiny", f"{EXAMPLES / 'nnx_bridge.py'}:classifier"
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) % 11


@pytest.fixture(scope="module")
def tiny():
    return lorax.load(TINY)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def trained(name, base, **hp):
    """A method and a state whose update is far from zero."""
    method = lorax.method(name, **hp)
    state = method.init(jax.random.key(0), base.params, base.sites)
    add = lambda x: x + 0.1 * normal(x.size, *x.shape) if x.dtype == jnp.float32 else x
    return method, state._replace(trainable=jax.tree.map(add, state.trainable))


def agree(base, inputs, name="lora", **hp):
    """The largest difference between bound parameters, merged ones, and the NNX module with these,
    over the size of the update's effect."""
    method, state = trained(name, base, **hp)
    merged = lorax.merge(method, state, base.params, base.sites)
    call = lambda params: lorax.apply(base.module, params, inputs)
    bound = method.bind(*state, base.params, sites=base.sites)
    before, ours, theirs = quick.jit(lambda *p: [call(x) for x in p])(base.params, bound, merged)
    module = to_nnx(base, merged)
    module.eval()
    effect = np.abs(ours - before).max()
    assert effect > 1e-3 * np.abs(before).max()
    returned = nnx.jit(lambda module, x: module(x))(module, inputs)
    return max(np.abs(ours - theirs).max(), np.abs(ours - returned).max()) / effect


# ------------------------------------------------------------------------------------ the examples


def test_the_base_computes_what_the_module_does_and_leaves_it_alone():
    functions = outside.run_file(EXAMPLES / "nnx_model.py")
    module = functions.tiny(nnx.Rngs(0)).module
    before, call = nnx.state(module), nnx.Linear.__call__
    base = lorax.load(module)
    assert base.name == "notebook.py:Decoder" and outside.resolve(base.name)() is module
    after = nnx.state(module)
    assert nnx.Linear.__call__ is call and not module.blocks[0].dropout.deterministic
    assert jax.tree.structure(before) == jax.tree.structure(after)
    module.eval()
    both = quick.jit(lambda x: (lorax.apply(base.module, base.params, x), module(x)))
    np.testing.assert_allclose(*both(TOKENS), atol=1e-6)
    assert base.causal and "module Decoder" in repr(base)


def test_layers_have_names_kinds_and_torch_places(tiny):
    assert tiny.layers["blocks/1/attention/query"] == ("blocks/1/attention/query/kernel", ())
    assert tiny.sites["blocks/0/attention/query/kernel"].outs == (1, 2)
    assert tiny.sites["words/embedding"].kind == "embed" and not tiny.traits.whole
    assert tiny.places.module("blocks/1/attention/out") == "blocks.1.attention.out"
    q_and_up = targets.resolve(("q", "up"), tiny.sites)
    assert {*q_and_up} == {
        f"blocks/{i}/{x}/kernel" for i in (0, 1) for x in ("attention/query", "up")
    }


def test_weights_are_drawn_from_a_seed_and_a_plan_allocates_none(tiny):
    assert lorax.load(f"{TINY}@1").sha256 != tiny.sha256 == lorax.load(f"random:{TINY}@0").sha256
    shapes = skeleton(huge, param_dtype="bfloat16")
    assert tree.nbytes(shapes.params) > 1e15
    assert {type(x) for x in jax.tree.leaves(shapes.params)} == {jax.ShapeDtypeStruct}
    with pytest.raises(ValueError, match="@3 given, but the function takes no argument 'rngs'"):
        lorax.load(f"{outside.spelled(unseeded)}@3")


@pytest.mark.parametrize("name, hp", [("lora", {}), ("dora", {}), ("ia3", None)])
def test_every_method_computes_what_its_merged_module_does(tiny, name, hp):
    hp = {"targets": ("k", "v", "down")} if hp is None else {"rank": 2, "targets": ("q", "o", "up")}
    assert agree(tiny, TOKENS, name, **hp) < 1e-4


def test_a_quantised_module_is_the_module_of_its_decoded_weights(tiny):
    coded = tiny.replace(params=quant.quantize(tiny.params, "nf4", sites=tiny.sites))
    assert tree.nbytes(coded.params) < 0.8 * tree.nbytes(tiny.params)
    assert agree(coded, TOKENS, rank=2, targets=("q", "o", "up", "words")) < 1e-4


def test_a_bridged_linen_module_is_adapted_like_any_other():
    base = lorax.load(BRIDGE)
    kinds = {path: site.kind for path, site in base.sites.items()}
    assert kinds["features/window/kernel"] == "conv" and kinds["features/hidden/kernel"] == "linear"
    assert base.traits.notes == ("BatchStat norm/mean, norm/var: frozen, in evaluation mode",)
    words = ("window", "hidden", "scores")
    assert agree(base, normal(1, 3, 8, 8, 1), rank=2, targets=words) < 1e-4


SMALL = {"steps": 2, "batch_size": 2, "seq_len": 64, "warmup": 0}


def study(file, folder, **changes):
    """A study of an example in a few steps: its run directory."""
    settings = outside.run_file(EXAMPLES / f"{file}.py").get_config()
    settings.train.update(SMALL)
    settings.eval.update(every=2, examples=8, test=8, batch_size=8)
    settings.analysis.report = False
    settings.sweep.rank, settings.sweep.seed = (1, 2), (0,)
    settings.update(changes)
    lorax.run(settings, folder / "run")
    return folder / "run"


def check_merged(run, name, words, capsys):
    """The adapter of a run in PEFT's format, merged by the command and by Python: one function."""
    base, adapter = lorax.load(name), run / "adapters" / "1"
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert about["peft_type"] == "LORA" and about["r"] == 2
    loaded = adapters.load(adapter, base)
    assert {path.rsplit("/", 1)[-1] for path in loaded.updates} == words
    module = to_nnx(base, loaded.merge().params)
    module.eval()
    out = run.parent / "merged"
    assert not convert.main(["merge", name, str(adapter), str(out)])
    assert "matrices merged" in capsys.readouterr().out
    back = lorax.load(f"{name}@{out}")
    call = lambda params: lorax.apply(base.module, params, TOKENS)
    every = quick.jit(lambda *p: [module(TOKENS), *map(call, p)])
    with jax.numpy_rank_promotion("allow"):
        returned, plain, bound, read = every(base.params, loaded.bind(), back.params)
    assert np.abs(bound - plain).max() > 1e-4
    np.testing.assert_allclose(bound, returned, atol=1e-5)
    np.testing.assert_allclose(bound, read, atol=1e-5)
    return back


def test_the_study_of_the_example_is_swept_exported_and_merged(tmp_path, capsys):
    run = study("nnx_model", tmp_path)
    rows = [json.loads(line) for line in (run / "members.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 2]
    back = check_merged(run, TINY, {"query", "value", "up", "down", "words"}, capsys)
    options = decode.DecodingOptions(max_new_tokens=2)
    prompts = ["One day, a little girl", "The"]
    alone = decode.complete(back, prompts[1:], options=options)
    assert decode.complete(back, prompts, options=options)[1:] == alone  # padding is not seen


def test_the_study_of_the_bridge_is_swept_and_merged(tmp_path):
    run = study("nnx_bridge", tmp_path)
    base = lorax.load(BRIDGE)
    merged = adapters.load(run / "adapters" / "1", base).merge()
    images = normal(1, 3, 8, 8, 1)
    scores, start = (to_nnx(base, params)(images) for params in (merged.params, base.params))
    assert not convert.main(["merge", BRIDGE, str(run / "adapters" / "1"), str(tmp_path / "out")])
    again = lorax.load(f"{BRIDGE}@{tmp_path / 'out'}")
    np.testing.assert_allclose(to_nnx(again, again.params)(images), scores, atol=1e-5)
    assert np.abs(scores - start).max() > 1e-3


def test_a_library_is_swept_exported_and_merged(tmp_path, capsys):
    """Mamba-2 of mamba2-jax, as it is on the package index; one of its kernels is no product's."""
    require("mamba2_jax")
    name = f"{EXAMPLES / 'nnx_library.py'}:mamba"
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # its code
        run = study("nnx_library", tmp_path)
        said = capsys.readouterr().out
        back = check_merged(run, name, {"in_proj", "out_proj", "conv"}, capsys)
    assert back.traits.whole[0] == "model/backbone/layers/0/mixer/conv1d/conv/kernel"
    assert re.search(r"makes 2 kernels plain arrays, 2\.56 kB in all, .*conv1d/conv", said)


# ----------------------------------------------------------------------------------- other modules


class Huge(nnx.Module):
    def __init__(self, rngs):
        self.words, self.out = (
            nnx.Embed(1 << 25, 1 << 25, rngs=rngs),
            nnx.Linear(1 << 25, 9, rngs=rngs),
        )

    def __call__(self, tokens):
        return self.out(self.words(tokens))


def huge(rngs):
    return Huge(rngs)


class Words(nnx.Module):
    """Tokens -> logits, with `change` called on the embeddings."""

    def __init__(self, rngs=None, **parts):
        rngs = rngs or nnx.Rngs(0)
        self.words = nnx.Embed(11, 8, rngs=rngs)
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, tokens):
        return self.words.attend(self.change(self.words(tokens)))


def unseeded():
    return Plain()


class Plain(Words):
    def change(self, x):
        return x


class Counted(Words):
    def change(self, x):
        self.count[...] += 1
        return x


class Sown(Words):
    def change(self, x):
        self.sow(nnx.Intermediate, "hidden", x)
        return x


class Noisy(Words):
    def change(self, x):
        return x + jax.random.normal(self.noise.default(), x.shape)


class Failing(Words):
    def change(self, x):
        return x @ jnp.ones((3, 3))


class Peeking(Words):
    def change(self, x):
        return x + x[:, -1:]


REFUSED = {
    "counted": lambda: Counted(count=nnx.Variable(jnp.zeros(()))),
    "sown": Sown,
    "noisy": lambda: Noisy(noise=nnx.Rngs(0)),
    "failing": Failing,
    "peeking": Peeking,
    "empty": lambda: nnx.bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)),
    "cached": lambda: Model(Plain(), cached=True),
}
WHY = {
    "counted": "the module's call changes its state count; a base must compute the same each time",
    "sown": "the module's call makes its state hidden;",
    "noisy": "outputs depend on random numbers, noise/default/(count|key); .*: set deterministic",
    "failing": r"test_nnx\.py:\d+: TypeError: dot_general requires contracting dimensions",
    "peeking": "the last token changes the logits of earlier tokens",
    "empty": r"ToNNX has no nnx\.Param of floats; .* needs lazy_init with an example",
    "cached": "cached: True given, which is for Linen modules only",
}


def refused():
    return REFUSED[refused.case]()


@pytest.mark.filterwarnings("ignore:.*sow.*")
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_no_base_is_refused_in_a_line(case, monkeypatch):
    monkeypatch.setattr(refused, "case", case, raising=False)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=WHY[case]) as caught:
        lorax.load(refused)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("base: ")


class Contract(nnx.Module):
    """As the Einsum of google-tunix: any equation, a parameter `w`."""

    def __init__(self, equation, shape, rngs):
        self.equation, self.w = equation, nnx.Param(jax.random.normal(rngs.params(), shape))

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.equation, x, jnp.astype(self.w[...], x.dtype))


class General(nnx.Module):
    """As the DenseGeneral of MaxText: a kernel, contracted by `lax.dot_general`, and a bias."""

    def __init__(self, n_in, n_out, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (n_in, *n_out)))
        self.bias = nnx.Param(jnp.ones(n_out))

    def __call__(self, x):
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(x, jnp.asarray(self.kernel[...], x.dtype), numbers)
        return y + self.bias[...][None, None]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.up = General(8, (2, 4), rngs)
        self.down = Contract("btnh,nhd->btd", (2, 4, 8), rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(self.norm(x))))


class Library(nnx.Module):
    """A stack of layers, raw parameters, and a kernel that is used in parts."""

    def __init__(self, rngs):
        make = nnx.vmap(Block, in_axes=(0,), out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (11, 8)))
        self.fused = nnx.Param(jax.random.normal(rngs.params(), (8, 16)))
        self.scale = nnx.Variable(jnp.ones(()))

    def __call__(self, tokens):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(self.table[tokens], self.layers)
        a, b = jnp.split(self.fused[...], 2, axis=1)
        return (nnx.tanh(x @ a) * (x @ b) * self.scale) @ self.table[...].T


def test_modules_that_no_library_knows():
    base = lorax.load(Library(nnx.Rngs(0)))
    assert {path: (*site[:4],) for path, site in base.sites.items()} == {
        "layers/down/kernel": ("linear", 1, (0, 1), (2,)),
        "layers/up/kernel": ("linear", 1, (0,), (1, 2)),
        "table/embedding": ("embed", 0, (0,), (1,)),
        "fused/kernel": ("other", 0, (0,), (1,)),
    }
    assert base.layers["layers/2/up"] == ("layers/up/kernel", (2,))
    assert base.parts["layers/1/up/bias"] == ("layers/up/bias", (1,))
    assert base.places.module("layers/1/down") == "layers.1.down"
    assert base.traits.whole == ("fused/kernel",)
    assert base.traits.notes == ("Variable scale: frozen, in evaluation mode",)
    assert {*targets.resolve(("all-linear",), base.sites)} == {
        "layers/down/kernel",
        "layers/up/kernel",
    }
    words = ("up", "down", "table", "fused")
    assert agree(base, TOKENS, rank=2, targets=words) < 1e-4


def test_an_adapter_after_a_layer_is_that_of_the_same_linen_module():
    """Houlsby's reads the output with its bias, which NNX adds in an operation of its own."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 8, name="words")(tokens)
            return nn.Dense(11, name="out")(
                nn.relu(nn.DenseGeneral((2, 8), name="down")(x))[..., 0, :]
            )

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.words = nnx.Embed(11, 8, rngs=rngs)
            self.down = nnx.LinearGeneral(8, (2, 8), rngs=rngs)
            self.out = nnx.Linear(8, 11, rngs=rngs)

        def __call__(self, tokens):
            return self.out(nnx.relu(self.down(self.words(tokens)))[..., 0, :])

    base, linen = lorax.load(NNX(nnx.Rngs(0))), Linen()
    params = tree.unflatten(tree.flatten(base.params) | {"down/bias": normal(3, 2, 8)})
    method, state = trained("pfeiffer", base, rank=2)
    bound = method.bind(*state, params, sites=base.sites)
    pairs = [(base.module, bound), (linen, bound), (base.module, params)]
    call = quick.jit(
        lambda *p: [lorax.apply(m, x, TOKENS) for (m, _), x in zip(pairs, p, strict=True)]
    )
    ours, theirs, before = call(*(x for _, x in pairs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - before).max() > 1e-3


def test_to_nnx_puts_parameters_into_the_modules_dtypes():
    module = Plain()
    module.words.embedding.set_value(module.words.embedding[...].astype(jnp.bfloat16))
    base = lorax.load(module)
    assert base.params["words"]["embedding"].dtype == jnp.float32
    back = to_nnx(base)
    assert back is not module and back.words.embedding.dtype == jnp.bfloat16
    nnx.update(module, nnx.state(to_nnx(base, jax.tree.map(jnp.zeros_like, base.params))))
    assert not np.any(module.words.embedding[...])
    with pytest.raises(ValueError, match="no parameter 'out/moments'; methods that read"):
        lorax.apply(base.module, base.params | {"out": {"moments": jnp.zeros(2)}}, TOKENS)
    with pytest.raises(ValueError, match="gpt2-nano is gpt2, not made of an NNX module"):
        to_nnx(skeleton("gpt2-nano"))
