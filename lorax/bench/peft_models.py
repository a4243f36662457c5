"""The other side: the same models in transformers and PEFT, in torch."""

import importlib.util
import time
from collections.abc import Callable

import jax

from lorax.bench import bases


def found() -> bool:
    """Whether torch, PEFT and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))


def _model(shape: bases.Shape, targets):
    import peft
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    c = shape.config
    hf = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.n_positions, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    lora = peft.LoraConfig(r=bases.RANK, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
    model = transformers.GPT2LMHeadModel(hf).to("cuda" if on_gpu else "cpu")
    return peft.get_peft_model(model, lora), lora


def train(shape: bases.Shape) -> Callable[[], float]:
    """Seconds of one step of one member (c_attn with the same rank has as many parameters)."""
    import torch

    model, _ = _model(shape, ["c_attn"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3)
    tokens = torch.randint(0, shape.config.vocab_size, (shape.batch, shape.seq + 1))
    tokens = tokens.to(model.device)

    def loss():
        logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def run(steps=shape.steps) -> float:
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
