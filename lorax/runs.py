"""`python -m lorax.runs` lists runs (`lorax.listing`); in Python `lorax.runs` is
`lorax.analysis.runs`, also after `import lorax.runs`."""

import importlib
import sys

if __name__ == "__main__":
    from lorax import listing

    sys.exit(listing.main(sys.argv[1:]))

sys.modules[__name__] = importlib.import_module("lorax.analysis.runs")
