"""The report on adapters from anywhere: PEFT directories, loralib checkpoints, and the
dense updates that lorax writes for other methods."""

import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from lorax import naming, rundir
from lorax.analysis import basis_similarity, figures, tables
from lorax.files import read_json
from lorax.interop import formats, peft, reading, states
from lorax.interop.adapter import Updates, only, renamed
from lorax.interop.formats.names import hugging_face
from lorax.interop.formats.opened import open_adapter
from lorax.interop.formats.placed import placed
from lorax.interop.places import Places
from lorax.report import bases, notes, page, selection
from lorax.report.bases import Kernels
from lorax.report.page import Picture, Section
from lorax.report.sections import (
    base_weights,
    shared_directions,
    spectra,
    sums,
    user_statistics,
)
from lorax.xray import defects, terminal, together
from lorax.xray.measured import measure, unread

LEAD = "A low-rank update: its size, its rank and its directions."
NO_SCALE = "none in the file: s = 1, so norms are those of BA; give --alpha"


class Given(NamedTuple):
    """An adapter that was read."""

    name: str
    path: pathlib.Path
    updates: Updates
    facts: dict[str, Any]


def write(
    paths: Sequence[str | pathlib.Path],
    base: str | None = None,
    out: str | pathlib.Path | None = None,
    alpha: float | None = None,
    layers: int | None = None,
    also: Sequence[str] = (),
    share: pathlib.Path | None = None,
) -> pathlib.Path:
    """Analyse one adapter or several and write their report. Returns the path of report.html.

    Args:
      paths: PEFT directories or loralib checkpoints.
      base: their base model, as `lorax.models.load` takes it. By default the one that the adapter
        names, if it is on this machine; without a base, comparisons with it are left out.
      out: where to write the page; by default runs/adapter-<name>.
      alpha: lora_alpha of loralib's checkpoints, which don't store it.
      layers: in how many layers, evenly spaced, they are compared with the base; None: all.
      also: statistics of every update, each as "FILE.py:function".
      share: write the page as one file here instead.

    Raises FileNotFoundError or ValueError for an adapter that can't be read and for a base that
    can't be loaded or doesn't fit, before anything is written.
    """
    paths = [pathlib.Path(path) for path in paths]
    if alpha is not None and not any(reading.is_checkpoint(path) for path in paths):
        raise ValueError(
            "--alpha is for loralib's checkpoints; a PEFT adapter_config.json already has it"
        )
    statistics = tables.read_statistics(also)
    with threadpool_limits(1, user_api="blas"):
        by_tensors = base is not None and bases.is_of_tensors(base)
        nothing = None, None, None, ""
        kernels, sources, fields, why = nothing if by_tensors else _base(paths, base)
        names = [_name(path) for path in paths]
        names = names if len(set(names)) == len(names) else naming.names(paths)
        names = naming.shortened(names)
        given = [read(*x, sources, alpha, fields) for x in zip(names, paths, strict=True)]
        given = _aligned(given)
        if by_tensors:
            kernels = bases.of_tensors(base, (path for x in given for path in x.updates))
            given = [_in_base(adapter, kernels, base) for adapter in given]
        for adapter in given:
            if kernels is not None:
                _check(adapter, kernels, base or "its base")
        name = naming.default_name("adapter", names)
        directory = pathlib.Path("runs") / name if out is None else pathlib.Path(out)
        options = {"base": base, "alpha": alpha, "layers": layers, "also": also, "out": directory}
        command = page.command(paths, **options)
        sections = _sections(given, kernels, why, command, layers, statistics)
        return page.save(directory, _title(names), LEAD, sections, command, share)


def _aligned(given: list[Given]) -> list[Given]:
    """The adapters with the first one's name for each matrix, which another format may call
    otherwise ("unet.mid_block.proj" and "lora_unet_mid_block_proj")."""
    names: dict[str, str] = {}
    aligned = []
    for adapter in given:
        own = {path: names.get(together.same_matrix(path), path) for path in adapter.updates}
        if len(set(own.values())) < len(own):
            own = {path: path for path in own}
        names |= {together.same_matrix(path): name for path, name in own.items()}
        aligned.append(adapter._replace(updates=renamed(adapter.updates, own)))
    return aligned


def _title(names: Sequence[str]) -> str:
    """The page's title: "a", "a and b", "a, b and 3 more adapters"."""
    if len(names) > 3:
        return f"{names[0]}, {names[1]} and {len(names) - 2} more adapters"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def read(
    name: str, path: pathlib.Path, sources=None, alpha: float | None = None, fields=None
) -> Given:
    """An adapter's updates and facts about it. sources: where in Hugging Face's tensors the base's
    parameters are; without them, layers are called by their modules' names. fields: of the base's
    config.json, None if they are not known."""
    if not reads_whole(path, sources):
        return _of_file(name, path, sources, fields)
    content = reading.read(path, sources, alpha)
    changes = {layer: x for layer, x in content.updates.items() if all(tables.shape_of(x))}
    factored = any(len(tables.shape_of(x)) == 3 for x in changes.values())
    if factored and sources is None:
        changes = renamed(changes, _told_apart(changes))
    if not changes:
        raise ValueError(f"{path}: no update, ΔW = 0 in all matrices")
    facts = {"Adapter": str(path), **content.facts()}
    if reading.is_checkpoint(path):
        facts |= {"Kind": "LoRA, loralib's checkpoint", "α": NO_SCALE if alpha is None else alpha}
    if factored:
        ranks = sorted({f.a.shape[1] for f in changes.values()})
        facts["Ranks"] = ", ".join(map(str, ranks))
    facts |= _places(changes)
    if factored:
        facts["Parameters in factors"] = sum(f.a.size + f.b.size for f in changes.values())
        whole = list(content.weights)
        others = f" and {len(whole) - 8} more" * (len(whole) > 8)
        facts["Also trained in full"] = ", ".join(whole[:8]) + others
    return Given(name, path, changes, facts)


def reads_whole(path: pathlib.Path, sources=None) -> bool:
    """Whether `lorax.interop.reading` reads this adapter, whole; others are read by
    `lorax.interop.formats`, a matrix at a time."""
    located = reading.located(path)
    if located.suffix == ".npz" or states.is_here(located):
        return True
    if not _is_peft(located):
        return not formats.recognised(path)
    is_lora = peft.read_config(located / peft.CONFIG)["peft_type"] == "LORA"
    return not is_lora or sources is not None or "lorax" in open_adapter(located).metadata


def _of_file(name: str, path: pathlib.Path, sources, fields) -> Given:
    """An adapter of any format, whose updates are read when they are asked for."""
    found = formats.read(path, fields)
    bar = page.progress(measure(found.updates), f"reading {name}", len(found.updates))
    measured = list(bar)
    updates = unread(measured)
    if not updates:
        raise ValueError(f"{path}: no update with finite numbers in it")
    if sources is None:
        updates = renamed(updates, _told_apart(updates))
    else:
        updates = renamed(updates, {layer: hugging_face(layer) for layer in updates})
        updates = placed(updates, Places(sources))
    told = {_as_title(fact): value for fact, value in terminal.about(found).items()}
    facts = {"Adapter": str(path), "Format": found.format, "Kind": terminal.kinds(found), **told}
    if any(one.factored for one in measured):
        facts["Ranks"] = ", ".join(map(str, sorted({x.update.rank for x in measured})))
    facts |= _places(updates)
    facts["Parameters"] = sum(one.parameters for one in measured)
    ranks = {one.update.layer: terminal.numerical(one) for one in measured if not one.bad}
    wrong = defects.lines(defects.defects(measured, ranks), len(measured))
    facts |= {f"Defect {n}": line for n, line in enumerate(wrong, 1)}
    return Given(name, path, updates, facts)


def _as_title(fact: str) -> str:
    return fact[0].upper() + fact[1:]


def _places(changes) -> dict[str, Any]:
    """Facts about which matrices have an update."""
    targets = list(dict.fromkeys(tables.layer_and_target(path)[1] for path in changes))
    layers = {tables.layer_and_target(path)[0] for path in changes} - {-1}
    return {"Targets": ", ".join(targets), "Layers": len(layers), "Matrices": len(changes)}


def _told_apart(paths: Iterable[str]) -> dict[str, str]:
    """Their names: modules of one layer with the same last word also get the word before it:
    "h.0.attn.c_proj" and "h.0.mlp.c_proj" become "h.0.attn:c_proj" and "h.0.mlp:c_proj"."""
    before: dict[tuple[int, str], set[str]] = {}
    ends = {path: re.split(r"[./]", path)[-2:] for path in paths}
    for path, words in ends.items():
        place = tables.layer_and_target(path)
        if len(words) == 2 and place[1] == words[1] and not words[0].isdecimal():
            before.setdefault(place, set()).add(words[0])
    ambiguous = {target for (_, target), words in before.items() if len(words) > 1}
    longer = lambda path: re.sub(r"[./](?=[^./]+$)", ":", path)
    return {
        path: longer(path) if tables.layer_and_target(path)[1] in ambiguous else path
        for path in paths
    }


def _name(path: pathlib.Path) -> str:
    """An adapter's name: its directory's; for a run's adapter, run and member."""
    path = path.resolve()
    if path.parent.name == rundir.ADAPTERS and path.name.isdigit():
        return f"{path.parent.parent.name}-{path.name}"
    return path.stem if path.is_file() else path.name


def _base(paths: Sequence[pathlib.Path], name: str | None) -> tuple[Kernels | None, Any, Any, str]:
    """(kernels, sources, fields, "") of the base as `bases.with_sources` has them, or three times
    None and the reason if --base was not given and the adapter's own base can't be loaded."""
    give = "give it with --base=DIRECTORY"
    none = None, None, None
    if name is None:
        configs = [path / peft.CONFIG for path in paths if _is_peft(path)]
        named = {peft.read_config(file).get("base_model_name_or_path") for file in configs}
        if len(named) != 1 or len(configs) < len(paths) or not (called := named.pop()):
            return *none, f"the adapter's file names no single base; {give}"
        name = bases.here(called)
        if name is None:
            return *none, f"its base {called} is not on this machine; {give}"
        try:
            return *bases.with_sources(name), ""
        except Exception as error:  # the rest of the report needs no base
            return *none, f"its base {name} could not be loaded ({error}); {give}"
    try:
        return *bases.with_sources(name), ""
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"--base={name}: can't load this model: {error}") from error


def _in_base(given: Given, kernels: Kernels, base: str) -> Given:
    """With a fact on how many of the adapter's matrices are in a base known by its tensors."""
    both = sum(path in kernels for path in given.updates)
    said = f"{both} of {len(given.updates)} matrices are in {base}"
    return given._replace(facts=given.facts | {"Compared with the base": said})


def _is_peft(path: pathlib.Path) -> bool:
    """Whether a directory has a config of PEFT's."""
    return (path / peft.CONFIG).exists() and "peft_type" in read_json(path / peft.CONFIG)


def _check(given: Given, kernels: Kernels, base: str) -> None:
    """Raises ValueError if an update does not fit its kernel."""
    for path, whole_shape in tables.shapes_of(given.updates).items():
        shape = whole_shape[:2]
        known = tables.kernel_shape(kernels, path) if path in kernels else None
        if known is None and isinstance(kernels, bases.Tensors):
            continue  # an adapter may change parts that are in other files
        if known != shape:
            has = "is not" if known is None else f"is {known}"
            raise ValueError(
                f"{given.path}: its {path} is {shape}, which {has} in {base}; --base must be "
                "the model that the adapter was trained on"
            )


# ----------------------------------------------------------------------------------------- sections


def _sections(
    given: list[Given],
    kernels: Kernels | None,
    why: str,
    command: str,
    layers: int | None,
    statistics: Sequence[tables.Statistic],
) -> list[Section]:
    # Those with factors first.
    by_kind = sorted(given, key=lambda adapter: "Ranks" not in adapter.facts)
    updates = {adapter.name: adapter.updates for adapter in by_kind}
    sigmas, ranks = tables.spectra(updates)
    sigmas, ranks = sigmas.assign(adapter=sigmas["member"]), ranks.assign(adapter=ranks["member"])
    sections = page.attempt("What it is", _about, given, ranks, command)
    sections[0] = sections[0]._replace(files={"spectra.csv": sigmas, "ranks.csv": ranks})
    names = [adapter.name for adapter in given]
    shown = pd.DataFrame({"member": names, "adapter": names}, index=names)
    measured = tables.statistics(updates, statistics, kernels, why)
    also = user_statistics.headings(measured, "adapter")
    sections += page.attempt("Layer by layer", _layers, ranks, also)
    sections += user_statistics.sections(measured, shown, "adapter", statistics)
    sections += page.attempt("Spectra of the updates", spectra.spectra, sigmas, "adapter")
    sections += page.attempt("How small it can be", sums.smaller, sigmas, updates)
    as_given = {name: updates[name] for name in names}
    if len(given) == 2:
        sections += page.attempt("Subspace similarity", _both, names, as_given)
    elif len(given) > 2:
        sections += page.attempt("Subspace similarity", _pairwise, names, as_given)
    if len(given) > 1:
        sections += page.attempt("In one sum", sums.sums, as_given)
    figure_names: list[str] = []
    for name in names:
        figure = f"between_layers_{page.slug(name)}" if len(given) > 1 else "between_layers"
        figure_names.append(page.unused(figure, figure_names))
        title = "Between layers" + f" of {name}" * (len(given) > 1)
        arguments = (updates[name], title, figure_names[-1])
        sections += page.attempt(title, _between_layers, *arguments)
    in_base = updates
    if isinstance(kernels, bases.Tensors):
        in_base = {name: only(of_one, kernels) for name, of_one in updates.items()}
    arguments = (in_base, kernels, why, shown, "adapter", layers)
    sections += page.attempt(base_weights.TITLE, base_weights.sections, *arguments)
    return [*sections, notes.section(notes.UPDATES)]


def _about(given: list[Given], ranks: pd.DataFrame, command: str) -> Section:
    """What the adapters are: a sentence and the facts for each."""
    lines = []
    for adapter in given:
        matrices = ranks[ranks["member"] == adapter.name]
        unchanged = selection.unchanged(matrices)
        if unchanged:
            warnings.warn(f"{adapter.path}: {unchanged}", stacklevel=2)
        if (matrices["norm"] == 0).all():
            lines.append(f"<p><strong>{page.escape(f'{adapter.name}: {unchanged}')}</strong></p>")
            continue
        largest = matrices.loc[matrices["norm"].idxmax()]
        of_rank = f" of rank {adapter.facts['Ranks']}" if "Ranks" in adapter.facts else ""
        text = (
            f"{adapter.name}: {len(matrices)} matrices{of_rank} use "
            f"{matrices['effective'].mean():.1f} directions on average (effective rank; stable "
            f"rank {matrices['stable'].mean():.1f}). The largest update is that of "
            f"{largest['path']}, ‖ΔW‖ = {largest['norm']:.3g}."
        )
        text += f" {unchanged}" if unchanged else ""
        lines.append(f"<p><strong>{page.escape(text)}</strong></p>")
    parts = [f'<div class="answer">{"".join(lines)}</div>']
    for adapter in given:
        parts.append(page.facts(adapter.facts, code=["Adapter"]))
    parts.append(page.facts({"Redraw this page": command}, commands=["Redraw this page"]))
    return Section("What it is", "".join(parts))


def _layers(ranks: pd.DataFrame, also: pd.DataFrame | None) -> Section:
    """Size and rank layer by layer, and a table of every matrix. also: further numbers of the
    matrices: member, path, and a column per number, named by its heading."""
    low, high = ranks["effective"].min(), ranks["effective"].max()
    alt = (
        f"Line charts of norm, effective and stable rank by layer: the effective rank is between "
        f"{low:.1f} and {high:.1f}, with ranks of up to {ranks['rank'].max()}."
    )
    several_given = ranks["member"].nunique() > 1
    caption = "Norm and ranks of ΔW by layer, one line per target."
    if several_given:
        caption = (
            "Norm and ranks of ΔW by layer, one row of panels per target, one line per adapter."
        )
    header = ["matrix", *["adapter"] * several_given, "layer", "target", "rank", "‖ΔW‖"]
    header += ["effective rank", "stable rank", "90% energy rank", "numerical rank"]
    extra = [] if also is None else [name for name in also if name not in ("member", "path")]
    table = ranks if also is None else ranks.merge(also, on=["member", "path"], how="left")
    rows = [
        [r["path"], *[r["member"]] * several_given, r["layer"], r["target"], r["rank"]]
        + [page.Fixed(r["norm"], 4)]
        + [page.Fixed(r["effective"], 2), page.Fixed(r["stable"], 2), r["energy90"], r["numerical"]]
        + [page.Fixed(r[name], 4) for name in extra]
        for _, r in table.iterrows()
    ]
    content = page.aid(
        "High norms: the adapter changes these layers most. Low ranks: few directions suffice."
    )
    content += page.figure("layers", caption, alt)
    content += page.table(
        [*header, *extra], rows, "Every matrix; click a heading to sort.", sortable=True
    )
    return Section("Layer by layer", content, {"layers": Picture(figures.by_layer(ranks), ranks)})


def _both(names: list[str], updates: Mapping[str, tables.Updates]) -> Section:
    """The directions that two adapters share."""
    (comparison,) = shared_directions.of_pairs(updates, "adapters", " and ".join(names)).values()
    if comparison is not None:
        return shared_directions.section([comparison])
    text = "Not computed: no matrix has the same name and shape in both adapters."
    return Section("Subspace similarity", page.paragraph(text))


def _pairwise(names: list[str], updates: Mapping[str, tables.Updates]) -> Section:
    """How many directions each pair of adapters shares, as a matrix."""
    rows, apart = [], []
    for (first, second), comparison in shared_directions.of_pairs(updates).items():
        if comparison is None:
            apart.append(f"{first} and {second}")
            continue
        rows += shared_directions.of_sides(comparison, first=first, second=second)
    if not rows:
        text = "Not computed: no matrix has the same name and shape in two of the adapters."
        return Section("Subspace similarity", page.paragraph(text))
    pairs = pd.DataFrame(rows)
    top = pairs.loc[(pairs["phi"] / pairs["by_chance"]).idxmax()]
    caption = (
        "φ of all directions of ΔW between every two adapters, on the input and the output side: "
        "means over layers, a layer being the mean over its matrices that both adapters have."
    )
    alt = (
        f"Matrices of φ between {len(names)} adapters: the most above chance are {top['first']} "
        f"and {top['second']} ({top['side']} side), {top['phi']:.2f} where chance is "
        f"{top['by_chance']:.2f}."
    )
    header = ["adapter", "and", "side", "matrices", "φ(1, 1)", "by chance", "i, j", "φ(i, j)"]
    header += ["by chance", "over chance"]
    listed = [
        [r["first"], r["second"], r["side"], r["matrices"], page.Fixed(r["phi_1_1"], 3)]
        + [page.Fixed(r["chance_1_1"], 3), f"{r['i']}, {r['j']}"]
        + [page.Fixed(r["phi"], 3, r["half"]), page.Fixed(r["by_chance"], 3)]
        + [page.Fixed(r["phi"] / r["by_chance"], 2)]
        for _, r in pairs.iterrows()
    ]
    content = page.paragraph(f"{shared_directions.EXPLANATION} {shared_directions.DENSE}")
    content += page.aid("Over chance near 1: the two adapters share no more than random ones.")
    content += page.figure("overlap", caption, alt)
    note = f"Every pair; i and j are all directions of the two. {spectra.OVER_LAYERS}"
    content += page.table(header, listed, note, sortable=True)
    if apart:
        text = f"No matrix of the same name and shape: {'; '.join(apart)}."
        content += page.note(text)
    pictures = {"overlap": Picture(figures.overlap(pairs, names), pairs)}
    return Section("Subspace similarity", content, pictures, {"overlap.csv": pairs})


def _between_layers(updates: tables.Updates, title: str, name: str) -> list[Section]:
    """Whether an adapter changes its layers in the same directions. No section if no target has two
    layers of the same shape. name: of the figure."""
    maps: dict[tuple[str, str], tuple[list[int], np.ndarray]] = {}
    rows, targets = [], {}
    for path in updates:
        targets.setdefault(tables.layer_and_target(path)[1], []).append(path)
    for target, paths in targets.items():
        of_target = tables.bases({path: updates[path] for path in paths})
        for kind, side in (("dW in", "input"), ("dW out", "output")):
            shape = of_target[paths[0]][kind].shape
            same = [path for path in paths if of_target[path][kind].shape == shape]
            if len(same) < 2:
                continue
            basis = np.stack([of_target[path][kind] for path in same])  # (layers, n, r)
            phi = basis_similarity(basis[:, None], basis[None])[..., -1, -1]
            layers = [tables.layer_and_target(path)[0] for path in same]
            maps[target, side] = layers, phi
            chance = shape[1] / shape[0]
            row = {"target": target, "side": side, "chance": chance}
            rows += [
                {**row, "layer": layers[i], "other": layers[j], "phi": phi[i, j]}
                for i, j in np.ndindex(phi.shape)
            ]
    if not maps:
        return []
    numbers = pd.DataFrame(rows)
    pairs = numbers[numbers["layer"] != numbers["other"]]
    top = pairs.loc[pairs["phi"].idxmax()]
    alt = (
        f"Heat maps of φ(r, r) between layers: on average {pairs['phi'].mean():.2f}, by chance "
        f"{pairs['chance'].mean():.2f}; the most alike are layers {top['layer']} and "
        f"{top['other']} of {top['target']} ({top['side']} side), {top['phi']:.2f}."
    )
    caption = (
        "φ of all directions between one layer's ΔW and another's, on the input and the output "
        "side. The diagonal is 1, the chance level r/n."
    )
    content = page.aid(
        "Bright blocks off the diagonal: layers that are changed in the same directions."
    )
    content += page.figure(name, caption, alt)
    return [Section(title, content, {name: Picture(figures.between_layers(maps), numbers)})]
