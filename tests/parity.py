"""Training beside PEFT: one small model in both, one set of starting arrays, one stream of batches.

ours, theirs = parity.pair("llama", tmp_path)            # Base, transformers model: same weights
model = peft.get_peft_model(theirs, peft_config)
parity.disturb(model)                                    # off the identity, so that all count
state = parity.filled(state, arrays)                     # the method's State with PEFT's arrays
parity.assert_same(ours, method, state, model)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from quick import jit
from support import require

import lorax
from lorax import config, tree
from lorax.train import step as steps

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 48, 16, 40, 2, 4
LR, DECAY = 5e-3, 0.1
#: Three of a LLaMA's layers, and where PEFT has them.
LLAMA = {"h/attn/q": "self_attn.q_proj", "h/attn/v": "self_attn.v_proj"}
LLAMA |= {"h/mlp/down": "mlp.down_proj"}
WORDS = tuple(path.rpartition("/")[2] for path in LLAMA)
PROJECTIONS = [module.rpartition(".")[2] for module in LLAMA.values()]


def pair(family: str, directory):
    """(Base, transformers model) of random weights: "gpt2", or the `model_type` of a decoder, with
    two heads of keys."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        hf = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            n_inner=INNER, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(hf)
    else:
        more = {} if family == "llama" else dict(head_dim=WIDTH // HEADS, pad_token_id=0)
        hf = transformers.AutoConfig.for_model(
            family, **more,
            vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
            intermediate_size=INNER, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(hf)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms as well, and weights that are felt
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(directory)
    return lorax.load(str(directory)), model.eval()


def disturb(model) -> None:
    """Random numbers on what PEFT trains: a start at the identity would hide half of a formula."""
    torch = require("torch")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def arrays(model) -> dict[str, np.ndarray]:
    """{name: array} of everything in a PEFT model that is not the base's, frozen or not."""
    return {
        name: p.detach().numpy().copy()
        for name, p in [*model.named_parameters(), *model.named_buffers()]
        if "default" in name
    }


def stacked(read) -> dict[str, np.ndarray]:
    """{path/name: array of all layers} of `LLAMA`. read: from a module's name in PEFT's model to
    {name: array}."""
    found = {}
    for path, module in LLAMA.items():
        layers = [read(f"base_model.model.model.layers.{i}.{module}") for i in range(LAYERS)]
        found |= {f"{path}/kernel/{n}": np.stack([x[n] for x in layers]) for n in layers[0]}
    return found


@functools.cache
def batches(n: int = 20) -> np.ndarray:
    """Tokens (n, 3, 11) int32."""
    return np.random.default_rng(5).integers(0, VOCABULARY, (n, 3, 11)).astype(np.int32)


def _section():
    section = config.default().train
    section.update(steps=100, warmup=0, lr=LR, weight_decay=DECAY, schedule="constant", clip=0.0)
    return section


def train(base, method, state, n: int = 20):
    """(n,) losses before each of n AdamW steps on `batches`, nats a token."""
    section = _section()
    hyper = steps.Hyper(jnp.float32(LR), jnp.float32(DECAY), jax.random.key(0))
    program = steps.Program(base.module, method, base.sites, section, dropout=False, merge=False)
    member = steps.start(method, *state, section, hyper, base.sites)
    run = jit(functools.partial(steps.train_steps, program))
    tokens = jnp.asarray(batches(n))[:, None]
    mask = jnp.ones(tokens.shape, jnp.float32)
    _, logs = run(base.params, state.constants, hyper, member, {"tokens": tokens, "mask": mask})
    return np.asarray(logs["loss"])


def train_torch(model, optimizer=None, after=lambda step: None, n: int = 20) -> np.ndarray:
    """The same of a PEFT model. optimizer: another than AdamW; after(step): called when the
    gradients of a step are there and the optimiser has stepped (AdaLoRA)."""
    torch = require("torch")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, LR, weight_decay=DECAY)
    losses = []
    for step, tokens in enumerate(torch.tensor(batches(n)).long()):
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return np.array(losses)


def logits(base, method, state) -> np.ndarray:
    """Ours on the first batch, (3, 10, V)."""
    bound = method.bind(*state, base.params, sites=base.sites)
    forward = jit(functools.partial(lorax.apply, base.module))
    return np.asarray(forward(bound, jnp.asarray(batches()[0, :, :-1])))


def logits_torch(model) -> np.ndarray:
    """PEFT's on the first batch."""
    torch = require("torch")
    with torch.no_grad():
        return model(input_ids=torch.tensor(batches()[0, :, :-1]).long()).logits.numpy()


def filled(state, arrays: dict[str, np.ndarray]):
    """The state with {path/name: array} in place of its own leaves, of the same shapes."""
    trees = []
    for part in state:
        flat = tree.flatten(part)
        for path, leaf in flat.items():
            if path in arrays:
                assert leaf.shape == arrays[path].shape, (path, leaf.shape, arrays[path].shape)
                flat[path] = jnp.asarray(arrays[path], leaf.dtype)
        trees.append(tree.unflatten(flat))
    known = {path for part in state for path in tree.flatten(part)}
    assert set(arrays) <= known, sorted(set(arrays) - known)
    return type(state)(*trees)


def assert_same(base, method, state, model, optimizer=None) -> None:
    """The same logits, losses in twenty steps and number of trained values in both. optimizer: of
    PEFT's model, another than AdamW."""
    ours, theirs = logits(base, method, state), logits_torch(model)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method.count(base.params, base.sites) == trained
    losses = train_torch(model, optimizer)
    np.testing.assert_allclose(train(base, method, state), losses, rtol=1e-4)
