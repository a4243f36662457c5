"""Run a sweep: config -> run directory with metrics, adapters, analysis and a report.

    python -m lorax.run --config=configs/gpt2_rank_sweep.py
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.sweep.rank="(1, 4, 16)" \\
        --config.train.steps=50
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.task.name=e2e \\
        --config.task.path=e2e-dataset.zip
    python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.method.targets="('attention',)"

Any key of the config can be set so; lorax/config.py lists them all, lorax/catalogue.py those of the
methods. The same command again resumes an unfinished run where its last checkpoint was, and leaves
a finished one alone.

With `config.search.threshold` (0.9 for d90) the run looks for the intrinsic dimension: it trains
`config.sweep.dim` beside full fine-tuning, then round after round of what lies between.
"""

import ast
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from lorax import __version__, catalogue, config, memory, outside, rundir, search
from lorax.errors import fail, of_machine, reason
from lorax.files import read_json, read_text, write_bytes

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The study: FILE or FILE:ARGUMENT.")
flags.DEFINE_string(
    "workdir", None, "Run directory (default: runs/<config>[-<hash of overrides>])."
)


def main(argv: list[str]) -> int:
    """The command line. Exit code 0; 1 for a failure under way; 2 for a mistake in the input."""
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(__doc__)
        for name in ("config", "workdir"):
            print(f"  --{name:8s} {FLAGS[name].help}")
        for name, key in catalogue.keys().items():
            usual = "" if key.default is None else f" (default: {key.default})"
            print(f"  --config.method.{name:15s} {key.help}{usual}")
        return 0
    try:
        settings, members, workdir = read_command_line(argv)
        rundir.check_paths(workdir)
        changed = check_same_config(workdir, settings)
    except (
        Exception
    ) as error:  # whatever a config script or a flag raises is one line to its author
        return fail(error)
    print(f"lorax {__version__}: {plan(settings, members)}", flush=True)
    if rundir.has_finished(workdir) and not changed:
        print(f"{workdir} is finished. Report: {workdir / rundir.REPORT}")
        return 0
    try:
        with rundir.locked(workdir), rundir.recorded(workdir):
            return run(settings, members, workdir)
    except KeyboardInterrupt:
        print("lorax: stopped. Run the same command to continue.", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        return fail(error)
    except Exception as error:
        if not of_machine(error):
            raise
        line = (
            f"stopped: {reason(of_machine(error))}. Mend that and run the same command to continue."
        )
        print(f"lorax: {line}", file=sys.stderr)
        return 1


def read_command_line(argv: list[str]):
    """(config, members, run directory). Raises on anything wrong in the flags or the config."""
    script = re.search(r"\0--?config[=\0]([^:\0]+)", "\0".join(["", *argv[1:]]))
    if script:
        outside.reach(script[1])
    try:
        rest = FLAGS(argv)
        settings = FLAGS.config
        if failure := getattr(settings, "__dict__", {}).get("_error"):
            raise failure  # an OSError, which ml_collections keeps to itself
    except Exception as error:
        place, text = in_script(error)
        if not place:  # the script is right: ConfigDict's errors lack the rest of a flag's path
            check_flags(argv)
        raise ValueError(place + text) from error
    check_flags(argv)
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}; did you mean --{rest[1].lstrip('-')}?")
    if not FLAGS["config"].present:
        raise ValueError("--config is missing, e.g. --config=configs/gpt2_rank_sweep.py")
    file, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    if not isinstance(settings, ConfigDict):
        raise ValueError(
            f"{file}: get_config returns {type(settings).__name__}; expected the ConfigDict that "
            f"lorax.config.default() gives, changed"
        )
    if argument and ignores_argument(file):
        raise ValueError(
            f"--config={file}:{argument}: the script makes nothing of {argument!r}; expected "
            f"--config={file}"
        )
    members = search.members(settings)
    if FLAGS.workdir:
        return settings, members, Path(FLAGS.workdir)
    name = Path(file).stem + (f"-{argument}" if argument else "")
    overridden = config_flags.get_override_values(FLAGS["config"])
    suffix = f"-{config.digest(overridden)}" if overridden else ""
    return settings, members, Path("runs") / (name + suffix)


def check_flags(argv: list[str]) -> None:
    """Raises ValueError for a flag of a key that the config does not have."""
    for flag in argv[1:]:
        if key := re.match(r"--?(?:no)?config\.([\w.]+)", flag):
            config.check_key(key[1])


def in_script(error: BaseException) -> tuple[str, str]:
    """(FILE:LINE of a config script where it fails, "" where it does not, what went wrong)."""
    installed = sysconfig.get_paths()
    others = [installed[name] for name in ("stdlib", "purelib", "platlib")]
    others.append(str(Path(__file__).parent))
    place, deepest = "", error
    while error is not None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[0] != "<"]
        names = [frame.filename for frame in frames]
        below = [i for i, name in enumerate(names) if "ml_collections" in Path(name).parts]
        own = [
            frame
            for frame in frames[min(below, default=len(frames)) :]
            if not any(frame.filename.startswith(folder + os.sep) for folder in others)
        ]
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}: ", error.msg
        if own or "Traceback" in str(deepest):
            place = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
            deepest = error
        error = error.__cause__ or error.__context__
    # ConfigDict lists all its keys before it says which is near.
    text = re.sub(r' Other fields present: "\{.*\}"', "", reason(deepest))
    return place, text.replace("config_config", "--config")


def ignores_argument(file: str) -> bool:
    """Whether a config script's get_config never looks at its argument."""
    for node in ast.parse(read_text(file)).body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config":
            given = [*node.args.posonlyargs, *node.args.args][:1]
            read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            return bool(given) and given[0].arg not in read
    return False


def plan(settings, members) -> str:
    """One line: how many members along which axes, on what, and why there are several groups."""
    swept, ties = config.swept(settings.sweep), settings.sweep.zip
    ties = [tuple(map(config.axis_of, tie)) for tie in ties]
    single = [axis for axis in swept if not any(axis in tie for tie in ties)]
    axes = [f"{len(swept[tie[0]])} points of ({', '.join(tie)})" for tie in ties]
    axes += [f"{axis} {_show(swept[axis])}" for axis in single]
    product = " x ".join(axes) or "one setting"
    plural = "s" * (len(members) > 1)
    methods = ", ".join(dict.fromkeys(swept.get("method", [settings.method.name])))
    what = f"{methods} on {settings.base}, task {settings.task.name}"
    if settings.search.threshold:
        full, lora = (sum(m.config.method.name == n for m in members) for n in ("full", "lora"))
        most = search.most_members(settings, members)
        beside = f"; {full} of full fine-tuning" + f", {lora} of LoRA" * bool(lora)
        rounds = f", then up to {settings.search.rounds} x {most}" * bool(settings.search.rounds)
        product, what = product + beside, what + rounds
    return f"{len(members)} member{plural} ({product}) of {what}{_groups(members)}"


def _groups(members) -> str:
    """ ", in 2 groups: train.warmup differs"; "" where all members can share a program."""
    groups = config.grouped(members)
    if len(groups) == 1:
        return ""
    keys = config.differences(groups)
    verb = "differs" if len(keys) == 1 else "differ"
    return f", in {len(groups)} groups: {' and '.join(keys)} {verb}"


def check_same_config(workdir: Path, settings) -> list[str]:
    """The keys of `config.REVISABLE` in which the run that the directory holds differs.

    Raises ValueError where it is a run of another config, and where it has nothing left to make
    something else of.
    """
    file = workdir / rundir.CONFIG
    if not file.exists():
        return []
    try:
        stored = read_json(file)["config"]
    except (ValueError, KeyError):
        raise ValueError(f"workdir: {file} is damaged; delete {workdir} to start anew") from None
    different = _differences(stored, json.loads(settings.to_json()))
    others = [key for key in different if key not in config.REVISABLE]
    if others and rundir.has_begun(workdir):
        raise ValueError(
            f"workdir: {workdir} holds a run of another config (it differs in "
            f"{', '.join(others)}); name another --workdir or delete it"
        )
    if different and rundir.has_finished(workdir) and not (workdir / rundir.CHECKPOINTS).exists():
        raise ValueError(
            f"workdir: {workdir} holds a finished run with other {', '.join(different)}, and its "
            f"checkpoints are gone; name another --workdir"
        )
    return different


def check_disk(workdir: Path, groups) -> None:
    """Raises ValueError where checkpoints and adapters of the groups have no room on the disk."""
    from lorax import tree

    states = [tree.nbytes(group.stack.state) for group in groups]
    learned = [tree.nbytes(group.stack.state.trainable) for group in groups]
    # Two checkpoints of each group stay, while one is being written.
    needs = sum(learned) + 2 * sum(states) + max(states)
    there = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    free = shutil.disk_usage(workdir).free
    if needs > free + there:
        count = sum(len(group.stack.members) for group in groups)
        raise ValueError(
            f"--workdir: {workdir} needs {needs / 1e9:.2f} GB for checkpoints and adapters of "
            f"{count} members, and {(free + there) / 1e9:.2f} GB are free there; name another "
            f"--workdir, or train fewer members in one run"
        )


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
    memory.check()

    # Imported here: what is above answers at once.
    import jax

    from lorax import tensorboard
    from lorax.models import kernels
    from lorax.terminal import Screen
    from lorax.train import layouts, loop, prepare

    layouts.split_cpu()
    members = list(members)

    # ------------------------------------------------------------------------------- what is run
    with Screen() as screen:
        loaded = prepare.Loaded({}, {})
        groups = prepare.groups(members, screen.say, loaded=loaded)
        if settings.search.threshold:
            prepare.check_metric(groups, settings.search.metric)
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
        check_disk(workdir, groups)
        begun = rundir.read_config(workdir) if rundir.has_begun(workdir) else head
        if begun["base_sha256"] != head["base_sha256"]:
            raise ValueError(
                f"base: the weights of {base.name} are others than {workdir} began with; "
                f"name another --workdir"
            )
        if begun is head or begun["config"] != head["config"]:  # in what may change alone
            now = {key: head[key] for key in ("config", "command")}
            rundir.write_config(workdir, begun | now)
        previous = rundir.read_status(workdir).get("wall_seconds", 0.0)
        wall = lambda: round(previous + time.monotonic() - began, 1)
        lines, rows, offset, started = [], {}, 0, 0
        failed, events = {}, tensorboard.Events(workdir)
        record = lambda state: rundir.write_status(workdir, state, rows, wall(), failed)

        def attempt(what, work):
            """work(), or None where it fails, which is said and stands in status.json."""
            try:
                return work()
            except Exception as error:
                failed[what] = reason(error)
                screen.say(f"{what}: {rundir.keep_error(workdir, error)}")

        def progress(done, total):
            screen.progress(done, total)
            if "TensorBoard" not in failed:
                attempt("TensorBoard", events.update)

        # --------------------------------------------- train the sweep, then what a search asks for
        rounds = search.rounds(settings)
        most = search.most_members(settings, members) * settings.train.steps
        for number in range(rounds):
            lines += [row for group in groups for row in prepare.describe(group)]
            lines.sort(key=lambda row: row["member"])
            rundir.write_members(workdir, lines)
            loop.write_rankings(workdir, groups)
            record("running")
            later = (rounds - 1 - number) * most
            terminal = screen.terminal(lines)._replace(progress=progress)
            fresh, offset = loop.train(workdir, groups, terminal, offset, started, later)
            rows, started, first = rows | fresh, loop.member_steps(members), groups[-1].index + 1
            record("running")
            if number + 1 < rounds:
                more = search.next_round(settings, members, workdir, screen.say)
                if not more:
                    screen.say("search: nothing is left to try")
                    break
                screen.say(f"search: round {number + 1} of {rounds - 1}, {len(more)} members")
                groups = prepare.groups(more, screen.say, first, loaded)
                members += more
        del groups, loaded
        record("trained")

        # ------------------------------- analyse: what fails here costs nothing of what was trained
        for member, row in rows.items():
            failed |= {
                f"{key} of member {member}": why for key, why in row.get("failed", {}).items()
            }
        page = None
        screen.end_bar()
        attempt("tables", lambda: _write_tables(workdir))
        if settings.analysis.report:
            screen.say("taking the updates apart and drawing the report")
            page = attempt("report", lambda: _report(workdir, kernels(base), screen.say))
        attempt("TensorBoard", events.finish)
        record("trained" if failed else "finished")
        screen.table(lines, rows)
        if settings.search.threshold:
            attempt("dimensions", lambda: screen.dimensions(search.estimate(settings, workdir)))
    if page:
        print(f"\nReport       {page}\nFigures      {workdir / rundir.FIGURES}")
        print(f"Numbers      {workdir / rundir.ANALYSIS}")
    adapters = workdir / rundir.ADAPTERS
    print(f"Adapters     {adapters} ({formats(adapters)})")
    print(f"TensorBoard  tensorboard --logdir {workdir / rundir.TENSORBOARD}")
    if failed:
        print(
            f"lorax: all members are trained, but {', '.join(failed)} failed; run the same command "
            f"to do that again, or python -m lorax.report {workdir} to draw the report alone",
            file=sys.stderr,
        )
        return 1
    return 0


def _report(workdir: Path, kernels, say) -> Path:
    """The path of the report. A section that fails is a line on the screen and in its place, and
    does not fail the run."""
    from lorax import report

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"report: {message}")
        return report.write(workdir, kernels)


def _write_tables(workdir: Path) -> None:
    """analysis/trajectory.csv and analysis/cka.csv, of what training has left of them."""
    from lorax.analysis import runs, tables

    found = runs.load(workdir)
    for name, table in (("trajectory", tables.trajectory(found)), ("cka", tables.cka(found))):
        file = rundir.table(workdir, name)
        if table is None:
            file.unlink(missing_ok=True)  # of an analysis that is no longer asked for
        else:
            write_bytes(file, table.to_csv(index=False).encode())


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
    blank = (None, [])  # a key that one of the two does not have, and its default
    return [] if old == new or (old in blank and new in blank) else [prefix]


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
