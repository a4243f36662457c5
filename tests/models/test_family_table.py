"""The table of docs/families.md: each cell that it claims is run here, on one model per family."""

import copy
import functools
import re
from pathlib import Path
from typing import NamedTuple

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import small
from quick import jit
from support import require

import lorax
from lorax import adapters, config, models, quant, tree
from lorax.models.families import FAMILIES
from lorax.models.load import config_fields, skeleton
from lorax.models.shapes import ARCHITECTURES
from lorax.planning import compiled
from lorax.tasks import kinds

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
# As wide as `decoders.TINY`, so that programs of single kernels are compiled once.
WIDTHS = dict(hidden_size=24, num_hidden_layers=2, intermediate_size=20, num_attention_heads=4)
SEQUENCE = WIDTHS | dict(vocab_size=40, num_labels=3, max_position_embeddings=16)
#: Families that are not in `decoders.CASES`: transformers' head, and fields of its config.
OTHERS = {
    "gpt2": (
        "CausalLM",
        dict(vocab_size=40, n_positions=16, n_embd=24, n_inner=20, n_layer=2, n_head=4),
    ),
    "falcon": (
        "CausalLM",
        dict(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
            ffn_hidden_size=20, new_decoder_architecture=True, num_kv_heads=2, bias=True,
        ),
    ),
    "gemma3": ("CausalLM", decoders.SEEING),
    "bert": ("SequenceClassification", SEQUENCE),
    "roberta": ("SequenceClassification", SEQUENCE | dict(type_vocab_size=1)),
    "deberta-v2": (
        "SequenceClassification",
        SEQUENCE | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4),
    ),
    "clip_text_model": (
        "",
        WIDTHS | dict(
            vocab_size=40, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
            initializer_factor=0.2,
        ),
    ),
    "vit": (
        "ImageClassification",
        WIDTHS | dict(image_size=8, patch_size=4, num_labels=3),
    ),
}  # fmt: skip
#: Diffusion models of diffusers: fields of their config.
DENOISING = {
    "DiTTransformer2DModel": dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=4, in_channels=3,
        num_embeds_ada_norm=5,
    ),
    "UNet2DConditionModel": dict(
        sample_size=8, in_channels=3, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
}  # fmt: skip
#: Networks that have no model in transformers, by name.
NAMED = {"mlp": "mlp-64-12-10", "lenet": "mnist-lenet"}


class Made(NamedTuple):
    """A family's tiny model of random weights. theirs: transformers' or diffusers' model, None
    without one; inputs: a batch that it reads; expected: its outputs."""

    base: models.Base
    theirs: object
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray | None

    def logits(self, params) -> np.ndarray:
        """Ours with these parameters."""
        return np.asarray(self.run(params, *map(jnp.asarray, self.inputs)))

    @property
    def run(self):
        return _program(self.base)


@functools.lru_cache(maxsize=1)  # so that equal trees of parameters compile once
def _program(base):
    return jit(functools.partial(lorax.apply, base.module))


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """family -> `Made`. The last one is kept: the cells of a row follow each other."""

    @functools.lru_cache(maxsize=1)
    def made(family) -> Made:
        if family in NAMED:
            base = lorax.load(f"random:{NAMED[family]}")
            models.save(directory := tmp_path_factory.mktemp(family), base)
            return Made(lorax.load(str(directory)), None, draw(base), None)
        theirs = random_model(family)
        theirs.save_pretrained(directory := tmp_path_factory.mktemp(family))
        layers = {"unroll": 1} if "unroll" in config_fields(family) else {}
        base = lorax.load(str(directory), **layers)  # a program of one layer compiles sooner
        return Made(base, theirs, inputs := draw(base), outputs(theirs, inputs))

    return made


def random_model(family):
    """transformers' or diffusers' model, with weights and biases large enough to matter."""
    if family in DENOISING:
        require("torch").manual_seed(0)
        return disturbed(getattr(require("diffusers"), family)(**DENOISING[family]))
    if family not in OTHERS:
        names = [case.name for case in decoders.CASES.values() if case.model_type == family]
        return decoders.reference(names[0])
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    head, fields = OTHERS[family]
    described = transformers.AutoConfig.for_model(family, **fields)
    kind = f"AutoModelFor{head}" if head else "AutoModel"
    model = getattr(transformers, kind).from_config(described)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return disturbed(model)


def disturbed(model):
    """The model with noise on every parameter."""
    torch = require("torch")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def draw(base) -> tuple[np.ndarray, ...]:
    """A batch of three tokens' rows or of three images, with timesteps and conditions for a
    diffusion model."""
    rng = np.random.default_rng(0)
    if base.input_shape is None:
        return (rng.integers(3, 40, (3, 10), np.int32),)
    images = rng.standard_normal((3, *base.input_shape)).astype(np.float32)
    condition = base.traits.condition
    if condition is None:
        return (images,)
    given = rng.integers(0, 5, (3, *condition.shape)).astype(condition.dtype)
    return images, np.array([0, 20, 50], np.int32), given


def outputs(model, inputs) -> np.ndarray:
    """Logits or scores of transformers' model, or what diffusers' predicts."""
    torch, (first, *others) = require("torch"), inputs
    images = first.ndim == 4
    first = torch.from_numpy(first.transpose(0, 3, 1, 2).copy() if images else first)
    others = [
        torch.from_numpy(x).long() if x.dtype == np.int32 else torch.tensor(x) for x in others
    ]
    with torch.no_grad():
        if others:
            return model(first, *others).sample.numpy().transpose(0, 2, 3, 1)
        made = model(first if images else first.long())
        return (made.logits if "logits" in made else made.last_hidden_state).numpy()


# ------------------------------------------------------------------------------------ the columns


def load(made, tmp_path):
    """What transformers saves is loaded, every parameter of it."""
    assert made.base.fresh == () and tree.flatten(made.base.params).keys() == {*made.base.sources}
    if made.theirs is not None:
        sizes = [p.numel() for name, p in made.theirs.named_parameters() if text_part(name)]
        assert tree.count(made.base.params) == sum(sizes)


def text_part(name) -> bool:
    return "vision_tower" not in name and "multi_modal" not in name


def logits(made, tmp_path):
    assert np.ptp(made.expected) > 0.5  # flat logits would agree with anything
    np.testing.assert_allclose(made.logits(made.base.params), made.expected, rtol=0, atol=1e-4)


def sweep(made, tmp_path):
    """Two members of different rank take two steps, and a third loss shows them; one of them alone
    has the same losses."""
    kind = kinds.ARRAYS if made.base.input_shape else kinds.LABELLED
    kind = kinds.TEXTS if made.base.causal else kind
    kind = kinds.NOISY if made.base.family in DENOISING else kind
    lora = functools.partial(lorax.method, "lora", alpha=4, targets=("all-linear",))
    built = [lora(rank=rank) for rank in (1, 3)]
    batches = batch(made, kind)
    _, together = small.swept(built, made.base, batches=batches, kind=kind)
    _, alone = small.swept(built[:1], made.base, batches=batches, kind=kind)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-5)
    assert np.isfinite(together).all() and (np.ptp(together, axis=1) > 0).all()
    assert together[0, 2] != together[1, 2]


def batch(made, kind) -> dict:
    """The same batch for three steps: leaves (3, 1, 3, ...)."""
    inputs, *others = made.inputs
    rows = {"inputs": inputs, "weight": np.ones(3, np.float32)}
    if kind is kinds.LABELLED:
        ones, zeros = np.ones_like(inputs), np.zeros_like(inputs)
        rows = {"tokens": inputs, "segments": ones, "types": zeros}
    if kind is kinds.TEXTS:
        rows = {"tokens": inputs, "mask": np.ones(inputs.shape, np.float32)}
    elif kind is kinds.NOISY:
        rows |= {"t": others[0], "condition": others[1], "draw": np.arange(3, dtype=np.uint32)}
    else:
        rows["label"] = np.arange(3, dtype=np.int32)
    return {name: jnp.asarray(np.tile(x, (3, 1, *[1] * x.ndim))) for name, x in rows.items()}


def peft_in(made, tmp_path):
    """An adapter that PEFT saved, on all linear layers, gives the logits of PEFT's own model."""
    peft = require("peft")
    theirs = copy.deepcopy(made.theirs)
    task = "CAUSAL_LM" if made.base.causal else None
    task = "SEQ_CLS" if made.base.traits.outputs else task
    every = "all-linear"
    if made.base.family in DENOISING:  # of which PEFT can't tell what "all-linear" is
        torch = require("torch")
        linear = theirs.named_modules()
        every = [name for name, module in linear if isinstance(module, torch.nn.Linear)]
    wanted = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=every,
        task_type=None if made.base.input_shape else task,
    )  # fmt: skip
    model = peft.get_peft_model(theirs, wanted).eval()
    parity.disturb(model)
    model.save_pretrained(tmp_path)
    expected = outputs(model, made.inputs)
    assert np.abs(expected - made.expected).max() > 0.1
    bound = adapters.load(tmp_path, made.base).bind()
    np.testing.assert_allclose(made.logits(bound), expected, rtol=0, atol=1e-4)


def peft_out(made, tmp_path):
    """PEFT opens an adapter of ours on all linear layers and computes the same logits."""
    peft, base = require("peft"), made.base
    linear = [f"re:{re.escape(path)}" for path, site in base.sites.items() if site.kind != "conv"]
    words = linear if base.family in DENOISING else ["all-linear"]  # PEFT's files have no patches
    method = lorax.method("lora", rank=2, alpha=6, targets=tuple(words))
    state = method.init(jax.random.key(0), base.params, base.sites)
    state = state._replace(trainable=small.noisy(state.trainable))
    assert not adapters.save(tmp_path, adapters.from_training(base, method, state))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(made.theirs), tmp_path).eval()
    bound = method.bind(*state, base.params, sites=base.sites)
    got = outputs(model, made.inputs)
    assert np.abs(got - made.expected).max() > 0.1
    np.testing.assert_allclose(made.logits(bound), got, rtol=0, atol=1e-4)


def nf4(made, tmp_path):
    """With its linear kernels in NF4 a model computes what it does with the decoded kernels."""
    coded = lorax.quantize(made.base)
    held = [x for x in tree.flatten(coded.params).values() if isinstance(x, quant.Quantised)]
    assert held and tree.nbytes(coded.params) < tree.nbytes(made.base.params)
    decoded = made.logits(lorax.dequantize(coded).params)
    scale = np.abs(decoded).max()
    np.testing.assert_allclose(made.logits(coded.params), decoded, rtol=0, atol=2e-5 * scale)


def plan(made, tmp_path):
    """Of a well-known model of the family, from its shapes; its step is not compiled."""
    family = made.base.family
    (name, *_) = [n for n, fields in ARCHITECTURES.items() if fields["model_type"] == family]
    c = config.default()
    c.base, c.method.targets, c.method.rank = f"random:{name}", ("all-linear",), 2
    if not made.base.causal:
        texts = made.base.input_shape is None
        images = "diffusion" if family in DENOISING else "mnist"
        c.task.update(dict(name="glue", subset="cola") if texts else dict(name=images))
    with pytest.MonkeyPatch.context() as patch:
        nothing = compiled.Measured(0, 0, 0, 0)
        patch.setattr(compiled, "measure", lambda *_: {(1, False): nothing})
        (row,) = lorax.plan(c).to_dict("records")
    head = dict(head="classification", labels=2) if "glue" in c.task.name else {}
    assert row["parameters"] == tree.count(skeleton(c.base, **head).params)
    assert row["weights"] == 4 * row["parameters"] > 0
    assert row["adapters"] == 4 * row["trainable_params"] > 0


CELLS = {
    "load": load,
    "logits": logits,
    "sweep": sweep,
    "PEFT in": peft_in,
    "PEFT out": peft_out,
    "NF4": nf4,
    "plan": plan,
}


# --------------------------------------------------------------------------------------- the page


def table() -> dict[tuple[str, str], str]:
    """{(family, column): what the page's cell says}."""
    lines = [line.strip("| ") for line in PAGE.splitlines() if line.startswith("|")]
    (_, *columns), _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    cells = {}
    for name, *row in rows:
        cells |= {(name.strip("`"), c): cell for c, cell in zip(columns, row, strict=True)}
    return cells


def test_the_page_has_every_family_and_every_column_and_a_reason_for_what_is_not_there():
    assert {family for family, _ in table()} == {*FAMILIES}
    assert {column for _, column in table()} - {"models"} == {*CELLS}
    reasons = set(re.findall(r"^(\([a-z]\)) \w", PAGE, re.MULTILINE))
    others = {cell for (_, column), cell in table().items() if column in CELLS} - {"yes"}
    assert others == reasons


@pytest.mark.filterwarnings("ignore")  # what PEFT and transformers warn about is not ours
@pytest.mark.parametrize(
    ("family", "column"),
    [pytest.param(*at, id="-".join(at)) for at, cell in table().items() if cell == "yes"],
)
def test_a_cell_of_the_page_holds(family, column, make, tmp_path):
    CELLS[column](make(family), tmp_path)
