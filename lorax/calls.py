"""How many steps one call of the compiled program makes."""

STEPS_PER_CALL = 10


def steps_per_call(every: int, offload: str | None = None) -> int:
    """Optimiser steps in one call: the largest divisor of `eval.every` up to `STEPS_PER_CALL`; one
    with `train.offload`, which moves the optimiser's state between steps.

    Several steps per call save overhead, which matters for small models.
    """
    return 1 if offload else max(k for k in range(1, STEPS_PER_CALL + 1) if every % k == 0)
