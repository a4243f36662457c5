"""Parameter trees by slash path: flatten, match against rules, split and combine.

A tree is a nested dict; its leaves are arrays or operator leaves (see `lorax.ops.Leaf`). A path
joins the keys with slashes: "h/attn/q/kernel".
"""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
import optax

Hole = optax.MaskedNode  # marks where `split` took a leaf out


def is_hole(x) -> bool:
    """True for the marker that `split` leaves where a leaf went to the other tree."""
    return isinstance(x, Hole)


def flatten(tree: Mapping, prefix: str = "") -> dict:
    """{path: leaf} of a nested mapping, in its order. Anything except a mapping is a leaf."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: dict) -> dict:
    """Inverse of `flatten`.

    Raises ValueError if one path runs through another's leaf ("a" and "a/b").
    """
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through a leaf at {key!r}")
        if isinstance(node.get(name), dict):
            raise ValueError(f"path {path!r} is a leaf and a branch")
        node[name] = leaf
    return tree


def sibling(path: str, name: str) -> str:
    """The path of `name` in the module of another path: ("h/q/kernel", "bias") -> "h/q/bias"."""
    return "/".join((*path.split("/")[:-1], name))


def match(rules: Iterable[tuple[str, object]], paths: Iterable[str]) -> dict[str, object]:
    """The value of the first rule whose regex fully matches each path.

    Raises ValueError for a path that no rule covers and for a rule that is no path's first match,
    so that a forgotten parameter or a misspelt rule is found here and not in the results.
    (As in big_vision `optax.py:_split_frozen` and qwix `get_unused_rules`.)
    """
    rules, paths = list(rules), list(paths)
    compiled = [re.compile(pattern) for pattern, _ in rules]
    values, used = {}, set()
    for path in paths:
        hit = next((i for i, regex in enumerate(compiled) if regex.fullmatch(path)), None)
        if hit is None:
            raise ValueError(f"no rule covers {path!r}; the rules are {[p for p, _ in rules]}")
        used.add(hit)
        values[path] = rules[hit][1]
    idle = [pattern for i, (pattern, _) in enumerate(rules) if i not in used]
    if idle:
        raise ValueError(f"rules {idle} match nothing; there is {_some(paths)}")
    return values


def split(tree: dict, select: Callable[[str], bool]) -> tuple[dict, dict]:
    """(selected, rest): two trees of the same shape with `optax.MaskedNode` holes.

    JAX sees no leaf in a hole, so a gradient or an optimiser state for one of the two never sees
    the other. `combine` is the inverse.
    """
    flat = flatten(tree)
    chosen = {path: bool(select(path)) for path in flat}
    selected = {path: leaf if chosen[path] else Hole() for path, leaf in flat.items()}
    rest = {path: Hole() if chosen[path] else leaf for path, leaf in flat.items()}
    return unflatten(selected), unflatten(rest)


def combine(*trees: dict) -> dict:
    """One tree from trees that `split` made: at each path the only leaf that is not a hole.

    Raises ValueError if two trees have a leaf at a path, or none has.
    """
    flats = [flatten(t) for t in trees]
    merged = {}
    for path in dict.fromkeys(path for flat in flats for path in flat):
        leaves = [flat[path] for flat in flats if path in flat and not is_hole(flat[path])]
        if len(leaves) != 1:
            raise ValueError(f"{path!r} has {len(leaves)} leaves in {len(trees)} trees, needs one")
        merged[path] = leaves[0]
    return unflatten(merged)


def shapes(tree):
    """The tree with a `jax.ShapeDtypeStruct` for every array, to compile or restore with."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def count(tree) -> int:
    """Number of scalars in all leaves that have a shape: arrays, `jax.ShapeDtypeStruct`s and
    quantised weights (counted as the weights that they represent)."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return sum(int(np.prod(x.shape)) for x in leaves)


def nbytes(tree) -> int:
    """Bytes of all array leaves (also of `jax.ShapeDtypeStruct`s)."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _some(paths: list[str], n: int = 12) -> str:
    rest = f" and {len(paths) - n} more" if len(paths) > n else ""
    return ", ".join(paths[:n]) + rest
