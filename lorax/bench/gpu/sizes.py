"""How large what is measured is: for an accelerator, or for a CPU, where the code is tried."""

from typing import NamedTuple

from lorax.bench import bases
from lorax.models import decoder, gpt2


class Sizes(NamedTuple):
    """kernels: (in, out) of the 4-bit products; cycled: bytes of distinct weights in 4 bits that a
    timed call goes through, more than a cache holds; rows: of these products, the most telling
    first. square: a product that shows the device's rate; copied: bytes of an array that shows its
    bandwidth. gpt2: model and batch of LoRA; members: of the sweeps. llama, batch: of QLoRA.
    prompt, new: tokens of generation. seconds: how long a call is repeated."""

    kernels: tuple[tuple[int, int], ...]
    cycled: float
    rows: tuple[int, ...]
    square: int
    copied: int
    gpt2: bases.Shape
    members: tuple[int, int]
    llama: decoder.Config
    batch: tuple[int, int, int]
    prompt: int
    new: int
    seconds: float


_LLAMA_7B = decoder.Config(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048,
    dtype="bfloat16", remat="full",
)  # fmt: skip
_LLAMA_SMALL = decoder.Config(
    vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    dtype="bfloat16", remat="full",
)  # fmt: skip
_GPT2_SMALL = gpt2.Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=1, n_head=2)

FULL = Sizes(
    kernels=((4096, 4096), (4096, 11008)),
    cycled=200e6,
    rows=(16, 1, 256, 2048, 1024, 64, 512, 8192),
    square=8192,
    copied=2**30,
    gpt2=bases.STEP._replace(steps=10),
    members=(8, 32),
    llama=_LLAMA_7B,
    batch=(4, 512, 2),
    prompt=32,
    new=64,
    seconds=0.3,
)
SMALL = Sizes(
    kernels=((256, 256),),
    cycled=5e4,
    rows=(16, 1, 72, 1100),
    square=128,
    copied=2**16,
    gpt2=bases.Shape(_GPT2_SMALL, 2, 16, 2),
    members=(2, 3),
    llama=_LLAMA_SMALL,
    batch=(1, 16, 1),
    prompt=4,
    new=4,
    seconds=0.0,
)
