"""Reads a command line: the config, its members and the run directory."""

import ast
import contextlib
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from lorax import config, halving, outside, run_names, search
from lorax.errors import reason
from lorax.files import read_text

#: Not absl's global flags: a program that imports lorax may define flags with the same names.
FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file(
    "config", None, "The study: FILE or FILE:ARGUMENT.", flag_values=FLAGS
)
flags.DEFINE_string(
    "workdir",
    None,
    "Run directory (default: runs/<config>[-<the keys that are set>]).",
    flag_values=FLAGS,
)


def read(argv: list[str]) -> tuple[ConfigDict, list[config.Member], Path]:
    """(config, members, run directory). `--config.KEY=None` sets a key that may be None, which
    ml_collections can't. Raises for any mistake in the flags or the config."""
    argv, unset = _without_nones(argv)
    script = re.search(r"\0--?config[=\0]([^:\0]+)", "\0".join(["", *argv[1:]]))
    if script:
        outside.reach(script[1])
    try:
        with _as_sys_argv(argv):
            rest = FLAGS(argv)
        settings = FLAGS.config
        if failure := getattr(settings, "__dict__", {}).get("_error"):
            raise failure  # an OSError, which ml_collections does not raise
    except Exception as error:
        place, text = in_script(error)
        if not place:  # a flag is wrong, not the script; ConfigDict's error lacks the flag's path
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
            f"lorax.config.default() returns, with your changes"
        )
    if argument and ignores_argument(file):
        raise ValueError(
            f"--config={file}:{argument}: the script ignores {argument!r}; expected --config={file}"
        )
    given = config_flags.get_override_values(FLAGS["config"])
    if twice := next((key for key in unset if key in given), None):
        raise ValueError(f"--config.{twice}: {given[twice]!r} and None given, must be one of them")
    settings.update_from_flattened_dict(dict.fromkeys(unset))
    members = search.members(settings)
    if FLAGS.workdir:
        return settings, members, Path(FLAGS.workdir)
    given |= dict.fromkeys(unset)
    return settings, members, run_names.workdir(Path(file).stem, argument, given)


def _without_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the arguments that don't set a key to None, the keys that the others do)."""
    kept, unset = [], []
    for flag in argv:
        key = re.fullmatch(r"--?config\.([\w.]+)=None", flag)
        if key and config.may_be_none(key[1]):
            unset.append(key[1])
        else:
            kept.append(flag)
    return kept, unset


@contextlib.contextmanager
def _as_sys_argv(argv: list[str]):
    """Context in which these are the words of `sys.argv`, where ml_collections looks for keys."""
    kept, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = kept


def check_flags(argv: list[str]) -> None:
    """Raises ValueError for a flag whose key the config does not have."""
    for flag in argv[1:]:
        if key := re.match(r"--?(?:no)?config\.([\w.]+)", flag):
            config.check_key(key[1])


def in_script(error: BaseException) -> tuple[str, str]:
    """("FILE:LINE: " of the config script's line that failed, "" if none did; what is wrong)."""
    installed = sysconfig.get_paths()
    others = [installed[name] for name in ("stdlib", "purelib", "platlib")]
    others.append(str(Path(__file__).parent))
    place, deepest = "", error
    while error is not None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename[0] != "<"]
        names = [frame.filename for frame in frames]
        below = [i for i, name in enumerate(names) if "ml_collections" in Path(name).parts]
        in_user_code = [
            frame
            for frame in frames[min(below, default=len(frames)) :]
            if not any(frame.filename.startswith(folder + os.sep) for folder in others)
        ]
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}:{error.lineno}: ", error.msg
        if in_user_code or "Traceback" in str(deepest):
            last = in_user_code[-1:]
            place = "".join(f"{frame.filename}:{frame.lineno}: " for frame in last)
            deepest = error
        error = error.__cause__ or error.__context__
    # ConfigDict lists all its keys before the nearest one.
    text = re.sub(r' Other fields present: "\{.*\}"', "", reason(deepest))
    return place, text.replace("config_config", "--config")


def ignores_argument(file: str) -> bool:
    """Whether a config script's get_config never reads its argument."""
    for node in ast.parse(read_text(file)).body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_config":
            arguments = [*node.args.posonlyargs, *node.args.args][:1]
            read = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            return bool(arguments) and arguments[0].arg not in read
    return False


def summary(settings: ConfigDict, members: list[config.Member]) -> str:
    """A line: the number of members, the axes, the base and task, and why there are groups; and one
    on what tuning an axis costs."""
    swept, ties = config.swept(settings.sweep), settings.sweep.zip
    ties = [tuple(map(config.axis_of, tie)) for tie in ties]
    single = [axis for axis in swept if not any(axis in tie for tie in ties)]
    axes = [f"{len(swept[tie[0]])} points of ({', '.join(tie)})" for tie in ties]
    axes += [f"{axis} {_show(swept[axis])}" for axis in single]
    product = " x ".join(axes) or "one setting"
    plural = "s" * (len(members) > 1)
    methods = ", ".join(dict.fromkeys(swept.get("method", [settings.method.name])))
    trained = f"{methods} on {settings.base}, task {settings.task.name}"
    if settings.search.threshold:
        full, lora = (sum(m.config.method.name == n for m in members) for n in ("full", "lora"))
        most = search.most_members(settings, members)
        compared = f"; {full} of full fine-tuning" + f", {lora} of LoRA" * bool(lora)
        rounds = f", then up to {settings.search.rounds} x {most}" * bool(settings.search.rounds)
        product, trained = product + compared, trained + rounds
    elif settings.sweep.full_lr:
        product += f"; {sum(m.config.method.name == 'full' for m in members)} of full fine-tuning"
    race = halving.race(settings, members)
    tuned = f"\n{halving.budget(race)}" if race else ""
    return f"{len(members)} member{plural} ({product}) of {trained}{_groups(members)}{tuned}"


def _groups(members) -> str:
    """ ", in 2 groups: train.warmup differs"; "" if all members can share a program."""
    groups = config.grouped(members)
    if len(groups) == 1:
        return ""
    keys = config.differences(groups)
    verb = "differs" if len(keys) == 1 else "differ"
    return f", in {len(groups)} groups: {' and '.join(keys)} {verb}"


def _show(values) -> str:
    return (
        "("
        + ", ".join("+".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
        + ")"
    )
