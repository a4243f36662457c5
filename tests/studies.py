"""Trains the studies that the documentation names, made small; a process of test_docs.py.

Reads a command's arguments (a JSON list) a line and answers with a line, [exit code, output]. All
is imported before JAX starts, and each study runs in a fork: a third of its time was importing.
"""

import json
import os
import sys
import tempfile
import traceback

from lorax import command_line, config, rounds, run, rundir  # noqa: F401  (rounds imports JAX)


def smaller(settings, given: set[str]) -> None:
    """Two steps of two values of each axis. given: the keys that the command sets; with any of
    them, what the study trains and writes beside its sweep is left to the command without."""
    epochs = 0.01 * bool(settings.train.epochs)  # two steps of 800 rows
    steps = 0 if epochs else 4 if settings.sweep.tune else 2
    settings.train.update(steps=steps, epochs=epochs, warmup=0, batch_size=4)
    settings.eval.update(every=2, examples=8, test=8, batch_size=8)
    settings.eval.generate = min(settings.eval.generate, 2)
    settings.analysis.report = False
    if settings.task.name == "restaurants" and settings.task.n_train is None:
        settings.task.n_train = 32  # the other 12,000 are not tokenised
    if given - {"workdir"}:
        settings.eval.generate *= "eval.generate" in given
        settings.sweep.full_lr = settings.sweep.full_lr if "sweep.full_lr" in given else ()
    for axis, values in settings.sweep.items():
        if axis not in config.NO_AXES:
            settings.sweep[axis] = tuple(values[:2])
    for axis in ("steps", "batch_size"):
        settings.sweep[axis] = tuple(4 for _ in settings.sweep[axis][:1])


def study(argv: list[str]) -> int:
    """The exit code of one."""
    try:
        sys.argv = argv  # where ml_collections looks
        settings, _, workdir = command_line.read(argv)
        with settings.unlocked():
            smaller(
                settings, {word.partition("=")[0].partition(".")[2] for word in argv[2:]} - {""}
            )
        run.run(settings, workdir)
        return 0 if rundir.has_finished(workdir) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def answer(argv: list[str]) -> list:
    """[exit code, output] of a study in a process of its own."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            os._exit(study(argv))
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return [os.waitstatus_to_exitcode(status), said.read()]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(["lorax", *json.loads(line)])), flush=True)
