"""What one does with an adapter, as commands that run as they are."""

import pathlib
import shlex
from collections.abc import Sequence

from lorax import catalogue, rundir
from lorax.analysis import runs
from lorax.files import read_json
from lorax.interop import peft, reading

PROMPT = "Once upon a time"  # if the run has no completed prompts
#: Tasks of classifiers, which complete no prompts.
LABELS = ("glue", "mnist", "digits", "planted")

SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM
{imports}
model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {adapter!r})
"""


def commands(run: runs.Run, adapters: Sequence[str]) -> dict[str, str]:
    """Commands for the first of the adapters (folders relative to the run): "show", "merge" and
    "generate" for the shell, "peft" for Python. Those that its method, base or task can't have are
    left out; {} without adapters."""
    config = run.config.get("config", {})
    base, task = config.get("base"), config.get("task") or {}
    if not adapters or not isinstance(base, str):
        return {}
    member = int(pathlib.PurePath(adapters[0]).name)
    folder = run.directory / adapters[0]
    own = run.members.loc[member]
    base = own.get("base") if isinstance(own.get("base"), str) else base
    if own["method"] not in catalogue.ROWS or not _is_found(base):
        return {}
    path, merged = shlex.quote(str(folder)), shlex.quote(f"{run.directory / 'merged'}-{member}")
    named = shlex.quote(base)
    found = {}
    if reading.is_here(folder):
        found["show"] = f"python -m lorax.convert show {path}"
        found["merge"] = f"python -m lorax.convert merge {named} {path} {merged}"
    name = task.get("name") if isinstance(task, dict) else task
    if name not in LABELS and not str(name).partition(":")[0].endswith(".py"):
        prompt = shlex.quote(_prompt(run, member))
        found["generate"] = (
            f"python -m lorax.generate --base {named} --adapter {path} --prompt {prompt}"
        )
    if (folder / peft.CONFIG).exists():
        if read_json(folder / peft.CONFIG).get("task_type") == "CAUSAL_LM":
            found["peft"] = _snippet(base, folder)
    return found


def _is_found(base: str) -> bool:
    """Whether a base is found by its name alone: it is no function, and has no random weights."""
    return not base.startswith("random:") and not base.partition(":")[0].endswith(".py")


def _snippet(base: str, folder: pathlib.Path) -> str:
    """Python that loads the adapter with PEFT. A shipped base is in a folder of lorax."""
    shipped = (pathlib.Path(rundir.__file__).parent / "assets" / base).is_dir()
    imports = "\nfrom lorax.models import directories\n" if shipped else ""
    named = f"directories.find({base!r})" if shipped else repr(base)
    return SNIPPET.format(imports=imports, base=named, adapter=str(folder))


def _prompt(run: runs.Run, member: int) -> str:
    """The first prompt that the member completed after training, else any."""
    try:
        completed = run.texts(member)
    except (OSError, ValueError):  # a damaged file
        completed = []
    return str(completed[0]["prompt"]) if completed else PROMPT
