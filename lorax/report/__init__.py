"""What a run has learned, as one page to look at: python -m lorax.report RUN [RUN...]"""

from lorax.report.pages.one_run import write

__all__ = ["write"]
