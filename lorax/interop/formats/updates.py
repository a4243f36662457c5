"""The update of one module from its tensors. kohya, LyCORIS, diffusers and PEFT share these kinds:

    LoRA    dW = s up down               lora_down (r, in), lora_up (out, r)
    LoCon   of a convolution             lora_down (r, in, kh, kw), lora_up (out, r, 1, 1);
                                         with lora_mid (r, r, kh, kw), Tucker: down (r, in, 1, 1)
    DoRA    one of them, with lengths    dora_scale (out, 1, ...), in old files (1, in, ...);
                                         PEFT's magnitude (out,) or (1, out, 1, 1)
    LoHa    dW = s (w1a w1b) * (w2a w2b) hada_w1_a, _w2_a (out, r), hada_w1_b, _w2_b (r, in kh kw);
                                         Tucker: hada_t1, _t2 (r, r, kh, kw), w1_a, w2_a (r, out)
    LoKr    dW = s kron(w1, w2)          lokr_w1 or lokr_w1_a (out 1, r), lokr_w1_b (r, in 1);
                                         lokr_w2 alike; with lokr_t2, Tucker: lokr_w2_a (r, out 2)
    full    dW = s diff                  diff (out, in, ...)

(LyCORIS, lycoris/functional/{general,loha,lokr}.py.) A weight here is (out, in, ...) as in torch;
dW is its matrix (out, in kh kw), transposed.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorax.interop.adapter import Factors
from lorax.interop.formats.contract import Update
from lorax.interop.formats.opened import check_floats, numbers, quiet
from lorax.interop.tensors import Stored

#: Numbers that a dW may have which is made of smaller tensors: 1 GiB of float32.
MOST = 2**28
LORA = ("lora_down", "lora_up", "lora_mid", "dora_scale", "magnitude")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_WITH_KERNEL = ("hada_t1", "lokr_t2", "lokr_w2", "diff")
#: The last words of a module's tensors that have a dW.
WORDS = (*LORA, *LOHA, *LOKR, "diff")
ROWS = "dora_scale has one length per input: W + dW has its rows rescaled, which is not in dW"

#: Where kohya's scale is from.
OF_TENSOR = "tensor alpha / r"
Scale = Callable[[str, int | None], tuple[float, str]]


class Module(NamedTuple):
    """The tensors of one module, by the words above, in a file.

    scale: (layer, r) -> (s, where it is from), with r None for a kind without a rank.
    """

    layer: str
    tensors: Mapping[str, Stored]
    scale: Scale
    file: Path

    def error(self, why: str) -> ValueError:
        shapes = ", ".join(f"{word} {x.shape}" for word, x in self.tensors.items())
        return ValueError(f"{self.file}: {self.layer}: {why}; there is {shapes}")

    def shape(self, word: str) -> tuple[int, ...]:
        """Raises ValueError if the tensor is missing, is empty or holds no floats."""
        if word not in self.tensors:
            raise self.error(f"{word} is missing")
        check_floats(self.tensors[word])
        if 0 in self.tensors[word].shape:
            raise self.error(f"{word} is empty")
        return self.tensors[word].shape

    def only(self, words: tuple[str, ...]) -> None:
        """Raises ValueError for tensors that a kind does not have."""
        more = sorted(set(self.tensors) - set(words))
        if more:
            raise self.error(f"{', '.join(more)} can't be read beside {words[0].split('_')[0]}")

    def __getitem__(self, word: str) -> np.ndarray:
        return numbers(self.tensors[word])


def update(module: Module) -> Update:
    """The update of a module; only shapes are looked at.

    Raises ValueError that names file and module for tensors that don't fit together.
    """
    words = module.tensors
    if any(word in words for word in LORA[:3]):
        return _lora(module)
    if any(word in words for word in LOHA):
        return _loha(module)
    if any(word in words for word in LOKR):
        return _lokr(module)
    if "diff" in words:
        return _full(module)
    raise module.error("no update")


def _lora(module: Module) -> Update:
    """LoRA, LoCon and their DoRA."""
    module.only(LORA)
    down, up = module.shape("lora_down"), module.shape("lora_up")
    fits = len(down) >= 2 and len(up) >= 2 and up[1] == down[0] and set(up[2:]) <= {1}
    kernel = down[2:]
    if "lora_mid" in module.tensors:
        mid = module.shape("lora_mid")
        fits &= len(mid) > 2 and mid[:2] == down[:1] * 2 and set(kernel) <= {1}
        kernel = mid[2:]
    if not fits:
        raise module.error("need lora_down (r, in, ...) and lora_up (out, r, ...)")
    r = down[0]
    shape = down[1] * math.prod(kernel), up[0]
    s, source = module.scale(module.layer, r)
    dora = next((word for word in ("magnitude", "dora_scale") if word in module.tensors), None)
    per_input = dora is not None and _is_per_input(module, dora, down[1], up[0])

    def read() -> Factors:
        a = module["lora_down"].reshape(r, -1)  # (r, in kh kw)
        if "lora_mid" in module.tensors:
            mid = module["lora_mid"].reshape(r, r, -1)
            a = np.einsum("ijk,jq->iqk", mid, a).reshape(r, -1)
        b = module["lora_up"].reshape(-1, r).T
        m = None if dora is None or per_input else module[dora].reshape(-1)
        return Factors(a.T, b, s, m)

    kind = "LoCon" if len(down) > 2 else "LoRA"
    kind = "DoRA" if dora else kind
    one = _made(module, "lora_down", kind, shape, r, s, source, read, (ROWS,) * per_input)
    return one._replace(kernel=kernel)


def _is_per_input(module: Module, word: str, inputs: int, outputs: int) -> bool:
    """Whether DoRA's lengths are of the inputs: in dora_scale the place of the ones tells."""
    m = module.shape(word)
    if math.prod(m) == outputs and (word == "magnitude" or m[:1] == (outputs,)):
        return False
    if word == "dora_scale" and m[:2] == (1, inputs) and math.prod(m) == inputs:
        return True
    raise module.error(f"need {word} ({outputs}, 1, ...) or (1, {inputs}, ...)")


def _loha(module: Module) -> Update:
    module.only((*LOHA, "dora_scale"))
    tucker = "hada_t1" in module.tensors or "hada_t2" in module.tensors
    shapes = []
    for i in "12":
        a, b = module.shape(f"hada_w{i}_a"), module.shape(f"hada_w{i}_b")
        kernel = module.shape(f"hada_t{i}")[2:] if tucker else ()
        if len(a) != 2 or len(b) != 2 or a[0 if tucker else 1] != b[0]:
            raise module.error("need hada_w1_a (out, r) and hada_w1_b (r, in), and w2 alike")
        if tucker and module.shape(f"hada_t{i}")[:2] != (b[0], b[0]):
            raise module.error("need hada_t1 (r, r, kh, kw), hada_w1_a (r, out), and w2 alike")
        shapes.append((b[1] * math.prod(kernel), a[1 if tucker else 0]))
    if shapes[0] != shapes[1]:
        raise module.error(f"hada_w1 makes {shapes[0]}, hada_w2 {shapes[1]}")
    ranks = [module.shape(f"hada_w{i}_b")[0] for i in "12"]
    s, source = module.scale(module.layer, ranks[0])

    def read() -> Factors | np.ndarray:
        if not tucker and math.prod(ranks) < min(shapes[0]):
            return _products(module, s)
        whole = _side(module, "hada", "1") * _side(module, "hada", "2")
        return np.ascontiguousarray((np.float32(s) * whole).T)

    _check_size(module, shapes[0])
    return _dense(module, "hada_w1_a", "LoHa", shapes[0], math.prod(ranks), s, source, read)


def _products(module: Module, s: float) -> Factors:
    """LoHa as factors of rank r^2, which are the products of each column of w1_a with each of w2_a,
    and of each row of w1_b with each of w2_b."""
    up1, up2 = module["hada_w1_a"], module["hada_w2_a"]
    down1, down2 = module["hada_w1_b"], module["hada_w2_b"]
    a = np.einsum("pi,qi->ipq", down1, down2).reshape(down1.shape[1], -1)
    b = np.einsum("op,oq->pqo", up1, up2).reshape(-1, len(up1))
    return Factors(a, b, s)


def _lokr(module: Module) -> Update:
    module.only((*LOKR, "dora_scale"))
    sides, ranks = {}, []
    for i in "12":
        if f"lokr_w{i}" in module.tensors:
            sides[i] = module.shape(f"lokr_w{i}")
            continue
        a, b = module.shape(f"lokr_w{i}_a"), module.shape(f"lokr_w{i}_b")
        tucker = i == "2" and "lokr_t2" in module.tensors
        kernel = module.shape("lokr_t2")[2:] if tucker else ()
        if len(a) != 2 or len(b) != 2 or a[0 if tucker else 1] != b[0]:
            raise module.error(f"need lokr_w{i}_a (out, r) and lokr_w{i}_b (r, in)")
        if tucker and module.shape("lokr_t2")[:2] != (b[0], b[0]):
            raise module.error("need lokr_t2 (r, r, kh, kw), lokr_w2_a (r, out), lokr_w2_b (r, in)")
        sides[i] = (a[1 if tucker else 0], b[1], *kernel)
        ranks.append(b[0])
    if len(sides["1"]) != 2 or len(sides["2"]) < 2:
        raise module.error("need lokr_w1 (out 1, in 1) and lokr_w2 (out 2, in 2, ...)")
    if len(set(ranks)) > 1:
        raise module.error(f"ranks {ranks}, which should be one")
    matrices = {i: (math.prod(side[1:]), side[0]) for i, side in sides.items()}
    shape = tuple(np.prod([*matrices.values()], axis=0, dtype=object))
    rank = math.prod(min(*matrices[i], *_rank_of(module, i)) for i in "12")
    s, source = module.scale(module.layer, ranks[0] if ranks else None)

    def read() -> np.ndarray:
        w1, w2 = _side(module, "lokr", "1"), _side(module, "lokr", "2")
        # kron of w1 (out 1, in 1) and w2 (out 2, in 2, ...): a column of w2 is (in 2, kh kw).
        return np.ascontiguousarray((np.float32(s) * np.kron(w1, w2)).T)

    _check_size(module, shape)
    return _dense(module, _first(module), "LoKr", shape, rank, s, source, read)


def _rank_of(module: Module, i: str) -> tuple[int, ...]:
    """The inner rank of a side of LoKr, if it has one."""
    b = module.tensors.get(f"lokr_w{i}_b")
    return () if b is None or f"lokr_w{i}" in module.tensors else (b.shape[0],)


def _side(module: Module, word: str, i: str) -> np.ndarray:
    """A factor of LoHa's or LoKr's product as a matrix (out, in kh kw)."""
    if f"{word}_w{i}" in module.tensors:
        whole = module[f"{word}_w{i}"]
        return whole.reshape(len(whole), -1)
    a, b = module[f"{word}_w{i}_a"], module[f"{word}_w{i}_b"]
    if f"{word}_t{i}" not in module.tensors:
        return a @ b
    core = module[f"{word}_t{i}"]
    core = core.reshape(*core.shape[:2], -1)
    return np.einsum("ijk,ip,jq->pqk", core, a, b, optimize=True).reshape(a.shape[1], -1)


def _full(module: Module) -> Update:
    module.only(("diff", "dora_scale"))
    diff = module.shape("diff")
    if len(diff) < 2:
        raise module.error("need diff (out, in, ...)")
    shape = math.prod(diff[1:]), diff[0]
    s, source = module.scale(module.layer, None)
    read = lambda: np.ascontiguousarray((np.float32(s) * module["diff"].reshape(diff[0], -1)).T)
    return _dense(module, "diff", "full", shape, min(shape), s, source, read)


def _dense(module: Module, word, kind, shape, rank, s, source, read) -> Update:
    warning = "dora_scale: W + dW is rescaled as well, which is not in dW"
    warnings = (warning,) * ("dora_scale" in module.tensors)
    kind = f"{kind}, DoRA" if warnings else kind
    one = _made(module, word, kind, shape, min(rank, *shape), s, source, read, warnings)
    # The kernel of a convolution is known if a tensor has its axes.
    axes = next((module.tensors[x].shape[2:] for x in _WITH_KERNEL if x in module.tensors), ())
    return one._replace(kernel=axes, stored=module.tensors)


def _made(module: Module, word, kind, shape, rank, s, source, read, warnings) -> Update:
    dtype = module.tensors[word].kind
    return Update(module.layer, kind, shape, rank, s, source, dtype, quiet(read), warnings)


def _first(module: Module) -> str:
    return next(word for word in LOKR if word in module.tensors)


def _check_size(module: Module, shape: tuple[int, int]) -> None:
    """Raises ValueError for a dW that small tensors make too large: no real matrix is."""
    if math.prod(shape) > MOST:
        raise module.error(f"they make a dW of {shape[0]} x {shape[1]}, the most is {MOST} numbers")
