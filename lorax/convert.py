"""Look at adapters, and carry them from one format to another.

    python -m lorax.convert show ADAPTER                        spectrum and rank of every update
    python -m lorax.convert peft ADAPTER OUT --base BASE        an adapter as PEFT stores it
    python -m lorax.convert merge BASE ADAPTER OUT              a base model with the update in it

ADAPTER is a directory in PEFT's format (`runs/NAME/adapters/0` is one) or a checkpoint of loralib,
the LoRA authors' own code, as .npz or .safetensors; the latter does not say what it was scaled by:
give --alpha. PEFT's AdaLoRA, LoHa and VeRA are taken for the LoRA with the same update; its LoKr,
(IA)3 and LN-tuning can be shown and merged, virtual tokens can be shown; all these need their base
to be read. So does a directory in lorax's own format (method.json), which also needs --method FILE
where the method is not lorax's: the Python file that registers it. BASE is a shipped name, a
Hugging Face directory or a Hub id. OUT must be new.

Of a BASE in 4 bits the weights are decoded and stay so; --onto DIR merges into the 16-bit model
that they were made from.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lorax import catalogue
from lorax.errors import fail

NOTHING = "nothing changes"
OWN = "lorax's own format"
SHOWN = 16  # singular values in a row of `show`
CHECKPOINTS = (".npz", ".safetensors")  # of loralib


def main(arguments: list[str]) -> int:
    """The command line. Exit code 0, or 2 for a mistake in the input."""
    given = _parser().parse_args(arguments)
    try:
        if given.method:
            catalogue.read(given.method)
        given.command(given)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, *positional, base):
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        sub.set_defaults(command=function)
        for argument in positional:
            sub.add_argument(argument.lower(), metavar=argument)
        if base is not None:
            sub.add_argument("--base", required=base, help="the model that it was made for")
        sub.add_argument("--alpha", type=float, help="lora_alpha of a loralib checkpoint")
        sub.add_argument(
            "--method", metavar="FILE", help="Python file that registers the adapter's method"
        )
        return sub

    sub = command("show", show, "ADAPTER", base=False)
    sub.add_argument("--csv", help="file for all singular values: path, index, sigma")
    command("peft", to_peft, "ADAPTER", "OUT", base=True)
    sub = command("merge", merge, "BASE", "ADAPTER", "OUT", base=None)
    sub.add_argument(
        "--onto",
        metavar="decoded|DIR",
        help="of a BASE in 4 bits: its decoded weights (default), or the model that it was made of",
    )
    return parser


# ---------------------------------------------------------------------------------------- commands


def show(given) -> None:
    """Every update: its shape, scale, size, singular values and ranks."""
    from rich.table import Table

    from lorax.analysis.measures import spectrum
    from lorax.console import console
    from lorax.files import write_bytes

    if kind(given) != "LORA":
        updates, notes = _of_method(*trained(given))
    elif given.base:
        updates, notes = _of_adapter(read_for(given, model_of(given)))
    else:
        updates, notes = _of_adapter(read(given))
    factored = any(rank for _, _, rank, _, _ in updates)
    what = "dW = s a b" if factored or not updates else "dW"
    table = Table(title=f"{given.adapter}: {what} of every layer", title_justify="left")
    for name in ("layer", "in x out", "r", "s", "||dW||_F", "effective", "stable", "90 % energy"):
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    table.add_column("singular values")
    lines = ["path,index,sigma\n"]
    for path, shape, rank, s, sigma in updates:
        more = f" ... {len(sigma) - SHOWN} more" if len(sigma) > SHOWN else ""
        table.add_row(
            path,
            f"{shape[0]} x {shape[1]}",
            rank,
            s,
            f"{(sigma**2).sum() ** 0.5:.4g}",
            f"{spectrum.effective_rank(sigma):.2f}",
            f"{spectrum.stable_rank(sigma):.2f}",
            f"{spectrum.energy_rank(sigma, 0.9)}",
            " ".join(f"{x:.3g}" for x in sigma[:SHOWN]) + more,
        )
        lines += [f"{path},{i},{x:.9g}\n" for i, x in enumerate(sigma, 1)]
    screen = console(width=None if sys.stdout.isatty() else 1000)
    screen.print(table)
    for note in notes:
        screen.print(note)
    if given.csv:
        write_bytes(given.csv, "".join(lines).encode())
        screen.print(f"all singular values: {given.csv}", soft_wrap=True)


def _of_adapter(adapter) -> tuple[list[tuple], list[str]]:
    """([(layer, (in, out), rank, scale, singular values of s a b)], what more there is to say)."""
    from lorax.analysis.measures import spectrum

    found = [
        (path, (len(a), b.shape[1]), str(a.shape[1]), f"{s:g}", spectrum.factor_svd(a, b, s)[1])
        for path, (a, b, s, _) in adapter.factors.items()
    ]
    lengths = any(factors.m is not None for factors in adapter.factors.values())
    notes = ["DoRA: the columns of w + dW are scaled as well, which is not in dW."] * lengths
    for path, weight in adapter.weights.items():
        notes.append(f"trained in full: {path} {' x '.join(map(str, weight.shape))}")
    why = _idle(adapter)
    return found, notes + [f"{NOTHING}: {why}"] * bool(why)


def _idle(adapter) -> str:
    """Why an adapter changes nothing, "" where it does, or may."""
    if adapter.weights or any(factors.m is not None for factors in adapter.factors.values()):
        return ""
    if all(factors.s == 0 for factors in adapter.factors.values()):
        return "alpha is 0, which scales every update to 0"
    if not any(factors.b.any() for factors in adapter.factors.values()):
        return "every B is 0, as before the first step of a training"
    moves = (a.any() and b.any() and s for a, b, s, _ in adapter.factors.values())
    return "" if any(moves) else "alpha, A or B of every layer is 0"


def _of_method(base, method, state) -> tuple[list[tuple], list[str]]:
    """As `_of_adapter`, of a method of any kind."""
    import numpy as np

    from lorax import adapters, tree

    if method.factors is not None:
        return _of_adapter(adapters.exported(method, state, base))
    size = lambda x: " x ".join(map(str, x.shape)) or "1"
    if method.delta is None:
        leaves = tree.flatten(state.trainable).items()
        return [], [f"no change of weights: {path} {size(x)}" for path, x in leaves]
    found, notes = [], []
    updates = method.delta(*state, base.params, base.sites)
    for path, update in updates.items():
        if path not in base.sites:
            notes.append(f"changed as well: {path} {size(update)}")
            continue
        matrix = np.asarray(base.sites[path].to_matrix(update))
        for layer, index in base.layers_of(path).items():
            if matrix[index].any():
                sigma = np.linalg.svd(matrix[index], compute_uv=False)
                found.append((layer, matrix[index].shape, "", "", sigma))
    changes = found or any(update.any() for path, update in updates.items())
    return found, notes if changes else [*notes, f"{NOTHING}: every update is 0"]


def to_peft(given) -> None:
    """An adapter of any kind that can be read, as a directory that PEFT loads."""
    from lorax.interop import peft

    _check_new(given.out)
    model = model_of(given)
    adapter = read_for(given, model)
    dropout = float(adapter.config.get("lora_dropout") or 0)
    with whole(given.out) as directory:
        peft.save(directory, adapter, model.base.sources, given.base, dropout, model.task_type)
    print(f"{given.out}: {len(adapter.factors)} adapted matrices")
    if why := _idle(adapter):
        print(f"{NOTHING}: {why}")


def merge(given) -> None:
    """A base model with an adapter merged into it, as a directory that transformers loads."""
    from lorax import adapters, methods, models
    from lorax.models.saving import stored_dtypes

    _check_new(given.out)
    given.base = _onto(given)
    if kind(given) == "LORA":
        model = model_of(given)
        adapter = read_for(given, model)
        base = models.load(given.base, **model.run)
    else:
        base, method, state = trained(given)
        adapter = None if method.factors is None else adapters.exported(method, state, base)
    dtypes = stored_dtypes(base)
    if adapter is None:
        _check_head(given, base, methods.joined(state.trainable))
        params = methods.merge(method, state, base.params, base.sites)
        done = f"{method.name} merged"
    else:
        _check_head(given, base, adapter.weights)
        params, _, error = adapters.merge(base, adapter, dtypes)
        worst = max(error, key=error.get)
        done = (
            f"{len(error)} matrices merged; largest rounding error {error[worst]:.2g} of the "
            f"largest weight, in {worst}"
        )
    with whole(given.out) as directory:
        models.save(directory, base.replace(params=params))
    print(f"{given.out}: {done}")
    coded = _dtypes_of_codes(base)
    if coded:
        print(
            f"the 4-bit weights of {given.base} were decoded to {coded}, and are so in {given.out}"
        )
    if _unchanged(base, params, dtypes):
        why = adapter and _idle(adapter) or "what the adapter adds is lost in rounding, or is 0"
        print(f"{NOTHING}: every weight is that of {given.base}: {why}")


def _onto(given) -> str:
    """What to merge into: the base of the command line, or for one in 4 bits the model that --onto
    names. Raises ValueError for an --onto that makes no sense."""
    from lorax import tree
    from lorax.files import read_json
    from lorax.models.load import find, skeleton

    if given.onto is None:
        return given.base
    config = lambda name: read_json(find(name, weights=False) / "config.json")
    coded = lambda name: bool(config(name).get("quantization_config"))
    if not coded(given.base):
        raise ValueError(f"--onto: {given.base} is not in 4 bits; leave --onto out")
    if given.onto == "decoded":
        return given.base
    if coded(given.onto):
        raise ValueError(f"--onto: {given.onto} is quantised too; expected the model before that")
    run = model_of(given).run
    theirs, ours = (
        {path: leaf.shape for path, leaf in tree.flatten(skeleton(name, **run).params).items()}
        for name in (given.base, given.onto)
    )
    for path in theirs | ours:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                f"--onto: {given.onto} is not the model that {given.base} was made of: {path} has "
                f"shape {ours.get(path)} there, {theirs.get(path)} here"
            )
    return given.onto


def _dtypes_of_codes(base) -> str:
    """The dtypes that a base's 4-bit weights are decoded to, "" where it has none."""
    from lorax import leaves, tree

    coded = (x for x in tree.flatten(base.params).values() if isinstance(x, leaves.FrozenWeight))
    return ", ".join(sorted({leaf.dtype.name for leaf in coded}))


def _unchanged(base, params, dtypes) -> bool:
    """Whether all parameters, in the dtypes that they are written in, are those of the base."""
    import numpy as np

    from lorax import ops, tree

    old, new = tree.flatten(base.params), tree.flatten(params)
    for path in (path for path in new if new[path] is not old[path]):
        pair = (ops.dense(leaf, base.sites.get(path)) for leaf in (old[path], new[path]))
        if not np.array_equal(*(np.asarray(leaf).astype(dtypes[path]) for leaf in pair)):
            return False
    return True


def _check_head(given, base, trained) -> None:
    """Raises ValueError for a head that is neither in the base's files nor was trained."""
    unset = [path for path in base.fresh if path not in trained]
    if unset:
        raise ValueError(f"{', '.join(unset)}: neither {given.base} nor {given.adapter} has them")


# ------------------------------------------------------------------------------------------- files


class Model(NamedTuple):
    """What is known of a base without its weights.

    base: a `skeleton`. task_type: PEFT's word for it. run: the fields of its Config that the
    adapter decides, for `lorax.load`.
    """

    base: object
    task_type: str | None
    run: dict


def read(given, sources=None):
    """The `Adapter` of the command line. Raises ValueError or FileNotFoundError."""
    from lorax.interop import loralib, peft

    path = _path(given)
    if path.suffix in CHECKPOINTS:
        if given.alpha is None:
            raise ValueError(f"--alpha: {path} does not say by what its updates are scaled")
        return loralib.load(path, given.alpha, sources)
    if kind(given) == "LORA":
        return peft.load(path, sources)
    from lorax import adapters

    base, method, state = trained(given)
    if method.factors is None:
        raise ValueError(f"{path}: {method.name} is no update of low rank, and no LoRA has it")
    return adapters.exported(method, state, base)


def read_for(given, model: Model):
    """`read` for a base. Raises ValueError where its layers or their shapes are others."""
    from lorax import adapters

    adapter = read(given, model.base.sources)
    try:
        adapters.check(model.base, adapter)
    except ValueError as error:
        raise ValueError(f"{_path(given)}: {error}") from None
    return adapter


def kind(given) -> str:
    """PEFT's word for the adapter of the command line; "LORA" for a checkpoint of loralib, `OWN`
    for a directory in lorax's own format alone.

    Raises ValueError or FileNotFoundError.
    """
    from lorax.interop import peft

    path = _path(given)
    if path.suffix in CHECKPOINTS:
        return "LORA"
    found = OWN if _is_own(path) else peft.read_config(path / peft.CONFIG).get("peft_type")
    if given.alpha is not None:
        raise ValueError(f"--alpha: {path} says itself how it is scaled")
    return found


def _is_own(path: Path) -> bool:
    """Whether a directory holds a method that PEFT can't read, in lorax's own format."""
    from lorax import states
    from lorax.interop import peft

    return not (path / peft.CONFIG).exists() and states.is_here(path)


def trained(given):
    """(Base, Method, State) of an adapter that is not LoRA."""
    from lorax import models, peft_methods, states

    if given.base is None:
        raise ValueError(f"--base: needed to read {given.adapter}, which is {kind(given)}")
    base = models.load(given.base, **model_of(given).run)
    return base, *(states if _is_own(_path(given)) else peft_methods).load(_path(given), base)


def _path(given) -> Path:
    from lorax.interop.peft import WEIGHTS

    path = Path(given.adapter)
    return path.parent if path.name == WEIGHTS else path


def model_of(given) -> Model:
    """The base of the command line, an encoder with the head that the adapter has weights for.

    Raises ValueError or FileNotFoundError.
    """
    from lorax.adapters import check_task
    from lorax.files import read_json
    from lorax.interop import peft
    from lorax.models.load import config_fields, family_of, find, skeleton

    family = family_of(given.base, read_json(find(given.base, weights=False) / "config.json"))
    path, run, stated = _path(given), {}, None
    if path.suffix not in CHECKPOINTS and not _is_own(path):
        stated = peft.read_config(path / peft.CONFIG).get("task_type")
    fields = config_fields(family)
    own = "CAUSAL_LM" if "vocab_size" in fields else None
    if "head" in fields:  # an encoder, which has one of several
        labels = _labels(given)
        run = {"head": "classification", "labels": labels} if labels else {}
        own = "SEQ_CLS" if labels else None
    base = skeleton(given.base, **run)
    check_task(base, stated, f"{path / peft.CONFIG}: ")
    if run and stated is None and not _is_own(path):
        try:  # the classifier is for the head that the base says it has
            skeleton(given.base)
        except ValueError as error:
            raise ValueError(f"{path}: has a classifier, but no task_type; {error}") from None
    return Model(base, own, run)


def _labels(given) -> int | None:
    """Classes that the classifier in an adapter's files tells apart, None without one."""
    from lorax import states
    from lorax.interop import peft

    if _is_own(_path(given)):
        return states.classes(_path(given))
    if kind(given) == "LORA":
        weights = read(given).weights
    else:
        file = _path(given) / peft.WEIGHTS
        weights = peft.own_names(peft.read_tensors(file)[0], file)
    for path in ("classifier.weight", "classifier.out_proj.weight"):
        if path in weights:
            return len(weights[path])
    return weights["head/out/kernel"].shape[1] if "head/out/kernel" in weights else None


def _check_new(out: str) -> None:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already; give a new directory")


@contextlib.contextmanager
def whole(out: str) -> Iterator[Path]:
    """A directory to write into that takes the name `out` when all is written, or is gone.

    Raises FileExistsError where there is something of that name already.
    """
    _check_new(out)
    out = Path(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
