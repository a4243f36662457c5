"""Rotary positions (RoPE, arXiv:2104.09864), their extensions to longer texts, and how Hugging
Face's config.json describes them.

Axes: B batch, T positions, H heads, D features of one head, R of them rotated.
"""

import dataclasses
import math
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from lorax import fields


@dataclasses.dataclass(frozen=True)
class Rope:
    """Hugging Face's `rope_parameters`: the rotation frequencies (formulas: see `frequencies`).

    A field is None if the `rope_type` doesn't use it, or for its default. partial_rotary_factor:
    the share of each head's features that is rotated, the first ones; None: all.
    llama_4_scaling_beta: see `query_growth`; None: queries don't grow.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float | None = None
    llama_4_scaling_beta: float | None = None

    def rotated(self, features: int) -> int:
        """R, the number of a head's `features` that are rotated."""
        return int(features * (self.partial_rotary_factor or 1))

    def limit(self, longest: int) -> int | None:
        """The text length up to which the frequencies are constant; None: for any length. longest:
        the model's `max_position_embeddings`."""
        limits = {"dynamic": longest, "longrope": self.original_max_position_embeddings}
        return limits.get(self.rope_type)


def rope_frequencies(features: int, theta: float) -> np.ndarray:
    """(features / 2,) radians by which each pair of features rotates per position:
    theta^(-2i / features) for i = 0, 1... (RoPE, arXiv:2104.09864, section 3.2.2)."""
    return theta ** (-np.arange(0, features, 2) / features)


def rope(positions, frequencies, scale: float = 1.0):
    """(cos, sin) of every position, each (B, T, 1, features / 2) float32, for `rotate`.

    positions: (B, T) int32. frequencies: (features / 2,), or (B, T, features / 2) where they
    depend on the text. scale: multiplies both (YaRN's attention factor).
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    frequencies = jnp.broadcast_to(frequencies, (*positions.shape, frequencies.shape[-1]))
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, :, None]
    return scale * jnp.cos(angles), scale * jnp.sin(angles)


def rotate(x, cos, sin):
    """Rotary embedding of queries or keys x (B, T, H, D), computed in float32. cos, sin: for R
    features, the first of each head; the others stay. Feature i is paired with feature i + R / 2,
    as in Hugging Face's checkpoints (the paper pairs neighbours)."""
    r = 2 * cos.shape[-1]
    rotated = x if r == x.shape[-1] else x[..., :r]
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if r == x.shape[-1] else jnp.concatenate([turned, x[..., r:]], axis=-1)


def query_growth(r: Rope, positions):
    """The factor of queries at positions (B, T), as (B, T, 1, 1) float32: 1 + beta log(1 + floor(t
    / n)) at position t, which keeps attention sharp beyond n = `original_max_position_embeddings`
    (LLaMA 4's temperature, which Ministral 3 has)."""
    lengths = positions // r.original_max_position_embeddings
    growth = 1 + r.llama_4_scaling_beta * jnp.log1p(lengths.astype(jnp.float32))
    return growth[..., None, None]


def frequencies(r: Rope, features: int, longest: int, lengths=None):
    """(radians by which each pair of features rotates per position, scale of cos and sin).

    features: D of a head. longest: the model's `max_position_embeddings`. lengths: (B, T) int32,
    the length of each token's text, or None if none is beyond `Rope.limit`. Returns radians
    (R / 2,), or (B, T, R / 2) if lengths are given and matter, and a float. With w_i =
    theta^(-2i / R), s the `factor` and n = `original_max_position_embeddings`:

    default: w_i (arXiv:2104.09864). linear: w_i / s (arXiv:2306.15595). dynamic: theta grows with
    a text of l > m = `longest` tokens to theta (s l / m - s + 1)^(R / (R - 2)) (arXiv:2309.00071,
    sections 3.1 and 3.3). yarn: between w_i and w_i / s, depending on how many rotations a pair
    makes in n tokens (its sections 3.2 and 3.4). llama3: the same idea with another ramp (LLaMA
    3.1's reference code). longrope: w_i divided by a factor for each pair, one set of factors for
    texts up to n tokens and another for longer ones (arXiv:2402.13753).
    """
    d = r.rotated(features)
    w = rope_frequencies(d, r.rope_theta)
    n = r.original_max_position_embeddings
    if r.rope_type == "linear":
        return w / r.factor, 1.0
    if r.rope_type == "dynamic" and lengths is not None:
        m = longest
        stretch = r.factor * jnp.maximum(lengths, m).astype(jnp.float32) / m - (r.factor - 1)
        powers = jnp.asarray(-np.arange(0, d, 2) / (d - 2), jnp.float32)[None, None]
        return jnp.asarray(w, jnp.float32)[None, None] * stretch[..., None] ** powers, 1.0
    if r.rope_type == "llama3":
        turns = n * w / (2 * math.pi)
        ramp = (turns - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
        return _between(w / r.factor, w, ramp), 1.0
    if r.rope_type == "yarn":
        # The (fractional) index of the pair that makes so many rotations in n tokens.
        pair = lambda turns: d * math.log(n / (2 * math.pi * turns)) / (2 * math.log(r.rope_theta))
        low, high = pair(r.beta_fast or 32), pair(r.beta_slow or 1)
        if r.truncate is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = (np.arange(d // 2) - low) / (high - low or 0.001)
        return _between(w, w / r.factor, ramp), _yarn_scale(r)
    if r.rope_type == "longrope":
        scale = r.attention_factor
        if scale is None:
            scale = math.sqrt(1 + math.log(max(r.factor, 1)) / math.log(n))
        short, long = (w / np.asarray(f) for f in (r.short_factor, r.long_factor))
        if lengths is None:
            return short, scale
        short, long = (jnp.asarray(f, jnp.float32)[None, None] for f in (short, long))
        return jnp.where((lengths > n)[..., None], long, short), scale
    return w, 1.0


def _between(a, b, ramp):
    """a where ramp <= 0, b where ramp >= 1, linear interpolation between."""
    ramp = np.clip(ramp, 0, 1)
    return (1 - ramp) * a + ramp * b


def _yarn_scale(r: Rope) -> float:
    """YaRN's attention temperature, as a factor of cos and sin (arXiv:2309.00071, 3.4)."""
    if r.attention_factor is not None:
        return r.attention_factor
    scale = lambda m: 0.1 * m * math.log(max(r.factor, 1)) + 1
    return scale(r.mscale) / scale(r.mscale_all_dim) if r.mscale and r.mscale_all_dim else scale(1)


# ----------------------------------------------------------------------------- Hugging Face layout

#: Fields of a config.json that describe the rotation.
FIELDS = {
    "rope_theta": fields.optional(fields.above(1)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), fields.optional(fields.OBJECT)),
    "original_max_position_embeddings": fields.optional(fields.whole(2)),
    "partial_rotary_factor": fields.optional(fields.POSITIVE),
}
#: Fields of its "rope_parameters" or "rope_scaling".
ROPE_FIELDS = {
    "rope_type": fields.TEXT,
    "type": fields.TEXT,
    **{
        name: FIELDS[name]
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    },
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "mscale")
        + ("mscale_all_dim", "beta_fast", "beta_slow"),
        fields.optional(fields.POSITIVE),
    ),
    "llama_4_scaling_beta": fields.optional(fields.POSITIVE),
    "truncate": fields.optional(fields.FLAG),
    "short_factor": fields.optional(fields.each(fields.POSITIVE)),
    "long_factor": fields.optional(fields.each(fields.POSITIVE)),
}

# rope_type -> the fields of `Rope` that it needs.
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("factor", "short_factor", "long_factor"),
}


#: Fields of `Rope` that only some families have -> what the others do.
OPTIONS = {
    "partial_rotary_factor": "RoPE rotates whole heads",
    "llama_4_scaling_beta": "queries don't grow with their position",
}


def place_of(hf: dict) -> str:
    """The field of a config.json that holds the rotation: `rope_parameters` (transformers 5), or
    `rope_scaling` beside `rope_theta` (before)."""
    return "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"


def from_hf(
    hf: dict,
    place: str,
    given: dict,
    theta: float,
    *,
    features: int,
    longest: int,
    options: Collection[str] = (),
) -> Rope:
    """The `Rope` that a config.json describes.

    hf: its fields (`FIELDS`). given: the object with the rotation's fields, found in its field
    `place`. theta: `rope_theta`, if `given` has none. features, longest: as for `frequencies`.
    options: which of the fields in `OPTIONS` the family has. Raises ValueError that names the field
    for a rotation that the family does not have or lorax does not compute.
    """
    nested = [key for key, x in given.items() if isinstance(x, dict) and key not in ROPE_FIELDS]
    if nested:
        raise ValueError(f"{place} by layer type are not supported: {fields.shown(nested)}")
    parameters = fields.read(given, ROPE_FIELDS, place)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = theta
    kind = parameters["rope_type"]
    if kind not in _NEEDS:
        raise ValueError(f"rope_type {kind!r} is not one of {[*_NEEDS]}")
    share = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    parameters["partial_rotary_factor"] = None if share == 1 else share
    for name, without in OPTIONS.items():
        if name not in options and parameters.get(name) is not None:
            raise ValueError(f"{name}={parameters[name]} is not supported; {without}")
    if kind in ("llama3", "yarn", "longrope") or parameters.get("llama_4_scaling_beta"):
        name = "original_max_position_embeddings"
        parameters[name] = hf.get(name) or parameters.get(name) or longest
        if parameters[name] < 2:
            raise ValueError(f"{place}: {name}, or max_position_embeddings, is {parameters[name]}")
        if kind in ("yarn", "longrope") and parameters.get("factor") is None:
            parameters["factor"] = longest / parameters[name]
    for name in _NEEDS[kind]:
        if parameters.get(name) is None:
            raise ValueError(f"{place}: {kind!r} needs {name}; given are {sorted(given)}")
    known = [field.name for field in dataclasses.fields(Rope)]
    r = Rope(**{name: parameters[name] for name in known if parameters.get(name) is not None})
    _check(r, place, features)
    return r


def _check(r: Rope, place: str, features: int) -> None:
    """Raises ValueError for numbers that don't go together."""
    rotated = r.rotated(features)
    if r.partial_rotary_factor is not None and not (0 < rotated <= features and rotated % 2 == 0):
        raise ValueError(
            f"partial_rotary_factor={r.partial_rotary_factor} rotates {rotated} of {features} "
            "features of each head; it must be an even number of them"
        )
    if r.rope_type == "llama3" and r.high_freq_factor <= r.low_freq_factor:
        raise ValueError(
            f"{place}: high_freq_factor {r.high_freq_factor} is not above "
            f"low_freq_factor {r.low_freq_factor}"
        )
    if r.rope_type == "dynamic" and rotated < 4:
        raise ValueError(f"{place}: 'dynamic' needs a head_dim of 4 or more, not {rotated}")
    for name in ("short_factor", "long_factor"):
        factors = getattr(r, name)
        if factors is not None and len(factors) != rotated // 2:
            raise ValueError(
                f"{place}: {name} has {len(factors)} numbers, should have {rotated // 2}, half of "
                "head_dim or hidden_size / num_attention_heads"
            )


def to_hf(r: Rope) -> dict:
    """The fields of a config.json that describe the rotation to transformers 4 and 5."""
    turning = {name: x for name, x in dataclasses.asdict(r).items() if x is not None}
    apart = ("rope_theta", "partial_rotary_factor")  # transformers 4 has them beside the rest
    stretch = {name: x for name, x in turning.items() if name not in apart}
    described = {"rope_parameters": turning, "rope_theta": turning["rope_theta"]}
    described["rope_scaling"] = None if stretch == {"rope_type": "default"} else stretch
    if r.rope_type == "longrope":  # transformers 4 reads it only there
        name = "original_max_position_embeddings"
        described[name] = turning[name]
    if r.partial_rotary_factor is not None:
        described["partial_rotary_factor"] = r.partial_rotary_factor
    return described
