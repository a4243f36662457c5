"""The same cases in torch: products by torch and bitsandbytes, steps and generation by PEFT.

Each names what is missing where a library is not installed.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator

import numpy as np

from lorax.bench import peft_models
from lorax.bench.gpu import models, products
from lorax.bench.gpu.rows import SkippedError, attempted, repeated, row
from lorax.bench.gpu.sizes import Sizes

PEFT = ("torch", "peft", "transformers")
BITSANDBYTES = ("torch", "bitsandbytes")


def require(*names: str) -> None:
    """Raises SkippedError that names the libraries that are not installed."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        raise SkippedError(f"{', '.join(missing)} not installed")


def product(sizes: Sizes, shape: tuple[int, int], rows: int) -> Iterator[dict]:
    """x w with weights in bfloat16 by torch, and in NF4 by bitsandbytes."""
    require("torch")
    import torch

    device, (n_in, n_out) = peft_models.device(), shape
    count = products.count(sizes, shape)
    draw = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16)
    xs, ws = [draw(rows, n_in) for _ in range(count)], [draw(n_out, n_in) for _ in range(count)]

    def torch_bf16():
        return lambda x, w: torch.nn.functional.linear(x, w), ws

    def bitsandbytes_nf4():
        require(*BITSANDBYTES)
        import bitsandbytes

        coded = [bitsandbytes.functional.quantize_4bit(w, quant_type="nf4") for w in ws]
        return lambda x, w: bitsandbytes.matmul_4bit(x, w[0].t(), w[1]), coded

    def measured(name, make):
        run, weights = make()
        every = lambda: [run(x, w) for x, w in zip(xs, weights, strict=True)]
        with torch.no_grad():
            every, in_graph = _graph(every, device)
            seconds = repeated(lambda: _seconds(every), sizes.seconds) / count
        return row(products.product_case(shape, rows), name, seconds, cuda_graph=in_graph)

    for name, make in {"torch bf16": torch_bf16, "bitsandbytes": bitsandbytes_nf4}.items():
        case = products.product_case(shape, rows)
        yield from attempted(case, name, lambda name=name, make=make: measured(name, make))


def _graph(run: Callable, device: str) -> tuple[Callable, bool]:
    """`run` as a CUDA graph, which has no gaps between kernels, and whether it is one."""
    import torch

    if device == "cpu":
        return run, False
    try:
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        return lambda kept=kept: graph.replay(), True
    except Exception:  # not every operation can be captured
        torch.cuda.synchronize()
        return run, False


def _seconds(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step(sizes: Sizes, dtype: str) -> Iterator[dict]:
    """A LoRA step by PEFT; in bfloat16 by autocast."""
    require(*PEFT)
    run = peft_models.train(sizes.gpt2, autocast=dtype == "bfloat16")
    yield row(models.step_case(sizes, dtype), "PEFT", repeated(run, sizes.seconds))


def mixed_batch(sizes: Sizes, tokens: int) -> Iterator[dict]:
    require(*PEFT)
    run = peft_models.mixed(sizes.gpt2, tokens, models.ADAPTERS)
    yield row(models.mixed_case(sizes, tokens), "PEFT", repeated(run, sizes.seconds))


def generation(sizes: Sizes) -> Iterator[dict]:
    """Greedy texts by transformers' `generate`, in bfloat16."""
    require(*PEFT)
    import torch

    model = peft_models.gpt2_model(sizes.gpt2.config).to(torch.bfloat16).eval()
    ids = torch.randint(0, sizes.gpt2.config.vocab_size, (models.ADAPTERS, sizes.prompt))
    ids = ids.to(model.device)
    options = {"max_new_tokens": sizes.new, "min_new_tokens": sizes.new, "do_sample": False}
    mask = torch.ones_like(ids)
    run = lambda: model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    with torch.no_grad():
        seconds = repeated(lambda: _seconds(run), sizes.seconds) / sizes.new
    per_second = float(models.ADAPTERS / np.median(seconds))
    yield row(models.generation_case(sizes), "transformers", seconds, tokens_per_second=per_second)


def llama_step(sizes: Sizes, path: str) -> Iterator[dict]:
    """A LoRA step of a LLaMA by PEFT, its base in bfloat16 or bitsandbytes' NF4, activations
    recomputed as on lorax's side. The model is made in bfloat16 and then quantised."""
    require(*PEFT, *(BITSANDBYTES if path == models.NF4 else ()))
    import peft
    import torch
    import transformers

    c, (batch, seq, _) = sizes.llama, sizes.batch
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings, use_cache=False,
    )  # fmt: skip
    transformers.logging.set_verbosity_error()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(peft_models.device()):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if path == models.NF4:
        _quantise(model)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    lora = peft.LoraConfig(r=models.RANK_4BIT, lora_alpha=16, target_modules="all-linear")
    run = peft_models.stepping(peft.get_peft_model(model, lora), (batch, seq, 1))
    seconds = repeated(run, sizes.seconds)
    yield row(models.llama_case(sizes), f"PEFT, {path}", seconds)


def _quantise(model) -> None:
    """Replace the linear layers of a LLaMA but its head by bitsandbytes' in NF4."""
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        weight = bitsandbytes.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, quant_type="nf4",
            compute_dtype=torch.bfloat16, device="meta",
        )  # fmt: skip
        layer.weight = weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(module.weight.device))
    model.is_loaded_in_4bit = True  # PEFT asks for it
