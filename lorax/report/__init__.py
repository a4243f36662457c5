"""The report: one page on runs or adapters. python -m lorax.report RUN [RUN...]"""

from lorax import outside
from lorax.callable import make_callable
from lorax.report.pages.one_run import write

__all__ = ["draw", "write"]


def draw(*what, base=None, out=None, alpha=None, layers=None, also=()):
    """Draw the report of runs or adapters, as `python -m lorax.report` does; the path of its page.

    what: a run (loaded, or its directory), several runs to compare, or one adapter or two; also as
    one list. base, out, alpha, layers: as on the command line. also: statistics of every update,
    functions or "FILE.py:function". Raises FileNotFoundError or
    ValueError that names what was given and what would be right.
    """
    from lorax.report import __main__ as command  # which imports this

    if len(what) == 1 and isinstance(what[0], list | tuple):
        (what,) = what
    names = [str(getattr(one, "directory", one)) for one in what]
    if not names:
        raise ValueError("lorax.report: nothing given; expected runs, or one adapter or two")
    return command.write(names, base, out, alpha, layers, outside.spell(tuple(also), "also"))


make_callable(__name__, draw)
