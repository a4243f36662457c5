"""Images that trained diffusion models make (`eval.samples`), and their scores."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorax import rundir, sampling, tasks
from lorax.models import Base
from lorax.progress import telling


def check(base: Base, task: tasks.Task, c, say: Callable[[str], None]) -> None:
    """Raises ValueError if members can't make the images that the config asks for; says so where
    the task has none. c: the config's `eval` section."""
    if not c.samples:
        return
    if task.pictures is None:
        say(f"eval.samples: {c.samples} given, but task {task.name} has no images to make")
        return
    try:
        of_task = task.pictures.schedule, task.pictures.none
        sampling.check(base, c.sample_steps, c.guidance, *of_task)
    except ValueError as error:
        raise ValueError(f"eval.samples: {error}") from None


def write(file: Path, base: Base, task: tasks.Task, c, params, say) -> dict[str, float]:
    """Make the images that the config asks for, the same noise for everyone, and write them;
    {metric: value}. c: the config's `eval` section. say: prints a line."""
    of = task.pictures
    index = np.repeat(np.arange(len(of.asked)), c.samples)
    asked = np.array(of.asked)[index]
    images = sampling.sample(
        base, of.conditions[index], params, schedule=of.schedule, steps=c.sample_steps,
        guidance=c.guidance, none=of.none, batch_size=c.batch_size,
        progress=telling(say, "images"),
    )  # fmt: skip
    rundir.write_samples(file, images, asked)
    return {name: round(value, 5) for name, value in of.score(images, asked).items()}
