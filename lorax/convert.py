"""Show adapters, convert them between formats, or merge them into a base model.

    python -m lorax.convert show ADAPTER                        spectrum and rank of every update
    python -m lorax.convert peft ADAPTER OUT --base BASE        an adapter in PEFT's format
    python -m lorax.convert to FORMAT ADAPTER OUT               any program's adapter as another's
    python -m lorax.convert merge BASE ADAPTER OUT              a base model with the update added
    python -m lorax.convert shrink ADAPTER OUT --energy 0.9     an adapter with fewer directions
    python -m lorax.convert add ADAPTER ADAPTER... OUT --rank 8 several adapters as one
    python -m lorax.convert subtract ADAPTER ADAPTER OUT        the first without the second

ADAPTER is one of:
  - a directory in PEFT's format, such as `runs/NAME/adapters/0`. PEFT's AdaLoRA, LoHa, VeRA,
    GraLoRA and HRA are converted to the LoRA with the same update. Other changes of weights can be
    shown and merged, virtual tokens only shown. All except LoRA and DoRA need --base to be shown.
  - a checkpoint of loralib, the LoRA authors' code, as .npz or .safetensors. It does not hold its
    scale: give --alpha.
  - a directory in lorax's own format (method.json). Without a delta.safetensors it needs --base to
    be shown. Your own method also needs --method FILE, the Python file that registers it.
`to` reads the files of many programs (docs/formats.md). It needs --base where a format has other
rows of q and k than Hugging Face: from and to GGUF, and from torchtune.
BASE is a shipped name, a Hugging Face directory or a Hub id. OUT must not exist yet.

shrink, add and subtract need no base: they take any format that `python -m lorax.xray` reads, and
write it in the same format or in PEFT's (--format). With --base, shrink takes all of the above.

If BASE is in 4 bits, merging decodes its weights and writes them decoded. --onto DIR merges into
the 16-bit model that BASE was quantised from instead.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorax import catalogue
from lorax.errors import fail

NOTHING = "nothing changes"
FORMATS = ("peft", "kohya", "diffusers", "mlx", "gguf")
SHOWN = 16  # singular values in a row of `show`


def main(arguments: list[str]) -> int:
    """The command line. Exit code 0, or 2 for a mistake in the input."""
    args = _parser().parse_args(arguments)
    try:
        if getattr(args, "method", None):
            catalogue.read(args.method)
        args.command(args)
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
            sub.add_argument("--base", required=base, help="the model that it was trained on")
        sub.add_argument("--alpha", type=float, help="lora_alpha of a loralib checkpoint")
        sub.add_argument(
            "--method", metavar="FILE", help="Python file that registers the adapter's method"
        )
        return sub

    sub = command("show", show, "ADAPTER", base=False)
    sub.add_argument("--csv", help="file for all singular values: path, index, sigma")
    command("peft", to_peft, "ADAPTER", "OUT", base=True)
    sub = commands.add_parser("to", help=to_format.__doc__.splitlines()[0])
    sub.set_defaults(command=to_format)
    sub.add_argument("format", metavar="FORMAT", choices=FORMATS, help=", ".join(FORMATS))
    for argument in ("ADAPTER", "OUT"):
        sub.add_argument(argument.lower(), metavar=argument)
    sub.add_argument("--base", help="the model that it was trained on, whose config.json is read")
    sub = command("merge", merge, "BASE", "ADAPTER", "OUT", base=None)
    sub.add_argument(
        "--onto",
        metavar="decoded|DIR",
        help="if BASE is in 4 bits: merge into its decoded weights (default), or into the model "
        "that it was quantised from",
    )
    sub = command("shrink", shrink, "ADAPTER", "OUT", base=False)
    _add_format(sub)
    how = _add_how(sub, required=True)
    how.add_argument(
        "--loss",
        type=float,
        help="nats (or squared error) that may be lost on the run's validation rows: keeps the "
        "largest singular values of all matrices, as few as that takes",
    )
    sub.add_argument("--run", metavar="RUN", help="its task is used; by default the adapter's run")
    sums = {"add": add, "subtract": subtract}
    for name, function in sums.items():
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        sub.set_defaults(command=function, method=None)
        sub.add_argument("adapters", metavar="ADAPTER", nargs="+")
        sub.add_argument("out", metavar="OUT")
        if name == "add":
            sub.add_argument(
                "--weights", type=_numbers, metavar="W,W...", help="of the adapters; by default 1"
            )
        _add_format(sub)
        _add_how(sub, required=False)
    return parser


def _add_how(sub: argparse.ArgumentParser, required: bool):
    """The options that say how many directions are kept, of which one is given."""
    how = sub.add_mutually_exclusive_group(required=required)
    how.add_argument("--energy", type=float, help="share of every squared norm to keep, 0 to 1")
    how.add_argument("--rank", type=int, help="directions to keep of every matrix")
    how.add_argument(
        "--error",
        type=float,
        help="relative error of all matrices together, 0 to 1: keeps the largest singular values "
        "of all matrices, as few as that takes",
    )
    return how


def _add_format(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--format", choices=FORMATS, help="of OUT; by default that of ADAPTER")


def _numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",")]


# ---------------------------------------------------------------------------------------- commands


def show(args) -> None:
    """Every update: its shape, scale, size, singular values and ranks."""
    from lorax.console import console
    from lorax.files import write_bytes

    content = _content(args)
    spectra = {layer: _singular_values(update) for layer, update in content.updates.items()}
    screen = console(width=None if sys.stdout.isatty() else 1000)
    screen.print(_table(args.adapter, content.updates, spectra))
    for note in content.notes():
        screen.print(note)
    if why := content.idle():
        screen.print(f"{NOTHING}: {why}")
    if args.csv:
        lines = ["path,index,sigma\n"]
        for layer, sigma in spectra.items():
            lines += [f"{layer},{i},{x:.9g}\n" for i, x in enumerate(sigma, 1)]
        write_bytes(args.csv, "".join(lines).encode())
        screen.print(f"all singular values: {args.csv}", soft_wrap=True)


def _content(args):
    """Updates, notes and facts of the adapter, read with its base if the command line has one.
    Raises ValueError or FileNotFoundError."""
    from lorax import adapters
    from lorax.interop import reading

    if args.base:
        return adapters.load(args.adapter, args.base, args.alpha, weights=False).content
    path = reading.located(args.adapter)
    reading.check_alpha(path, args.alpha)
    return reading.read(path, alpha=args.alpha)


def _singular_values(update):
    """Singular values of `Factors` or of dW (in, out), largest first."""
    import numpy as np

    from lorax import spectrum
    from lorax.interop.adapter import Factors

    if isinstance(update, Factors):
        return spectrum.factor_svd(update.a, update.b, update.s)[1]
    return np.linalg.svd(update, compute_uv=False)


def _table(name: str, updates: dict, spectra: dict):
    """The table of updates, one row per layer."""
    from rich.table import Table

    from lorax import spectrum
    from lorax.analysis.tables import shape_of

    factored = all(len(shape_of(update)) == 3 for update in updates.values())
    formula = "dW = s a b" if factored else "dW"
    table = Table(title=f"{name}: {formula} of every layer", title_justify="left")
    for head in ("layer", "in x out", "r", "s", "||dW||_F", "effective", "stable", "90 % energy"):
        table.add_column(head, justify="left" if head == "layer" else "right", no_wrap=True)
    table.add_column("singular values")
    for layer, update in updates.items():
        sigma = spectra[layer]
        omitted = f" ... {len(sigma) - SHOWN} more" * (len(sigma) > SHOWN)
        n_in, n_out, *rank = shape_of(update)
        table.add_row(
            layer,
            f"{n_in} x {n_out}",
            str(*rank),
            f"{update.s:g}" if rank else "",
            f"{(sigma**2).sum() ** 0.5:.4g}",
            f"{spectrum.effective_rank(sigma):.2f}",
            f"{spectrum.stable_rank(sigma):.2f}",
            f"{spectrum.energy_rank(sigma, 0.9)}",
            " ".join(f"{x:.3g}" for x in sigma[:SHOWN]) + omitted,
        )
    return table


def to_peft(args) -> None:
    """Any readable low-rank adapter as a directory that PEFT loads."""
    from lorax import adapters

    _check_new(args.out)
    trained = adapters.load(args.adapter, args.base, args.alpha, weights=False)
    with whole(args.out) as directory:
        adapters.save_as_lora(directory, trained)
    print(f"{args.out}: {len(trained.updates)} adapted matrices")
    if why := trained.content.idle():
        print(f"{NOTHING}: {why}")


def to_format(args) -> None:
    """An adapter of any program as a file of another's; its scales and numbers stay as they are."""
    from lorax.files import read_json
    from lorax.interop import formats

    _check_new(args.out)
    base = None
    if args.base:
        from lorax.models.directories import find

        base = read_json(find(args.base, weights=False) / "config.json")
    found = formats.read(args.adapter, base, as_stored=True)
    write = formats.WRITERS[args.format]
    if args.format in formats.FILES:
        write(Path(args.out), found, base)
    else:
        with whole(args.out) as directory:
            write(directory, found, base)
    print(f"{args.out}: {len(found.updates)} matrices of {found.format} as {args.format}")


def shrink(args) -> None:
    """A smaller low-rank adapter, with the error that this makes."""
    from lorax import shrinking

    _check_new(args.out)
    if args.run and args.loss is None:
        raise ValueError("--run: given without --loss, which alone needs validation rows")
    if args.base is None:
        _shrink_file(args)
        return
    from lorax import adapters

    if args.format not in (None, "peft"):
        raise ValueError(f"--format: {args.format} given; with --base PEFT's format is written")
    trained = adapters.load(args.adapter, args.base, args.alpha, weights=args.loss is not None)
    found = shrinking.shrink(trained, args)
    with whole(args.out) as directory:
        adapters.save_as_lora(directory, dataclasses.replace(trained, adapter=found.adapter))
    _say(args.out, found)


def _shrink_file(args) -> None:
    """`shrink` of an adapter in any format, without its base."""
    from lorax.interop import formats

    for name in ("loss", "alpha"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: needs the base; give it with --base")
    found = formats.read(args.adapter, {}, as_stored=True)  # rows in the file's order
    _write_smaller(args, found, found.updates)


def add(args) -> None:
    """Several adapters as one: the sum of their updates, of fewer directions if asked for."""
    _add(args, args.weights or [1.0] * len(args.adapters))


def subtract(args) -> None:
    """The first adapter without the others."""
    _add(args, [1.0] + [-1.0] * (len(args.adapters) - 1))


def _add(args, weights: list[float]) -> None:
    from lorax import adding
    from lorax.interop import formats

    _check_new(args.out)
    if len(args.adapters) < 2:
        raise ValueError("one adapter given, at least two are needed before OUT")
    paths = [Path(name).resolve() for name in args.adapters]
    for name, path in zip(args.adapters, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{name}: given twice; give it once, with a weight")
    found = [formats.read(adapter, {}, as_stored=True) for adapter in args.adapters]
    if len({file.format for file in found}) > 1:  # rows must have one order
        found = [formats.read(adapter, as_stored=True) for adapter in args.adapters]
    for file in found:
        _check_known(file)
    _write_smaller(args, found[0], adding.added({x.path: x.updates for x in found}, weights))


def _check_known(found) -> None:
    """Raises ValueError for parameters that were trained in full, and for unknown scales."""
    from lorax.interop.formats import factored

    if found.beside:
        names = ", ".join([*found.beside][:3])
        raise ValueError(f"{found.path}: {names}: trained in full, and would be lost")
    for update in found.updates:
        factored.check_scale(found, update, lambda why: ValueError(f"{found.path}: {why}"))


def _write_smaller(args, found, updates) -> None:
    """Write the leading directions of updates in the format of `found` or that of --format. An
    empty version is written before, so that what the format can't hold is refused at once."""
    from lorax import shrinking
    from lorax.interop import formats

    shrinking.check(args)
    _check_known(found)
    format = args.format or found.format.lower()
    if format not in formats.WRITERS:
        known = ", ".join(formats.WRITERS)
        raise ValueError(f"{found.format} is not written; choose one of {known} with --format")
    write = lambda out, updates: formats.WRITERS[format](
        out, found._replace(updates=tuple(updates)), None
    )
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory, Path(args.out).name), shrinking.empty(updates))
    smaller = shrinking.shrink_file(updates, args)
    kept = shrinking.smaller_updates(updates, smaller.adapter.factors)
    if not kept:
        raise ValueError("nothing to write: no matrix keeps a direction")
    one_file = contextlib.nullcontext(Path(args.out))
    with one_file if format in formats.FILES else whole(args.out) as out:
        write(out, kept)
    _say(args.out, smaller)


def _say(out: str, smaller) -> None:
    from lorax import shrinking

    for line in shrinking.lines(smaller):
        print(line)
    print(f"{out}: {shrinking.summary(smaller)}")


def merge(args) -> None:
    """A base model with an adapter merged into it, as a directory that transformers loads."""
    from lorax import adapters, models
    from lorax.models.saving import stored_dtypes

    _check_new(args.out)
    args.base = _onto(args)
    trained = adapters.load(args.adapter, args.base, args.alpha, unread=True)
    base = trained.base
    unset = [path for path in base.fresh if path not in trained.whole]
    if unset:
        raise ValueError(f"{', '.join(unset)}: missing from {args.base} and {args.adapter}")
    dtypes = stored_dtypes(base)
    merged = trained.merge(dtypes)
    with whole(args.out) as directory:
        models.save(directory, base.replace(params=merged.params))
    print(f"{args.out}: {_merged(trained.name, merged.error)}")
    if coded := _dtypes_of_codes(base):
        print(f"the 4-bit weights of {args.base} were decoded to {coded} and written so")
    if _unchanged(merged, base, dtypes):
        why = trained.content.idle() or "the update is 0, or is lost in rounding"
        print(f"{NOTHING}: every weight equals that of {args.base}: {why}")


def _merged(name: str, error: dict[str, float]) -> str:
    """The result in words. error: rounding error of every matrix, {} if unknown."""
    if not error:
        return f"{name} merged"
    worst = max(error, key=error.get)
    return (
        f"{len(error)} matrices merged; largest rounding error {error[worst]:.2g} of the largest "
        f"weight, in {worst}"
    )


def _onto(args) -> str:
    """The name of the model to merge into: the base, or for a base in 4 bits the model that --onto
    names. Raises ValueError for an --onto that does not fit the base."""
    from lorax import adapters, tree
    from lorax.files import read_json
    from lorax.models.load import find, skeleton

    if args.onto is None:
        return args.base
    config = lambda name: read_json(find(name, weights=False) / "config.json")
    coded = lambda name: bool(config(name).get("quantization_config"))
    if not coded(args.base):
        raise ValueError(f"--onto: {args.base} is not in 4 bits; leave --onto out")
    if args.onto == "decoded":
        return args.base
    if coded(args.onto):
        raise ValueError(
            f"--onto: {args.onto} is quantised too; expected the model before quantisation"
        )
    fields = adapters.head_fields(args.adapter, args.base)
    theirs, ours = (
        {path: leaf.shape for path, leaf in tree.flatten(skeleton(name, **fields).params).items()}
        for name in (args.base, args.onto)
    )
    for path in theirs | ours:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                f"--onto: {args.onto} is not the model that {args.base} was quantised from: "
                f"{path} has shape {ours.get(path)} there, {theirs.get(path)} here"
            )
    return args.onto


def _dtypes_of_codes(base) -> str:
    """The dtypes that a base's 4-bit weights are decoded to, "" if there are none."""
    from lorax import leaves, tree

    coded = (x for x in tree.flatten(base.params).values() if isinstance(x, leaves.FrozenWeight))
    return ", ".join(sorted({leaf.dtype.name for leaf in coded}))


def _unchanged(merged, base, dtypes) -> bool:
    """Whether all parameters, in the dtypes they are written in, equal those of the base."""
    import numpy as np

    from lorax import tree
    from lorax.models.saving import Weight

    params = tree.flatten(merged.params)
    for path, leaf in merged.replaced.items():
        site = base.sites.get(path)
        before, after = Weight(leaf, site), Weight(params[path], site)
        for index in np.ndindex(*leaf.shape[: site.stack if site else 0]):
            pair = (np.asarray(weight[index]).astype(dtypes[path]) for weight in (before, after))
            if not np.array_equal(*pair):
                return False
    return True


# ------------------------------------------------------------------------------------------- files


def _check_new(out: str) -> None:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: already exists; give a new name")


@contextlib.contextmanager
def whole(out: str) -> Iterator[Path]:
    """A temporary directory that is renamed to `out` at the end, or removed if anything fails.

    Raises FileExistsError if `out` exists already.
    """
    from lorax.files import draft

    _check_new(out)
    out = Path(out)
    temporary = draft(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
