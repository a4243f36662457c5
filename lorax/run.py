"""Run a sweep: config -> run directory with metrics, adapters, analysis and a report.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.sweep.rank="(1, 4, 16)" \\
        --config.train.steps=50
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.task.name=e2e \\
        --config.task.path=e2e-dataset.zip
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.method.targets="('attention',)"

Any key of the config can be set so; lorax/config.py lists them all. The same command again
resumes an unfinished run where its last checkpoint was, and leaves a finished one alone.

With `config.search.threshold` (0.9 for d90) the run looks for the intrinsic dimension: it trains
`config.sweep.dim` beside full fine-tuning, then round after round of what lies between.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lorax import __version__, config
from lorax.errors import fail
from lorax.files import read_json, write_bytes, write_json

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The study: FILE or FILE:ARGUMENT.")
flags.DEFINE_string(
    "workdir", None, "Run directory (default: runs/<config>[-<hash of overrides>])."
)


def main(argv: list[str]) -> int:
    """The command line. Exit code 0; 1 for a failure under way; 2 for a mistake in the input."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(
            f"{__doc__}\n  --config   {FLAGS['config'].help}\n  --workdir  {FLAGS['workdir'].help}"
        )
        return 0
    try:
        settings, members, workdir = read_command_line(argv)
        check_same_config(workdir, settings)
    except (
        Exception
    ) as error:  # whatever a config script or a flag raises is one line to its author
        return fail(error)
    print(f"lorax {__version__}: {plan(settings, members)}", flush=True)
    if finished(workdir):
        print(f"{workdir} is finished. Report: {workdir / 'report.html'}")
        return 0
    try:
        with locked(workdir):
            return run(settings, members, workdir)
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        return fail(error)
    except (OSError, MemoryError) as error:
        print(
            f"lorax: stopped: {error}. Mend that and run the same command to continue.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("lorax: stopped. Run the same command to continue.", file=sys.stderr)
        return 130


def read_command_line(argv: list[str]):
    """(config, members, run directory). Raises on anything wrong in the flags or the config."""
    for flag in argv[1:]:  # before ConfigDict does, whose errors lack the rest of the path
        if key := re.match(r"--?(?:no)?config\.([\w.]+)", flag):
            config.check_key(key[1])
    rest = FLAGS(argv)
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; did you mean --{rest[1].lstrip('-')}?")
    if FLAGS.config is None:
        raise ValueError("--config is missing, e.g. --config=configs/gpt2_rank_sweep.py")
    settings = FLAGS.config
    members = config.members(settings)
    if FLAGS.workdir:
        if Path(FLAGS.workdir).exists() and not Path(FLAGS.workdir).is_dir():
            raise ValueError(f"--workdir: {FLAGS.workdir} is a file; name a directory")
        return settings, members, Path(FLAGS.workdir)
    file, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    name = Path(file).stem + (f"-{argument}" if argument else "")
    overridden = config_flags.get_override_values(FLAGS["config"])
    suffix = f"-{config.digest(overridden)}" if overridden else ""
    return settings, members, Path("runs") / (name + suffix)


def plan(settings, members) -> str:
    """One line: how many members along which axes, on what."""
    sweep, ties = settings.sweep, settings.sweep.zip
    single = [a for a in config.AXES if sweep[a] and not any(a in tie for tie in ties)]
    axes = [f"{len(sweep[tie[0]])} points of ({', '.join(tie)})" for tie in ties]
    axes += [f"{axis} {_show(sweep[axis])}" for axis in single]
    swept = " x ".join(axes) or "one setting"
    plural = "s" * (len(members) > 1)
    methods = ", ".join(dict.fromkeys(sweep.method or [settings.method.name]))
    what = f"{methods} on {settings.base}, task {settings.task.name}"
    if settings.search.threshold:
        full, lora = (sum(m.config.method.name == n for m in members) for n in ("full", "lora"))
        most = config.most_members(settings, members)
        beside = f"; {full} of full fine-tuning" + f", {lora} of LoRA" * bool(lora)
        rounds = f", then up to {settings.search.rounds} x {most}" * bool(settings.search.rounds)
        swept, what = swept + beside, what + rounds
    return f"{len(members)} member{plural} ({swept}) of {what}"


def check_same_config(workdir: Path, settings) -> None:
    """Raises ValueError where the run directory holds a run of another config."""
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        stored = json.loads(file.read_text())["config"]
    except (ValueError, KeyError):
        raise ValueError(f"workdir: {file} is damaged; delete {workdir} to start anew") from None
    different = _differences(stored, json.loads(settings.to_json()))
    if different:
        raise ValueError(
            f"workdir: {workdir} holds a run of another config (it differs in "
            f"{', '.join(different)}); name another --workdir or delete it"
        )


def finished(workdir: Path) -> bool:
    """Whether status.json says that the run is done."""
    try:
        return json.loads((workdir / "status.json").read_text())["state"] == "finished"
    except (FileNotFoundError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def locked(workdir: Path):
    """Context in which no other process writes to the run directory. Raises BlockingIOError.

    A directory that nothing was written to does not stay.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"workdir: another process writes to {workdir}") from None
        try:
            yield
        finally:
            if [p.name for p in workdir.iterdir()] == [".lock"]:
                shutil.rmtree(workdir)


def formats(folder: Path) -> str:
    """In which format the members below a folder lie: PEFT's, or lorax's own, which PEFT can't
    read."""
    members = [path for path in folder.glob("*") if path.is_dir()]
    own = sum(not (path / "adapter_config.json").exists() for path in members)
    if not own:
        return "PEFT format"
    if own == len(members):
        return "lorax's own format"
    return f"PEFT format, but for {own} of {len(members)} in lorax's own alone"


def run(settings, members, workdir: Path) -> int:
    """Train, export, analyse, report; a search trains round after round."""
    began = time.monotonic()

    # Imported here: what is above answers at once.
    import jax

    from lorax import report, tensorboard
    from lorax.analysis import intrinsic
    from lorax.models import kernels
    from lorax.terminal import Screen
    from lorax.train import loop, sweep

    sweep.split_cpu()
    search, members = settings.search, list(members)

    # ------------------------------------------------------------------------------- what is run
    with Screen() as screen:
        loaded = loop.Loaded({}, {})
        groups = loop.prepare(members, screen.say, loaded=loaded)
        if search.threshold:
            loop.check_metric(groups, search.metric)
        base = groups[0].base
        versions = {
            name: _version(name) for name in ("lorax-research", "jax", "jaxlib", "flax", "optax")
        }
        devices, cores = jax.devices(), f"{platform.machine()}, {os.cpu_count()} cores"
        head = {
            "config": json.loads(settings.to_json()),
            "versions": versions | {"python": platform.python_version()},
            "device": f"{len(devices)} x {devices[0].device_kind} ({cores})",
            "git": _git_revision(),
            "base_sha256": base.sha256,
            "command": "python -m lorax.run " + shlex.join(sys.argv[1:]),
        }
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", head)
        elif read_json(workdir / "config.json")["base_sha256"] != head["base_sha256"]:
            raise ValueError(
                f"base: the weights of {base.name} are others than {workdir} began with; "
                f"name another --workdir"
            )
        previous = _seconds_so_far(workdir)
        wall = lambda: round(previous + time.monotonic() - began, 1)
        lines, rows, offset, started = [], {}, 0, 0

        # --------------------------------------------- train the sweep, then what a search asks for
        rounds = 1 + search.rounds * bool(search.threshold)
        most = config.most_members(settings, members) * settings.train.steps
        for number in range(rounds):
            lines += [row for group in groups for row in loop.describe(group)]
            lines.sort(key=lambda row: row["member"])
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_bytes(workdir / "members.jsonl", text.encode())
            loop.write_rankings(workdir, groups)
            status = {"state": "running", "members": _by_number(rows)}
            write_json(workdir / "status.json", status | {"wall_seconds": wall()})
            later = (rounds - 1 - number) * most
            terminal = screen.terminal(lines)
            fresh, offset = loop.train(workdir, groups, terminal, offset, started, later)
            rows, started, first = rows | fresh, loop.member_steps(members), groups[-1].index + 1
            status |= {"members": _by_number(rows)}
            write_json(workdir / "status.json", status | {"wall_seconds": wall()})
            if number + 1 < rounds:
                asked = _next_round(workdir, search, config.search_seeds(settings), screen.say)
                more = config.more_members(settings, members, asked)
                if not more:
                    screen.say("search: nothing is left to try")
                    break
                screen.say(f"search: round {number + 1} of {rounds - 1}, {len(more)} members")
                groups = loop.prepare(more, screen.say, first, loaded)
                members += more
        del groups, loaded
        status["state"] = "trained"
        write_json(workdir / "status.json", status | {"wall_seconds": wall()})

        # ------------------------------------------------------------------------------ analyse
        page = None
        screen.end_bar()
        _write_tables(workdir)
        if settings.analysis.report:
            screen.say("taking the updates apart and drawing the report")
            page = report.write(workdir, kernels(base))
        tensorboard.write(workdir)
        status["state"] = "finished"
        write_json(workdir / "status.json", status | {"wall_seconds": wall()})
        screen.table(lines, rows)
        if search.threshold:
            found = intrinsic.estimate(_points(workdir), search.threshold, search.metric)
            screen.dimensions(found)
    if page:
        print(f"\nReport       {page}\nFigures      {workdir / 'figures'}")
        print(f"Numbers      {workdir / 'analysis'}")
    print(f"Adapters     {workdir / 'adapters'} ({formats(workdir / 'adapters')})")
    print(f"TensorBoard  tensorboard --logdir {workdir / 'tb'}")
    return 0


def _write_tables(workdir: Path) -> None:
    """analysis/trajectory.csv and analysis/cka.csv, of what training has left of them."""
    from lorax.analysis import cka, runs, trajectory

    found = runs.load(workdir)
    for name, table in (("trajectory", trajectory.table(found)), ("cka", cka.table(found))):
        if table is not None:
            file = workdir / "analysis" / f"{name}.csv"
            write_bytes(file, table.to_csv(index=False).encode())


def _next_round(workdir: Path, search, seeds: tuple[int, ...], say) -> list[dict]:
    """What a search asks for next, of all that the run directory holds; says how far it is."""
    from lorax.analysis import intrinsic

    table = _points(workdir)
    for _, row in intrinsic.estimate(table, search.threshold, search.metric).iterrows():
        about = f"{row['condition']}: " if row["condition"] else ""
        say(f"search: {about}{intrinsic.headline(row)}")
    return intrinsic.refine(table, search.threshold, search.metric, search.points, seeds)


def _points(workdir: Path):
    """`intrinsic.points` of the run directory as it is."""
    from lorax.analysis import intrinsic, runs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a torn line of the round that is to be continued
        return intrinsic.points(runs.load(workdir))


def _by_number(rows: dict[int, dict]) -> dict[str, dict]:
    return {str(i): rows[i] for i in sorted(rows)}


def _show(values) -> str:
    return (
        "("
        + ", ".join("+".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
        + ")"
    )


def _differences(old, new, prefix="") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            d
            for k in keys
            for d in _differences(old.get(k), new.get(k), f"{prefix}.{k}".strip("."))
        ]
    return [] if old == new else [prefix]


def _seconds_so_far(workdir: Path) -> float:
    try:
        return json.loads((workdir / "status.json").read_text())["wall_seconds"]
    except (FileNotFoundError, ValueError, KeyError):
        return 0.0


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Revision of the source tree that lorax runs from, with "+" where it has changes."""
    here = Path(__file__).parent
    ask = lambda *words: subprocess.run(
        ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    try:
        return ask("rev-parse", "HEAD") + "+" * bool(ask("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
