"""The report: one page on runs or adapters. python -m lorax.report RUN [RUN...]"""

from lorax import outside
from lorax.callable import make_callable
from lorax.report.pages.one_run import write

__all__ = ["draw", "write"]


def draw(*inputs, base=None, out=None, alpha=None, layers=None, also=(), share=None, figures=()):
    """Write the report of runs or adapters, as `python -m lorax.report` does. Returns its path.

    inputs: a run (loaded, or its directory), several runs to compare, or adapters; also
    as one list. base, out, alpha, layers: as on the command line. also: statistics of every update,
    as functions or "FILE.py:function". share: a file to hand on, which is written instead. figures:
    formats of images that are drawn as well, such as ("png", "pdf"). Raises FileNotFoundError or
    ValueError that says what was given and what is expected.
    """
    from lorax.report import __main__ as command  # it imports this module

    if len(inputs) == 1 and isinstance(inputs[0], list | tuple):
        (inputs,) = inputs
    names = [str(getattr(source, "directory", source)) for source in inputs]
    if not names:
        raise ValueError("lorax.report: nothing given; expected runs or adapters")
    spelled = outside.spell(tuple(also), "also")
    return command.write(names, base, out, alpha, layers, spelled, share, figures)


make_callable(__name__, draw)
