"""LoRA under Adam: four hyperparameters, or two?"""

from pathlib import Path

from experiments.verdicts import (
    CONTRADICTED,
    REPRODUCED,
    Verdict,
    complete,
    copied,
    numbers,
)

CLAIM = "under Adam alpha, A's start and two learning rates are two quantities"
SOURCE = "Thinking Machines 2025"
RULE = """\
Five pairs (p, q) of powers of two, for which all products are exact: reproduced if every loss of
every step and every entry of dW is the same to the bit in all seeds, contradicted if one is not.
Five other pairs: reproduced if dW differs at most twice as much, in the worst of the runs, as it
does in the worst seed when A's start is off in its last bit."""
BASES = ("gpt2-nano", "stories-llama-260k")
COMMANDS = dict.fromkeys(BASES, ("python -m experiments.adam_invariance.run",))
MINUTES = dict.fromkeys(BASES, 15)
PARTS = ("powers of two: to the bit", "other numbers: to rounding")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "numbers.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "numbers.csv").groupby("base", sort=False):
        worst = table.groupby("what")[["loss_difference", "update_difference"]].max()
        exact = worst.loc["powers of two"].max()
        count = (table["what"] == "powers of two").sum()
        other, last_bit = (
            worst.loc[what, "update_difference"] for what in ("other numbers", "A off by 1 in 2^23")
        )
        verdict = REPRODUCED if exact == 0 else CONTRADICTED
        found.append(Verdict(PARTS[0], base, verdict, f"{exact:g} in {count} runs"))
        verdict = REPRODUCED if other <= 2 * last_bit else CONTRADICTED
        number = f"{other:.1e} of dW; last bit: {last_bit:.1e}"
        found.append(Verdict(PARTS[1], base, verdict, number))
    return complete(found, PARTS)
