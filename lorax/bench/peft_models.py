"""The other side: the same models in transformers and PEFT, in torch."""

import importlib.util
import time
from collections.abc import Callable

import jax

from lorax.bench import bases
from lorax.models import gpt2


def found() -> bool:
    """Whether torch, PEFT and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))


def device() -> str:
    """torch's name of the device that lorax runs on."""
    import torch

    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def gpt2_model(c: gpt2.Config):
    """transformers' GPT-2 of these sizes, without dropout, with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    hf = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(hf).to(device())


def _model(shape: bases.Shape, targets):
    import peft

    lora = peft.LoraConfig(r=bases.RANK, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
    return peft.get_peft_model(gpt2_model(shape.config), lora), lora


def train(shape: bases.Shape, autocast: bool = False) -> Callable[[], float]:
    """Seconds of one step of one member (c_attn with the same rank has as many parameters).
    autocast: products in bfloat16."""
    model, _ = _model(shape, ["c_attn"])
    return stepping(model, (shape.batch, shape.seq, shape.steps), autocast)


def stepping(model, rows: tuple[int, int, int], autocast: bool = False) -> Callable[[], float]:
    """Seconds of one step of a causal model. rows: (sequences of a batch, tokens, steps of a
    call)."""
    import torch

    batch, seq, k = rows
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    tokens = torch.randint(0, model.config.vocab_size, (batch, seq + 1)).to(model.device)

    def loss():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens[:, :-1]).logits
        target = tokens[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target)

    def run(steps=k) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            loss().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps

    return run


def mixed(shape: bases.Shape, tokens: int, adapters: int = 8) -> Callable[[], float]:
    """Seconds of one pass of a mixed batch: `adapter_names` holds each row's adapter."""
    import copy

    import torch

    model, lora = _model(shape, ["c_attn", "c_proj", "c_fc"])
    names = ["default"] + [f"adapter{i}" for i in range(1, adapters)]
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.eval()
    ids = torch.randint(0, shape.config.vocab_size, (adapters, 64)).to(model.device)

    @torch.no_grad()
    def run(times=4) -> float:
        past = None
        if tokens == 1:
            past = model(input_ids=ids[:, :32], adapter_names=names, use_cache=True).past_key_values
        caches = [copy.deepcopy(past) for _ in range(times)]
        begin = time.perf_counter()
        for cache in caches:
            model(
                input_ids=ids[:, -tokens:], adapter_names=names, use_cache=True,
                past_key_values=cache, logits_to_keep=1,
            )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    return run
