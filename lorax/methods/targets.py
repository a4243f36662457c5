"""Which parameters a method adapts: canonical words, their paths, and layers.

This is independent of methods. `resolve` finds the kernels that words mean, `adapted_matrices` also
the layers of each; `lorax.methods.arrays` makes a method's arrays for them.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from lorax import ops, tree
from lorax.errors import nearest

#: Canonical words -> parameter paths (regex). Every model of `lorax.models` uses these names.
#: "up", "gate" and "down" are those of feed-forward layers without experts.
WORDS = {
    **{w: rf"(.*/)?{w}/kernel" for w in ("q", "k", "v", "o")},
    **{w: rf"(.*/)?(?<!experts/){w}/kernel" for w in ("up", "gate", "down")},
    **{f"experts.{w}": rf"(.*/)?experts/{w}/kernel" for w in ("up", "gate", "down")},
    "router": r"(.*/)?router/kernel",
    "embed": r"(.*/)?(wte|embed)/embedding",
    "head": r"(.*/)?lm_head/kernel",
}
#: Further words for parameters that are trained in full (`full`); "norms" are the scale and bias of
#: every norm.
FULL_WORDS = {"all": r".*", "classifier": r"head/.*", "biases": r"(.*/)?bias", "norms": None}
#: Groups of kernels by their kind, without heads.
KINDS = {"all-linear": ("linear", "conv", "experts"), "conv": ("conv",)}
GROUPS = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("up", "gate", "down"),
    "experts": ("experts.up", "experts.gate", "experts.down"),
}


class Default(tuple):
    """A method's default words, marked so that errors don't say that the user gave them."""


def words_of(words: str | Iterable[str]) -> tuple[str, ...]:
    """One or several words as a tuple; a `Default` stays a `Default`."""
    if isinstance(words, tuple):
        return words
    return (words,) if isinstance(words, str) else tuple(words)


def resolve(
    targets: tuple[str, ...], sites: Mapping[str, ops.Site], field: str = "method.targets"
) -> dict[str, ops.Site]:
    """{path: Site} of the `sites` that the words of `targets` name.

    A word is canonical (`WORDS` or `Site.word`), a group ("attention", "mlp", "experts",
    "all-linear": every linear and convolution kernel except the heads, with experts and their
    routers; "conv": every convolution kernel, and modules of that name), the name of a module
    ("query" for "blocks/query/kernel"), or "re:" and a regex that matches a whole path.
    Raises ValueError for a word that matches nothing, with a list of what there is. field: the key
    that holds the words, for messages.
    """
    if isinstance(targets, str):
        targets = (targets,)
    if not targets:
        raise ValueError(f"{field}: empty; there is {_available(sites)}")
    chosen = set()
    for word in targets:
        hits = matching(word, sites, field)
        if not hits and isinstance(targets, Default):
            raise ValueError(
                f"{field}: none given; of the method's defaults, {', '.join(targets)}, the base "
                f"has no {word}; choose from {_available(sites)}"
            )
        if not hits:
            tied = " (a tied head is adapted through 'embed')" if word == "head" else ""
            raise ValueError(
                f"{field}: {word!r} matches nothing{tied}; there is {_available(sites)}"
                f"{_hint(word, sites, (*WORDS, *GROUPS, *KINDS))}"
            )
        chosen.update(hits)
    return {path: site for path, site in sites.items() if path in chosen}


def matching(word: str, sites: Mapping[str, ops.Site], field: str = "method.targets") -> list[str]:
    """Paths among `sites` that a word of `resolve` means; an empty list if there are none."""
    meant = GROUPS.get(word, (word,))
    patterns = _patterns(word) or [rf"(.*/)?{re.escape(word)}/(kernel|embedding)"]
    hits = _matches(patterns, sites, f"{field}: {word!r}")
    is_head = lambda path: re.fullmatch(rf"head/.*|{WORDS['head']}", path)
    of_kind = lambda path, site: site.kind in KINDS.get(word, ()) and not is_head(path)
    return [
        path
        for path, site in sites.items()
        if path in hits or site.word in meant or of_kind(path, site)
    ]


def _matches(patterns: list[str], paths: Iterable[str], place: str = "") -> list[str]:
    """The paths that one of the regexes fully matches. Raises ValueError, which begins with
    `place`, for an invalid regex."""
    try:
        compiled = [re.compile(p) for p in patterns]
    except re.error as error:
        raise ValueError(f"{place} is not a regex ({error})") from None
    return [path for path in paths if any(p.fullmatch(path) for p in compiled)]


def _hint(word: str, paths: Iterable[str], known: Iterable[str]) -> str:
    """The end of an error for a word that matches nothing: the word or regex probably meant."""
    if not word.startswith("re:"):
        return "" if word in known else nearest(word, known)
    regex = word.removeprefix("re:")
    regex = f"({regex})" if "|" in regex else regex
    for longer in (f".*/{regex}", f"{regex}.*", f".*{regex}.*"):
        if hits := _matches([longer], paths):
            return f"; a regex must match a whole path: 're:{longer}' matches {hits[0]}"
    return "; a regex must match a whole path"


def resolve_full(words: tuple[str, ...], params: dict, field: str = "method.full") -> list[str]:
    """Paths of the parameters that the words name: those of `resolve`, of `FULL_WORDS`, or "re:"
    and a regex. Raises ValueError, which names `field`, for a word that matches nothing."""
    paths, chosen = list(tree.flatten(params)), set()
    known = FULL_WORDS | WORDS
    parent = lambda path: path.rpartition("/")[0]
    norms = {parent(path) for path in paths if re.fullmatch(r"(.*/)?scale", path)}
    for word in words:
        if word == "norms":
            hits = [path for path in paths if parent(path) in norms]
        else:
            hits = _matches(_patterns(word, known), paths, f"{field}: {word!r}")
        if not hits and isinstance(words, Default):
            raise ValueError(
                f"method.name: it trains {', '.join(words)}, and the base has no {word}; there is "
                f"{', '.join(paths)}"
            )
        if not hits:
            raise ValueError(
                f"{field}: {word!r} matches nothing; there is {', '.join(paths)}"
                f"{_hint(word, paths, known)}"
            )
        chosen.update(hits)
    return [path for path in paths if path in chosen]


def _patterns(word: str, known=WORDS) -> list[str]:
    if word.startswith("re:"):
        return [word.removeprefix("re:")]
    return [known[w] for w in GROUPS.get(word, (word,)) if w in known]


def _available(sites) -> str:
    here = lambda word, path: re.fullmatch(WORDS[word], path) or sites[path].word == word
    words = [word for word in WORDS if any(here(word, path) for path in sites)]
    return f"{', '.join(words)}{' and ' * bool(words)}paths {', '.join(sites)}"


def active_layers(layers: tuple[int, ...] | None, targets: Mapping, shapes: Mapping) -> dict:
    """{path: boolean numpy array over the site's layer axes}: which layers a member adapts.

    layers: indices, negative ones from the end, or None for all. For a stacked weight they index
    its first axis; otherwise a weight's layer is the first number in its path ("h_3/attn/q").
    Raises ValueError for an index that no target has.
    """
    stacked = {path: shapes[path][: site.stack] for path, site in targets.items()}
    depth = max(
        [s[0] for s in stacked.values() if s]
        + [layer_of(p) + 1 for p, s in stacked.items() if not s],
        default=0,
    )
    if layers is not None:
        layers = layers_from_0(layers, depth, "the targets have")
    active = {}
    for path, axes in stacked.items():
        mask = np.ones(axes, bool)
        if layers is not None and axes:
            mask[[i for i in range(axes[0]) if i not in layers]] = False
        elif layers is not None:
            mask = np.asarray(layer_of(path) in layers)
        active[path] = mask
    if not any(mask.any() for mask in active.values()):
        raise ValueError(f"method.layers: {sorted(layers)} leave nothing of {', '.join(targets)}")
    return active


def layers_from_0(layers: tuple[int, ...], depth: int, there: str) -> set[int]:
    """The indices with negative ones counted from the end. Raises ValueError, which says how many
    layers `there` are, for one that is not below `depth` and for none at all."""
    bad = [i for i in layers if not -depth <= i < depth]
    if bad or not layers:
        raise ValueError(f"method.layers: {bad or '()'} given, {there} {depth} layers")
    return {i % depth for i in layers}


def layer_of(path: str) -> int:
    """The layer that a path names by its first number ("h_3/attn/q": 3), or -1."""
    number = re.search(r"(?:^|[/_])(\d+)(?=/|$)", path)
    return int(number.group(1)) if number else -1


def stack_depths(params: dict, sites: Mapping[str, ops.Site]) -> dict[str, int]:
    """{path: number of layers} of stacked parameters: all under the same first name ("h/") as a
    stacked kernel."""
    flat = tree.flatten(params)
    stacks = {
        path.partition("/")[0]: len(flat[path])
        for path, site in sites.items()
        if site.stack and path in flat
    }
    return {p: stacks[p.partition("/")[0]] for p in flat if p.partition("/")[0] in stacks}


# ------------------------------------------------------------------------------------ what to adapt


def adapted_matrices(params: dict, sites, targets, layers, rank: int | None = None) -> dict:
    """{path: (Site, active)} of the matrices that a method with these hyperparameters adapts.

    sites: {path: Site}, None for `ops.sites_from_shapes`. active: boolean numpy array over the
    site's layer axes. Raises ValueError as `resolve` and `active_layers` do, and for a rank above
    min(in, out) of a target.
    """
    sites = sites or ops.sites_from_shapes(ops.inner(params))
    chosen = resolve(targets, sites)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    for path, site in chosen.items():
        _, n_in, n_out = site.matrix_shape(shapes[path])
        if rank is not None and rank > min(n_in, n_out):
            raise ValueError(
                f"method.rank: {rank} given, but {path} is {n_in} x {n_out}: "
                f"at most {min(n_in, n_out)}"
            )
    active = active_layers(layers, chosen, shapes)
    return {path: (site, active[path]) for path, site in chosen.items()}


def only_linear(adapted: dict) -> dict:
    """`adapted`, as from `adapted_matrices`, for a method that adapts neither embeddings nor
    convolutions. Raises ValueError that names one."""
    for path, (site, _) in adapted.items():
        if site.kind in ("embed", "conv"):
            raise ValueError(f"method.targets: {path} is not a linear layer's kernel")
    return adapted
