"""PEFT's words for the kind of model that an adapter is for: CAUSAL_LM, SEQ_CLS or none."""

from collections.abc import Iterable

from lorax.models import Base


def check_task(base: Base, task_type: str | None, where: str = "") -> None:
    """Raises ValueError, which begins with `where`, for a task type of PEFT whose head the base
    lacks. None, and features without a head, fit every base."""
    known = ["FEATURE_EXTRACTION"]
    if base.causal:
        known.append("CAUSAL_LM")
    elif base.traits.outputs is not None:
        known.append("SEQ_CLS")
    if task_type is not None and task_type not in known:
        raise ValueError(
            f"{where}task_type {task_type!r}: {base.name} is no model with such a head; adapters "
            f"for it have {' or '.join(known[::-1])}, or null"
        )


def task_type(base: Base, trained_whole: Iterable[str]) -> str | None:
    """PEFT's task type of a base's adapter, given the parameters that were trained in full.

    PEFT reads the whole head from a classifier's adapter, so only an adapter with the head is
    SEQ_CLS. There is no task type for models that don't read text.
    """
    if base.causal:
        return "CAUSAL_LM"
    classifier = any(name.startswith("head/") for name in trained_whole)
    return "SEQ_CLS" if classifier and base.input_shape is None else None
