"""Run a sweep on many machines: its parts are trained by workers and merged into one run directory.

    python -m lorax.launch --config=configs/gpt2_rank_sweep.py --on=local --workers=4
    python -m lorax.launch --config=configs/gpt2_rank_sweep.py --on=slurm --help

--on names the engine that starts the workers: local (this machine), slurm or ray. Everything else
is as for lorax.run: the run directory has the members, metrics and adapters that one machine would
have written, bit for bit, and its report is drawn once. Repeating the command continues it.
"""

ENGINES = ("local", "slurm", "ray")
