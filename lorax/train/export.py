"""What a member has learned, as files."""

from pathlib import Path

from lorax import adapters, methods, peft_methods, states, tasks
from lorax.config import Member
from lorax.interop import peft
from lorax.models import Base


def export(
    directory: Path, member: Member, method, trainable, constants, base: Base, task: tasks.Task
) -> str:
    """Write what one member has learned; "", or why PEFT can't read it.

    An update of low rank becomes a LoRA adapter in PEFT's format. Any other method leaves its
    arrays in lorax's own format (`lorax.states`); beside them, where PEFT has the method, its files
    of it.
    """
    state = methods.State(trainable, constants)
    why = ""
    if method.factors is not None:
        adapter = adapters.exported(method, state, base)
        # PEFT takes the whole head from a classifier's adapter: only one that has it is called so.
        classifier = "SEQ_CLS" if any(p.startswith("head/") for p in adapter.weights) else None
        kind = classifier if task.outputs else "CAUSAL_LM"
        if task.kind.reads != "tokens":
            kind = None  # it has no word for models that read no text
        try:
            peft.save(
                directory,
                adapter,
                base.sources,
                member.config.base,
                dropout=method.hp.get("dropout", 0.0),
                task_type=kind,
            )
            return ""
        except OSError:  # the disk's, and no peculiarity of the method
            raise
        except Exception as error:  # what was learned is kept all the same
            why = _reason(error)
    states.save(directory, method, state, base)
    if method.factors is None:
        try:
            peft_methods.save(directory, method, state, base, member.config.base)
        except OSError:
            raise
        except Exception as error:
            why = _reason(error)
    return why


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)
