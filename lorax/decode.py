"""Text from a causal model: greedy, sampled or by beam search, with a cache of keys and values.

Everything after the prompt is one compiled loop. Options have the meaning of Hugging Face's
`generate`, and greedy and beam search choose the same tokens. Axes: B prompts, or M B rows of
prompts of M members (`Several`), K beams, S columns (prompt, then generated tokens), V vocabulary.

The beams of a prompt share one row of the cache: each step adds a column for each beam, and
`Cache.real` says which columns a beam has. A beam that goes on from another takes over what that
one has, so no key and no value is ever copied.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lorax import divided, gather, hosts, intercept, leaves, tree
from lorax.files import check_unicode
from lorax.methods import prefix
from lorax.models import Base, room
from lorax.models import layers as model_layers

NEVER = -1e9  # a score that no text has
TINY = 1e-30
SEEDS = 2**32  # JAX's keys keep 32 bits of a seed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Several:
    """Parameters of M members that share a base, to decode with all of them in one batch.

    params: a tree of one member's structure, with the operator leaves of its method. A leaf that
    differs between members has an axis M in front. own: (static) whether it does, for each leaf.
    members: (static) M.
    """

    params: dict
    own: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    members: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, members: Sequence[dict]) -> "Several":
        """Of bound parameters of one structure and with leaves of equal shapes. A leaf that is one
        and the same array in all members is shared."""
        flat = [jax.tree.leaves(params) for params in members]
        own = tuple(any(x is not of_one[0] for x in of_one) for of_one in zip(*flat, strict=True))
        stacked = [
            jnp.stack(of_one) if apart else of_one[0]
            for of_one, apart in zip(zip(*flat, strict=True), own, strict=True)
        ]
        return cls(jax.tree.unflatten(jax.tree.structure(members[0]), stacked), own, len(members))

    def specs(self) -> "Several":
        """How the arrays are divided over a mesh whose axis "member" divides the members."""
        flat = [P("member") if own else P() for own in self.own]
        params = jax.tree.unflatten(jax.tree.structure(self.params), flat)
        return dataclasses.replace(self, params=params)

    def one(self) -> dict:
        """The parameters of the first member."""
        flat, structure = jax.tree.flatten(self.params)
        first = [x[0] if own else x for x, own in zip(flat, self.own, strict=True)]
        return jax.tree.unflatten(structure, first)

    def each(self, function: Callable, rows, cache):
        """function(params, rows, cache) of every member, with its part of rows (M B, ...), a tree,
        and of the cache: the results with their rows in one axis. A product with a shared weight
        sees the rows of all members."""
        m, (flat, structure) = self.members, jax.tree.flatten(self.params)
        axes = [0 if own else None for own in self.own]
        split = lambda x: x.reshape(m, -1, *x.shape[1:])
        whole = lambda x: x.reshape(-1, *x.shape[2:])
        length, rest = cache.length, dataclasses.replace(cache, length=None)

        def of_member(flat, rows, rest):
            own = dataclasses.replace(rest, length=length)
            y, own = function(jax.tree.unflatten(structure, flat), rows, own)
            return y, dataclasses.replace(own, length=None)

        split_rows, split_cache = jax.tree.map(split, (rows, rest))
        y, new = jax.vmap(of_member, in_axes=(axes, 0, 0))(flat, split_rows, split_cache)
        y, new = jax.tree.map(whole, (y, new))
        return y, dataclasses.replace(new, length=length + rows[0].shape[1])


class DecodingOptions(NamedTuple):
    """How the next tokens are chosen, with names and meaning of Hugging Face's `generate`.

    max_new_tokens: the most tokens to generate. ends: ids that end a text; pad: the id written
    after an end. num_beams: above 1, beam search without sampling, for the text with the best (sum
    of log-probabilities) / length ** length_penalty. early_stopping: stop as soon as there are as
    many finished texts as beams. no_repeat_ngram_size: no sequence of n tokens, including the
    prompt's, occurs twice (0: off).

    temperature: 0 takes the likeliest token (`do_sample=False`); above 0, tokens are sampled from
    logits / temperature. top_k: only from the k likeliest (0: all). top_p: only from the fewest
    likeliest whose probabilities add up to p (nucleus sampling, arXiv:1904.09751).
    """

    max_new_tokens: int = 64
    ends: tuple[int, ...] = ()
    pad: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    no_repeat_ngram_size: int = 0


def check(options: DecodingOptions, batch_size: int = 1, seed: int = 0) -> DecodingOptions:
    """The same options. Raises ValueError that names the option (or `batch_size` or `seed` of
    `complete`), what was given and what would be right."""
    values = {**options._asdict(), "batch_size": batch_size, "seed": seed}
    sampled = options.temperature != 0
    rules = (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        # nothing but 0 may vanish or overflow in float32
        ("temperature", not sampled or TINY <= options.temperature <= 1 / TINY,
         f"0 (the likeliest token) or from {TINY} to {1 / TINY}"),
        ("top_k", options.top_k >= 0, "at least 0 (0: all)"),
        ("top_p", 0 < options.top_p <= 1, "in (0, 1]"),
        ("num_beams", options.num_beams >= 1, "at least 1"),
        ("num_beams", options.num_beams == 1 or not sampled,
         "1 where tokens are sampled (temperature above 0)"),
        ("length_penalty", -10 <= options.length_penalty <= 10, "from -10 to 10"),
        ("no_repeat_ngram_size", options.no_repeat_ngram_size >= 0, "at least 0 (0: off)"),
        ("batch_size", batch_size >= 1, "at least 1"),
        ("seed", 0 <= seed < SEEDS, f"from 0 to {SEEDS - 1}"),
    )  # fmt: skip
    for field, is_right, right in rules:
        if not is_right:
            raise ValueError(f"{field}: {values[field]} given, must be {right}")
    return options


def encode(
    base: Base, prompts: Sequence[str], max_new_tokens: int, ahead: int = 0
) -> list[list[int]]:
    """The ids of each prompt, after the tokens that start a text.

    ahead: positions that virtual tokens take. Raises ValueError if the base has no tokenizer, a
    prompt is empty or not text, or a prompt and the new tokens need more positions than the model
    has.
    """
    vocabulary = base.vocabulary
    if vocabulary is None:
        raise ValueError(f"base: {base.name} has no tokenizer.json, which prompts need")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i}: {prompt!r} given, must be text")
        check_unicode(prompt, f"prompt {i}")
    ids = [[*vocabulary.start, *vocabulary.encode(prompt)] for prompt in prompts]
    empty = [i for i, tokens in enumerate(ids) if not tokens]
    if empty:
        raise ValueError(f"prompt {empty[0]}: is empty, and {base.name} has no start token")
    longest, most = max(map(len, ids), default=0), base.positions
    if most and longest + max_new_tokens + ahead > most:
        virtual = f" with {ahead} virtual tokens" if ahead else ""
        raise ValueError(
            f"prompts: one of {longest} tokens and {max_new_tokens} new ones need more than the "
            f"{most} positions of {base.name}{virtual}; at most {max(most - longest - ahead, 0)} "
            f"new ones fit"
        )
    return ids


def complete(
    base: Base,
    prompts: Sequence[str],
    params=None,
    options: DecodingOptions | None = None,
    *,
    rows: Sequence[int] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    over: Mesh | None = None,
    progress=lambda done, total: None,
) -> list:
    """The model's continuation of each prompt, without special tokens. Prompt + text is the whole
    text, so a continuation that starts a new word begins with a space.

    params: for `lorax.apply` (default: the base's); of `Several` members, a list of texts for each.
    options: if `ends` is empty, `ends` and `pad` are those of the base's vocabulary. rows: the
    adapter of each prompt, if params has `leaves.Mixed` leaves. batch_size: prompts in a batch.
    seed: of sampling; a prompt's samples depend on its number, not on the batch. over: as for
    `generate`. progress: called with (texts done, texts in all).
    Raises ValueError as `encode` does.
    """
    params = base.params if params is None else params
    one, members = (params.one(), params.members) if isinstance(params, Several) else (params, 1)
    mesh = gather.mesh_of(one)
    options, vocabulary = check(options or DecodingOptions(), batch_size, seed), base.vocabulary
    ahead = prefix.ahead(one).tokens
    ids = encode(base, prompts, options.max_new_tokens, ahead)
    options, width = _ending(options, vocabulary), _width(base, ids, options, ahead)
    batch_size = min(batch_size, max(len(ids), 1))
    apart = mesh is None and _fits_apart(base.module, params)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))
    texts = [[] for _ in range(members)]
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        part = part + [part[-1]] * (batch_size - len(part))  # one shape, one program
        tokens = np.full((batch_size, width), options.pad, np.int32)
        segments = np.zeros((batch_size, width), np.int32)
        for i, row in enumerate(part):
            tokens[i, width - len(row) :] = row
            segments[i, width - len(row) :] = 1
        chosen = params
        if rows is not None:
            which = list(rows[start : start + batch_size])
            which = np.asarray(which + which[-1:] * (batch_size - len(which)), np.int32)
            chosen = _rows(params, which)
        key = keys(np.arange(start, start + batch_size))
        rows_of = gather.side_by_side((tokens, segments), mesh, axis=0)
        with divided.on(mesh):
            written = generate(base.module, chosen, *rows_of, key, options, mesh, apart, over)
        written = hosts.whole(written).reshape(members, batch_size, -1)
        left = len(ids) - start
        for of_member, its in zip(texts, written, strict=True):
            of_member += [
                _continuation(vocabulary, prompt, _until(row, options.ends))
                for prompt, row in zip(part[:left], its, strict=False)
            ]
        progress(members * len(texts[0]), members * len(ids))
    return texts if isinstance(params, Several) else texts[0]


def _ending(options: DecodingOptions, vocabulary) -> DecodingOptions:
    """The options with the vocabulary's `ends` and `pad`, if they have no ends."""
    if options.ends:
        return options
    # Small LLaMA models mark the end of a story with the start token of the next.
    ends = tuple(dict.fromkeys((*vocabulary.ends, *vocabulary.start)))
    return options._replace(ends=ends, pad=vocabulary.pad)


def _width(base: Base, ids: list[list[int]], options: DecodingOptions, ahead: int) -> int:
    """Columns for the prompts: a multiple of 16 where the model has the positions."""
    longest, most = max(map(len, ids), default=0), base.positions
    room = most and most - ahead
    return min(-(-longest // 16) * 16, room - options.max_new_tokens) if room else longest


def _fits_apart(module, params) -> bool:
    """Whether there is memory to spare for a copy of the parameters of the layers, each apart."""
    params = params.params if isinstance(params, Several) else params
    return 2 * tree.nbytes(params.get(getattr(module, "stack", ""), {})) < room.free().bytes


def batch_bytes(
    base: Base, prompts: Sequence[str], options: DecodingOptions, batch_size: int
) -> int:
    """Bytes of a batch of prompts of one member while it is decoded: the cache, and what is
    computed of the logits. Parameters are not counted."""
    ids = encode(base, prompts, options.max_new_tokens)
    b, k = min(batch_size, max(len(ids), 1)), options.num_beams
    columns = _width(base, ids, options, 0) + k * options.max_new_tokens
    cache = jax.eval_shape(lambda: base.module.empty_cache(b, columns))
    last = jax.ShapeDtypeStruct((b * k, 1), jnp.int32)
    step = jax.eval_shape(lambda: base.module.empty_cache(b * k, 1))
    of_step = functools.partial(read, base.module)
    logits, _ = jax.eval_shape(of_step, base.params, last, None, step)
    # A loop's state exists twice while it is written; scores are a handful of arrays like logits.
    return 2 * tree.nbytes(cache) + 6 * tree.nbytes(logits)


def _rows(params, rows):
    """`params` with rows (B,) in every `leaves.Mixed` leaf."""

    def replace(leaf):
        if not isinstance(leaf, leaves.Mixed):
            return leaf
        return dataclasses.replace(
            leaf, rows=jnp.broadcast_to(rows, (*leaf.rows.shape[:-1], len(rows)))
        )

    return jax.tree.map(replace, params, is_leaf=lambda leaf: isinstance(leaf, leaves.Mixed))


def _continuation(vocabulary, prompt: list[int], written: list[int]) -> str:
    """The text of ids as it reads after a prompt's ids: some decoders, such as SentencePiece's,
    remove the space before the first word of a text."""
    before, whole = vocabulary.decode(prompt), vocabulary.decode(prompt + written)
    return whole[len(before) :] if whole.startswith(before) else vocabulary.decode(written)


def _until(row, ends) -> list[int]:
    positions = np.flatnonzero(np.isin(row, ends))
    return list(row[: positions[0]] if len(positions) else row)


@functools.partial(jax.jit, static_argnames=("module", "options", "mesh", "apart", "over"))
def generate(
    module,
    params,
    tokens,
    segments,
    key,
    options: DecodingOptions,
    mesh: Mesh | None = None,
    apart: bool = True,
    over: Mesh | None = None,
):
    """(B, max_new_tokens) int32: the continuation of each prompt, `options.pad` after an end; of
    `Several` members (M B, max_new_tokens), all prompts of the first member first.

    tokens, segments: (B, T) int32, prompts padded on the left, segments 0 on padding and 1 on text.
    key: of sampling, one for each prompt (B,), or one (). mesh: that the base is divided over
    (`gather.mesh_of`); rows and heads of the cache are too. apart: whether to copy the parameters
    of each layer out of their stack once, and not for every token. over: a mesh whose axis
    "member" divides `Several` members, each device with its own loop.
    """
    if not key.ndim:
        key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(tokens)))
    of_prompts = functools.partial(_generate, module, options, mesh, apart)
    if over is None:
        return of_prompts(params, tokens, segments, key)

    def of_device(params, *rows):
        return of_prompts(dataclasses.replace(params, members=params.members // over.size), *rows)

    specs = params.specs(), P(), P(), P()
    of_devices = jax.shard_map(
        of_device, mesh=over, in_specs=specs, out_specs=P("member"), check_vma=False
    )
    return of_devices(params, tokens, segments, key)


def _generate(module, options: DecodingOptions, mesh, apart: bool, params, tokens, segments, keys):
    """`generate` of what one device has."""
    ahead = prefix.ahead(params.one() if isinstance(params, Several) else params)
    if isinstance(params, Several):
        of_prompt = jnp.tile(jnp.arange(len(tokens)), params.members)
        tokens, segments, keys = (x[of_prompt] for x in (tokens, segments, keys))
    b, t = tokens.shape
    begun = ahead.before(tokens, segments)
    cache = _divided(module.empty_cache(b, begun[0].shape[1] + options.max_new_tokens), mesh)
    logits, cache = read(module, params, *begun, cache)
    params = _apart(module, params, len(cache.k)) if apart else params
    if options.num_beams > 1:
        return _beams(module, params, tokens, segments, logits, cache, options)

    def write(state):
        n, text, real, logits, cache, done = state
        scores = _without_repeats(logits, text, real, t + n, options)
        chosen = jnp.where(done, options.pad, _choose(scores, keys, n, options))
        text = jax.lax.dynamic_update_slice(text, chosen[:, None], (0, t + n))
        real = jax.lax.dynamic_update_slice(real, ~done[:, None], (0, t + n))
        done = done | jnp.isin(chosen, jnp.array(options.ends, jnp.int32))
        logits, cache = read(module, params, chosen[:, None], None, cache)
        return n + 1, text, real, logits, cache, done

    unfinished = lambda state: (state[0] < options.max_new_tokens) & ~jnp.all(state[5])
    text, real = _room(tokens, options.pad, options), _room(segments > 0, False, options)
    state = (jnp.int32(0), text, real, logits, cache, jnp.zeros(b, bool))
    return jax.lax.while_loop(unfinished, write, state)[1][:, t:]


def _divided(cache, mesh):
    """A cache with its rows and heads divided over a mesh; as it is without a mesh."""
    if mesh is None:
        return cache
    place = gather.fitting(mesh, cache.k[0].shape, gather.ROWS, "tensor", None, None)
    k, v = (
        tuple(jax.lax.with_sharding_constraint(x, place) for x in xs) for xs in (cache.k, cache.v)
    )
    return dataclasses.replace(cache, k=k, v=v)


def _apart(module, params, layers: int):
    """The parameters with those of the layers `models.layers.apart`, if the module has a stack."""
    name = getattr(module, "stack", None)
    if name is None:
        return params
    if not isinstance(params, Several):
        return params | {name: model_layers.apart(params[name], layers)}
    flat, structure = jax.tree.flatten(params.params)
    own = jax.tree.unflatten(structure, params.own)
    of_layers = model_layers.apart(params.params[name], layers, jax.tree.map(int, own[name]))
    own |= {name: {i: own[name] for i in of_layers}}
    own = tuple(jax.tree.leaves(own))
    return dataclasses.replace(params, params=params.params | {name: of_layers}, own=own)


def read(module, params, tokens, segments, cache, every: bool = False):
    """Logits (N, V) after the last token of (N, T), or (N, T, V) after every one, and the cache
    with the tokens in it."""
    if isinstance(params, Several):
        of_member = lambda params, rows, cache: read(module, params, *rows, cache, every)
        return params.each(of_member, (tokens, segments), cache)
    with intercept.interceptor():
        call = functools.partial(module.apply, {"params": params})
        hidden, cache = call(tokens, segments, cache, method="hidden")
        return call(hidden if every else hidden[:, -1], method="logits"), cache


def _room(x, fill, options):
    """(B, T) -> (B, S): adds columns for the generated tokens."""
    return jnp.pad(x, ((0, 0), (0, options.max_new_tokens)), constant_values=fill)


def warp(logits, options: DecodingOptions):
    """Logits (N, V) of the sampling distribution: divided by the temperature, then -inf outside the
    k likeliest, then -inf outside the nucleus, as in Hugging Face's warpers."""
    logits = logits / options.temperature
    if options.top_k:
        least = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if options.top_p < 1:
        rising = jnp.sort(logits, axis=-1)
        below = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= 1 - options.top_p
        below = below.at[:, -1].set(False)  # the likeliest always stays
        least = jnp.min(jnp.where(below, jnp.inf, rising), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _choose(logits, keys, n, options):
    """Token n of each row, (N,) int32. keys: (N,)."""
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = lambda key, logits: jax.random.categorical(jax.random.fold_in(key, n), logits)
    return jax.vmap(draw)(keys, warp(logits, options)).astype(jnp.int32)


def _without_repeats(scores, text, real, length, options):
    """scores (N, V) with -inf for tokens that would repeat a sequence of n tokens in text (N, S).

    real: (N, S), False on padding. length: () columns of text so far.
    """
    n = options.no_repeat_ngram_size
    if not n or n > text.shape[1]:  # a text is never that long
        return scores
    last = jax.lax.dynamic_slice_in_dim(text, length - (n - 1), n - 1, axis=1)
    starts = text.shape[1] - n + 1
    same = jnp.ones((text.shape[0], starts), bool)
    for i in range(n - 1):
        column = slice(i, i + starts)
        same = same & (text[:, column] == last[:, i : i + 1]) & real[:, column]
    follows = text[:, n - 1 :]  # (N, starts)
    same = same & real[:, n - 1 :] & (jnp.arange(starts)[None] + n - 1 < length)
    banned = jnp.where(same, follows, scores.shape[-1])  # out of range: dropped
    rows = jnp.arange(text.shape[0])[:, None]
    return scores.at[rows, banned].set(-jnp.inf, mode="drop")


class _Beams(NamedTuple):
    """n: tokens written. text (B, K, S), score (B, K), logits (B, K, V): of the running beams. best
    (B, K, S), best_score, finished (B, K): of the texts that ended, the best first. hopeful: (B,)
    whether a running beam may still beat these. stuck: () whether no beam can go on."""

    n: jax.Array
    text: jax.Array
    score: jax.Array
    logits: jax.Array
    cache: object
    best: jax.Array
    best_score: jax.Array
    finished: jax.Array
    hopeful: jax.Array
    stuck: jax.Array


def _take(x, index):
    """x (B, N, ...) at index (B, M) of its second axis: (B, M, ...)."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _banked(s: _Beams, score, text, ended, options):
    """(texts (B, K, S), scores (B, K), which of them are finished) of the K best that have ended.

    score, ended: (B, many), text: (B, many, S), of this step's continuations.
    """
    k = s.best_score.shape[1]
    final = score / (s.n + 1).astype(jnp.float32) ** options.length_penalty
    new = ended & (jnp.arange(score.shape[1]) < k)[None]
    if options.early_stopping:
        final = final + jnp.where(jnp.all(s.finished, axis=1, keepdims=True), NEVER, 0.0)
    final = final + jnp.where(s.hopeful, 0.0, NEVER)[:, None] + jnp.where(new, 0.0, NEVER)
    best_score, keep = jax.lax.top_k(jnp.concatenate([s.best_score, final], axis=1), k)
    best = _take(jnp.concatenate([s.best, text], axis=1), keep)
    return best, best_score, _take(jnp.concatenate([s.finished, new], axis=1), keep)


def _beams(module, params, tokens, segments, logits, cache, options):
    """Beam search as in Hugging Face (and Flax): every step considers more continuations than there
    are beams, so that K beams keep running when some end."""
    (b, t), k, v = tokens.shape, options.num_beams, logits.shape[-1]
    ends = jnp.array(options.ends, jnp.int32)
    many = max(2, 1 + len(options.ends)) * k
    copies = lambda x, axis=0: jnp.repeat(x, k, axis=axis)
    cache = cache.shared(k, options.max_new_tokens)
    text = copies(_room(tokens, options.pad, options)[:, None], 1)  # (B, K, S)
    # (B K, S); columns not yet written are masked by the length
    real = copies(_room(segments > 0, True, options))

    def write(s: _Beams) -> _Beams:
        # ------------------------------------------------------------- the best continuations
        step = jax.nn.log_softmax(s.logits, axis=-1).reshape(b * k, v)
        step = _without_repeats(step, s.text.reshape(b * k, -1), real, t + s.n, options)
        total = (step.reshape(b, k, v) + s.score[..., None]).reshape(b, k * v)
        score, index = jax.lax.top_k(total, many)
        beam, token = index // v, (index % v).astype(jnp.int32)  # (B, many)
        text = jax.lax.dynamic_update_slice(_take(s.text, beam), token[..., None], (0, 0, t + s.n))
        ended = jnp.isin(token, ends) | (s.n + 1 == options.max_new_tokens)

        # ------------------------------------------------------------------ those that go on
        running, go = jax.lax.top_k(score + jnp.where(ended, NEVER, 0.0), k)
        chosen = _take(beam, go)

        # ------------------------------------------------------------------ those that ended
        best, best_score, finished = _banked(s, score, text, ended, options)
        length = (s.n + 1).astype(jnp.float32)

        # ---------------------------------------------------------------------- read and go on
        cache = dataclasses.replace(s.cache, real=_take(s.cache.real, chosen))
        logits, cache = read(module, params, _take(token, go), None, cache, every=True)
        worst = jnp.where(finished, jnp.min(best_score, axis=1, keepdims=True), NEVER)
        possible = running[:, :1] / length**options.length_penalty
        hopeful = s.hopeful & jnp.any(possible > worst, axis=1)
        return _Beams(
            s.n + 1, _take(text, go), running, logits, cache, best, best_score,
            finished, hopeful, jnp.all(ended),
        )  # fmt: skip

    def unfinished(s: _Beams):
        full = jnp.all(s.finished) & options.early_stopping
        return (s.n < options.max_new_tokens) & jnp.any(s.hopeful) & ~full & ~s.stuck

    first = jnp.full((b, k), NEVER).at[:, 0].set(0.0)  # copies of one prompt: only one counts
    start = _Beams(
        jnp.int32(0), text, first, copies(logits[:, None], 1), cache, text,
        jnp.full((b, k), NEVER), jnp.zeros((b, k), bool), jnp.ones(b, bool), jnp.bool_(False),
    )  # fmt: skip
    return jax.lax.while_loop(unfinished, write, start).best[:, 0, t:]
