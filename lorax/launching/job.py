"""A part as a job of submitit, which calls it on a machine of the cluster."""

import contextlib
from pathlib import Path

from submitit.helpers import Checkpointable

from lorax.launching import state


class Job(Checkpointable):
    """Trains the part. When the job is preempted or its time is over, submitit requeues it as it
    is: the next start goes on from the part's checkpoint.

    log: whether what it prints goes to the part's worker.log.
    """

    def __init__(self, part: Path, log: bool):
        self.part, self.log = part, log

    def __call__(self) -> None:
        from lorax.launching import worker  # imports JAX

        with state.logged(self.part) if self.log else contextlib.nullcontext():
            worker.run(self.part)
