"""A run directory (`lorax.rundir`) as tables: members, measurements, settings, the best setting."""

import os
import pathlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorax import rundir
from lorax.config import axis_of, swept
from lorax.interop import peft, reading, states, tensors
from lorax.interop.adapter import Factors

METRICS = ("member", "step", "split", "loss")  # columns of every measurement


@dataclass(frozen=True, repr=False)
class Run:
    """The contents of a run directory.

    Attributes:
      directory: its path.
      config: config.json; the resolved config itself is under its key "config".
      members: one row per member, by its number: name, method, rank, scale, lr, seed...
      metrics: one row per measurement: member, step, split, loss (NaN if it was not finite)...
      status: status.json.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    members: pd.DataFrame
    metrics: pd.DataFrame
    status: dict[str, Any]

    def __repr__(self) -> str:
        state = self.status.get("state", "state unknown")
        methods = ", ".join(map(str, dict.fromkeys(self.members["method"])))
        count = f"{len(self.members)} member{'s' * (len(self.members) != 1)}"
        text = f"<Run {self.directory.resolve().name}: {state}, {count} ({methods})"
        evals = self.metrics[(self.metrics["split"] == "eval") & (self.metrics["step"] > 0)]
        last = evals.sort_values("step", kind="stable").groupby("member")["loss"].last().dropna()
        if len(last):
            best = last.idxmin()
            text += f", best {self.members['name'][best]} with eval loss {last[best]:.4g}"
        return text + ">"

    def rows(self, member: int) -> dict[str, np.ndarray] | None:
        """The member's test rows, each array (N,) float32; None for a member that has none: in runs
        without test rows (`eval.test` 0), after divergence and before it is trained.

        "loss": of each row, summed over its tokens, after training; "start": the same of the base;
        "weight": the row's number of tokens, 1 for a row of arrays or with a label, so
        that sum(loss) / sum(weight) is `test_loss`. "score" and "start_score", where a row has one:
        the number of tokens, or 1 or 0 for the class, that the model predicts correctly. Rows are
        in the same order in all members of a task.

        Raises ValueError that names a damaged file.
        """
        file = rundir.rows(self.directory, member)
        arrays = tensors.read_npz(file) if file.exists() else {}
        return arrays if "loss" in arrays else None

    def update(self, member: int, base=None) -> dict[str, Factors] | dict[str, np.ndarray]:
        """The member's update by layer ("h/0/attn/q"), for any method: `Factors` (a, b, s with
        dW = s * a @ b) if it has them, else dW (in, out).

        base: its base model, from `lorax.load`. Needed for methods that don't store dW because it
        is large (subspaces).

        Returns {} if nothing changed. Raises FileNotFoundError if the member saved nothing,
        ValueError for a method that doesn't change weights or can't be read without base, and
        ValueError that names a damaged file.
        """
        folder = rundir.adapter(self.directory, member)
        if base is None:
            updates = reading.read(folder).updates
        else:
            from lorax import adapters  # imports JAX, which reading a run doesn't need

            updates = adapters.load(folder, base).updates
        return {layer: x for layer, x in updates.items() if not _is_empty(x)}

    def adapter(self, member: int) -> dict[str, Factors]:
        """The member's factors by path ("h/0/attn/q"). Raises FileNotFoundError if it has none,
        ValueError if its PEFT file is of a method without factors."""
        factors = peft.load(rundir.adapter(self.directory, member)).factors
        return {path: f for path, f in factors.items() if not _is_empty(f)}

    def delta(self, member: int) -> dict[str, np.ndarray]:
        """{path: dW (in, out)} of a member whose update is not of low rank. Raises
        FileNotFoundError if it saved none (prefixes and bottlenecks don't change weights) and
        ValueError that names a damaged file."""
        return states.deltas(rundir.adapter(self.directory, member))

    def texts(self, member: int) -> list[dict[str, Any]]:
        """The prompts that a member completed: {"prompt", "text", "references"} each; [] if it
        completed none."""
        return rundir.read_texts(rundir.texts(self.directory, member))

    def base_texts(self, member: int) -> dict[str, str]:
        """{prompt: its completion by the member's base, without the adapter}; {} if there is none.
        Both were decoded in the same way."""
        row, config = self.members.loc[member], self.config.get("config", {})
        decoding = dict(config.get("eval") or {})
        # Options that the sweep moves stand on the members' lines.
        decoding |= {key: row[f"eval.{key}"] for key in decoding if f"eval.{key}" in row}
        of = rundir.writer(row.get("base"), row.get("quant"), decoding)
        lines = rundir.read_texts(rundir.texts(self.directory, rundir.BASE))
        return {x["prompt"]: x["text"] for x in lines if all(x.get(k) == of[k] for k in of)}

    def samples(self, member: int) -> dict[str, np.ndarray] | None:
        """The images that a member made (`eval.samples`): "images" (N, height, width, channels)
        uint8, and "classes" (N,) int32 or "captions" (N,) texts; None if it made none. Raises
        ValueError that names a damaged file."""
        return _samples(rundir.samples(self.directory, member))

    def base_samples(self, member: int) -> dict[str, np.ndarray] | None:
        """The same of the images that the member's base made of the same noise."""
        group = self.members.loc[member].get("group", 0)
        return _samples(rundir.base_samples(self.directory, group))


def _samples(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    arrays = tensors.read_npz(file)
    if not ("images" in arrays and arrays.keys() & {"classes", "captions"}):
        raise ValueError(f"{file}: it has {', '.join(arrays)}; expected images and their classes")
    images, asked = arrays["images"], arrays.get("classes", arrays.get("captions"))
    right = images.dtype == np.uint8 and images.ndim == 4 and asked.shape == images.shape[:1]
    if not right or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{file}: {images.dtype} of {images.shape} and classes of {asked.shape}; expected "
            "uint8 images (N, height, width, 1 or 3) and a class or caption of each"
        )
    return arrays


def _is_empty(update: Factors | np.ndarray) -> bool:
    """Whether the update is factors of rank 0: DoRA's lengths for a layer that is not adapted."""
    return isinstance(update, Factors) and update.a.shape[1] == 0


def load(directory: str | os.PathLike) -> Run:
    """Read a run directory, finished or not.

    Raises FileNotFoundError that names the missing directory or file, and ValueError that names the
    damaged file and line. An incomplete last line of a .jsonl file is ignored with a warning, as a
    run that is still writing or was killed can end with one.
    """
    directory = pathlib.Path(directory)
    contents = rundir.read(directory)
    metrics = pd.DataFrame(contents.metrics, columns=None if contents.metrics else METRICS)
    return Run(
        directory=directory,
        config=contents.config,
        members=pd.DataFrame(contents.members).set_index("member", drop=False).rename_axis(None),
        metrics=metrics.astype({"member": int, "step": int, "loss": float}),
        status=contents.status,
    )


# ------------------------------------------------------------------------------------ eval losses

# Fields of members.jsonl in which members may differ, apart from the seed: axes of a sweep.
AXES = (
    "rank",
    "quant",
    "targets",
    "layers",
    "alpha",
    "scaling",
    "init",
    "method",
    "lr",
    "weight_decay",
    "dropout",
    "n_train",
)
WITHOUT_RESULT = ("diverged", "stopped")  # the status of members that have no final loss
# Settings are averaged over these.
SEEDS = ("seed", "start_seed", "order_seed", "draw_seed", "data_seed")
# What a field without a value means.
MISSING = {"n_train": "all", "layers": "all", "inputs": "all", "quant": "none"}


class Axes(NamedTuple):
    """How a sweep is laid out: the axis of the curve, and the other fields that differ."""

    main: str | None  # None: all members have the same setting, apart from the seed
    others: tuple[str, ...]
    tuned: tuple[str, ...] = ()  # fields of which every setting has its own best value

    @property
    def names(self) -> tuple[str, ...]:
        """All fields in which the settings differ; the main axis first."""
        return self.others if self.main is None else (self.main, *self.others)

    @property
    def fields(self) -> tuple[str, ...]:
        """`names`, and the fields that were tuned: all in which members differ but for the seed."""
        return (*self.names, *self.tuned)


def summary(run: Run) -> pd.DataFrame:
    """One row per member: its fields, then its results.

    Adds status ("finished", "diverged", "running", or "stopped" by `config.sweep.tune` in favour of
    better values), diverged_at, stopped_at, seconds, step_ms (training only),
    base_loss (eval at step 0, before any update), final_step, final_loss and best_loss (evals after
    step 0), in nats per completion token, and a column per score (`scores`: accuracy, bleu...).
    These are of validation rows; base_test_loss, test_loss and a column test_SCORE per score are of
    test rows, NaN without them (`eval.test` 0). With `eval.keep` "best" the final step is the one
    that was exported, 0 where no step is better than the base. A diverged or stopped member has no
    final loss and no test loss (NaN). With `eval.also`: final_also_NAME, the final loss on a
    further task, forgetting_NAME, that less the loss before the first step, and final_kl,
    KL(base || member) on the validation rows, in nats a target. `setting` is the name without its
    seeds, `seed` tells the members of a setting apart (`repeats`); lists (targets) become text like
    "q v".
    """
    measured = _curves(run.metrics)
    also = {split: of for split, of in measured.items() if split.startswith(rundir.ALSO)}
    of_split = lambda split, member: measured.get(split, {}).get(member, [])
    rows = []
    for member in run.members.index:
        evals, tests = (of_split(split, member) for split in ("eval", "test"))
        after = [point for point in evals if point.step > 0]
        status = run.status.get("members", {}).get(str(member), {})
        state = status.get("status", "running")
        if after and state == "finished" and not np.isfinite(after[-1].loss):
            state = "diverged"
        usable = state not in WITHOUT_RESULT and len(after) > 0
        final = _exported(evals, after, status)
        rows.append(
            {
                "status": state,
                "diverged_at": status.get("diverged_at"),
                "stopped_at": status.get("stopped_at"),
                "seconds": status.get("seconds"),
                "step_ms": status.get("step_ms"),
                "base_loss": _loss(evals, 0),
                "final_step": final.step if after else 0,
                "final_loss": final.loss if usable else np.nan,
                "best_loss": min((p.loss for p in after if p.loss == p.loss), default=np.nan),
                **_sharpness(status),
                **status.get("scores", {}),
                "base_test_loss": _loss(tests, 0),
                "test_loss": tests[-1].loss if usable and len(tests) > 1 else np.nan,
                **{f"test_{name}": np.nan for name in status.get("scores", {})},
                **{f"test_{name}": x for name, x in status.get("test_scores", {}).items()},
                **({"final_kl": final.kl if usable else np.nan} if "kl" in run.metrics else {}),
                **_forgotten(also, member, final.step if usable else None),
            }
        )
    # What was planted in a task (`calibration`) does not distinguish members.
    table = run.members.drop(columns="planted", errors="ignore")
    for column in table.columns:
        if table[column].map(lambda value: isinstance(value, list)).any():
            table[column] = [_words(value) for value in table[column]]
    seeds = rf"(^|,\s*)({'|'.join(SEEDS)})=[^,]*"
    table["setting"] = [re.sub(seeds, "", str(name)).strip(", ") for name in table["name"]]
    table["seed"] = repeats(table)
    return table.join(pd.DataFrame(rows, index=run.members.index))


class _Point(NamedTuple):
    """A measurement: step, loss and kl, NaN without one."""

    step: int
    loss: float
    kl: float


def _curves(metrics: pd.DataFrame) -> dict[str, dict[int, list[_Point]]]:
    """{split: {member: its measurements in the order of their steps}}, without training."""
    metrics = metrics[metrics["split"] != "train"].sort_values("step", kind="stable")
    kl = metrics["kl"] if "kl" in metrics else pd.Series(np.nan, metrics.index)
    found: dict[str, dict[int, list[_Point]]] = {}
    columns = (metrics[name].tolist() for name in ("split", "member", "step", "loss"))
    for split, member, *point in zip(*columns, kl.tolist(), strict=True):
        found.setdefault(split, {}).setdefault(member, []).append(_Point(*point))
    return found


def _loss(points: list[_Point], step: int | None) -> float:
    """The loss at a step, NaN without one."""
    return next((point.loss for point in points if point.step == step), np.nan)


def _forgotten(also: dict[str, dict], member: int, step: int | None) -> dict[str, float]:
    """final_also_NAME and forgetting_NAME of a member at its final step, NaN without one."""
    found = {}
    for split, of_member in sorted(also.items()):
        points = of_member.get(member, [])
        name, after = split.removeprefix(rundir.ALSO), _loss(points, step)
        found[f"final_also_{name}"] = after
        found[f"forgetting_{name}"] = after - _loss(points, 0)
    return found


def _sharpness(status: dict) -> dict[str, float]:
    """A member's columns of `analysis.sharpness`: the largest eigenvalue of its Hessian at step 0
    (start_sharpness) and after training (sharpness), each with the residual that bounds its
    error."""
    measured = status.get("sharpness", {})
    columns = {}
    for when, name in (("start", "start_sharpness"), ("end", "sharpness")):
        if when in measured:
            columns |= {
                name: measured[when]["value"],
                f"{name}_residual": measured[when]["residual"],
            }
    return columns


def repeats(members: pd.DataFrame) -> pd.Series:
    """What tells the members of one setting apart: the seed or, where others of `SEEDS` differ as
    well, all that differ ("seed=0, order_seed=1"). Members of two settings with the same value
    form a pair. members: of a `Run`."""
    differ = [name for name in SEEDS if name in members and members[name].nunique() > 1]
    groups = len(members[differ].drop_duplicates()) if differ else 1
    for name in ("seed", *differ):  # several seeds that are tied say the same
        if name in members and members[name].nunique() >= groups:
            return members[name]
    return pd.Series([fields(row, differ) for _, row in members.iterrows()], members.index)


def _exported(evals: list[_Point], after: list[_Point], status: dict) -> _Point | None:
    """A member's evaluation at the step that was exported: the last, or what `eval.keep` chose.
    None before the first step."""
    kept = [point for point in evals if point.step == status.get("kept_step", -1)]
    return kept[-1] if kept else after[-1] if after else None


def scores(run: Run) -> list[str]:
    """Names of the scores measured in addition to the loss: of a classifier, of generated texts or
    of images."""
    of_members = run.status.get("members", {}).values()
    return list(dict.fromkeys(name for m in of_members for name in m.get("scores", {})))


def loss_name(run: Run) -> str:
    """Name and unit of the loss."""
    return f"eval loss ({loss_unit(run)})"


def loss_unit(run: Run) -> str:
    """The loss is in nats, except for a planted task, whose labels are values, and for images that
    are denoised."""
    task = (run.config.get("config") or {}).get("task") or {}
    denoises = isinstance(task, dict) and task.get("name") == "diffusion"
    return "squared error" if denoises or "planted" in run.members else "nats"


def axes(run: Run, table: pd.DataFrame) -> Axes:
    """The sweep's axes. The main axis is the method if members differ in it, else the rank, else
    the sweep's first axis with several values.

    Fields that follow from others (tied axes) are not listed as axes, nor is one that was tuned
    (`config.sweep.tune`).
    """
    given = run.config.get("config", {}).get("sweep") or {}
    tuned = (axis_of(given["tune"]),) if given.get("tune") else ()
    sweep = [name for name in swept(given) if name not in tuned]
    order = [name for name in (*sweep, *AXES) if name in table.columns and name not in SEEDS]
    if any(name not in table.columns for name in sweep):
        order.append("setting")  # an axis that has no field in members.jsonl
    if table["rank"].nunique(dropna=False) > 1:
        order.insert(0, "rank")
    if table["method"].nunique() > 1:
        order.insert(0, "method")
    chosen: list[str] = []
    group, groups = np.zeros(len(table), int), 1  # of each member, those that `chosen` tells apart
    for name in dict.fromkeys(name for name in order if name not in tuned):
        value = 1 + pd.factorize(table[name])[0]  # 0 for a missing one
        finer = np.unique(group * (1 + value.max(initial=0)) + value, return_inverse=True)[1]
        if finer.max(initial=0) + 1 > groups:
            chosen.append(name)
            group, groups = finer, finer.max() + 1
    return Axes(chosen[0] if chosen else None, tuple(chosen[1:]), tuned)


def settings(table: pd.DataFrame, by: Axes, scores: Iterable[str] = ()) -> pd.DataFrame:
    """Averages over seeds: one row per setting, with mean, se (standard error), n (members with a
    final loss), members and diverged (counts), and the mean of each of `scores`. Where a field was
    tuned, a setting has its members at the best value, in a column of that name (`at_best`).

    Members without a final loss (diverged, not evaluated yet) are left out of the mean. `line`
    names the other axes' values, "" if there are none. se is NaN for fewer than two seeds.
    """
    main = by.main or "rank"
    rows = []
    for _, group in table.groupby([main, *by.others], sort=True, dropna=False):
        group = at_best(group, by.tuned)
        first = group.iloc[0]
        losses = group["final_loss"].dropna()
        rows.append(
            {
                main: first[main],
                **{name: first[name] for name in (*by.others, *by.tuned)},
                "line": fields(first, by.others),
                "scale": pd.to_numeric(group["scale"]).mean(),
                "trainable_params": first["trainable_params"],
                "mean": losses.mean() if len(losses) else np.nan,
                "se": losses.std(ddof=1) / np.sqrt(len(losses)) if len(losses) > 1 else np.nan,
                "n": len(losses),
                "members": len(group),
                "diverged": int((group["status"] == "diverged").sum()),
                **{name: group[name].mean() for name in scores},
            }
        )
    return pd.DataFrame(rows)


def at_best(group: pd.DataFrame, tuned: tuple[str, ...]) -> pd.DataFrame:
    """The members of a setting at the best value of the tuned fields: the one of the lowest mean
    final loss of which every seed has one; if there is none, the one that was trained longest. All
    members if nothing is tuned."""
    if not tuned:
        return group
    values = [rows for _, rows in group.groupby(list(tuned), dropna=False)]
    whole = [rows for rows in values if rows["final_loss"].notna().all()]
    if whole:
        return min(whole, key=lambda rows: rows["final_loss"].mean())
    return max(values, key=lambda rows: rows["final_step"].sum())


def averaged(table: pd.DataFrame, by: Axes) -> pd.Index:
    """The members that means over seeds are of: those that neither diverged nor were stopped and,
    where a field was tuned, have each setting's best value of it."""
    names = [*by.names] or ["method"]
    groups = [at_best(group, by.tuned) for _, group in table.groupby(names, dropna=False)]
    return pd.concat(groups).query("status not in @WITHOUT_RESULT").index


def eligible(settings: pd.DataFrame) -> pd.DataFrame:
    """The settings of which every seed has a final loss; rows of `settings`.

    A setting with a diverged or stopped seed is not eligible: the mean of the seeds that are left
    would be too good.
    """
    return settings[(settings["n"] > 0) & (settings["n"] == settings["members"])]


def best_setting(settings: pd.DataFrame) -> pd.Series | None:
    """The eligible row of `settings` with the lowest mean; None if there is none."""
    whole = eligible(settings)
    return None if whole.empty else whole.loc[whole["mean"].idxmin()]


def _words(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list) else value


class Measured(NamedTuple):
    """The column of the losses that are reported, the column of the base's, and their split."""

    loss: str
    base: str
    split: str


def measured(table: pd.DataFrame) -> Measured:
    """What is reported of the members (rows of `summary`): the loss on the test rows if there
    are any, else on the validation rows."""
    if "test_loss" in table and table["test_loss"].notna().any():
        return Measured("test_loss", "base_test_loss", "test")
    return Measured("final_loss", "base_loss", "validation")


def base_loss(table: pd.DataFrame) -> float | None:
    """The base's loss on the rows that `measured` names; None if it is unknown, or differs between
    members."""
    name = measured(table).base
    losses = table[name] if name in table else table["base_loss"].iloc[:0]
    return float(losses.mean()) if agree(losses) else None


def agree(losses: pd.Series) -> bool:
    """Whether there are losses (not NaN), and all are the same, but for rounding."""
    known = losses.dropna()
    return len(known) > 0 and bool(np.ptp(known) <= 1e-3 * known.abs().max())


def alike(table: pd.DataFrame, row: pd.Series, names: Iterable[str]) -> pd.Series:
    """Which rows of a table have the fields of another row, or lack them as well: (rows,) bool."""
    same = pd.Series(True, table.index)
    for name in names:
        same &= table[name].isna() if is_missing(row[name]) else table[name] == row[name]
    return same


def in_words(value: Any, name: str = "") -> str:
    """A field's value as shown in labels. name: of the field, which decides the word for a missing
    value (by default "none")."""
    if is_missing(value):
        return MISSING.get(name, "none")
    return f"{value:g}" if isinstance(value, float) else str(value)


def fields(row: pd.Series, names: Iterable[str]) -> str:
    """Several of a member's fields: "alpha=8, n_train=all". Fields that its method doesn't use
    (e.g. the rank in full fine-tuning) are left out."""
    used = [name for name in names if name in MISSING or not is_missing(row[name])]
    return ", ".join(f"{name}={in_words(row[name], name)}" for name in used)


def is_missing(value: Any) -> bool:
    """Whether a field has no value: None, or NaN, which None becomes in a table."""
    return value is None or (isinstance(value, (float, np.floating)) and np.isnan(value))
