"""Merge and unmerge: what is lost of the weights?"""

from pathlib import Path

from experiments.verdicts import CONTRADICTED, REPRODUCED, Verdict, complete, copied, numbers

CLAIM = "merging and unmerging is exact to rounding for additive methods, not for DoRA and (IA)3"
SOURCE = "PEFT's documentation"
RULE = """\
A unit is the rounding of the largest of |w|, |merged w| and |dW| at a place. Additive methods come
back if the largest error of any seed, dtype and method, after one merge and after a hundred, is at
most 1 unit (two roundings explain that), and do not if it is more. DoRA and (IA)3 do not come back
by their formulas in float32 if the largest error after a hundred is above 1 unit in every seed."""
BASES = ("gpt2-nano", "stories-llama-260k")
COMMANDS = dict.fromkeys(BASES, ("python -m experiments.merge_unmerge.run",))
MINUTES = dict.fromkeys(BASES, 5)
ADDITIVE, OTHERS = ("lora", "rslora", "loha", "lokr", "vera"), {"dora": "DoRA", "ia3": "(IA)3"}
PARTS = ("additive methods: within a unit of rounding", "DoRA and (IA)3: not, in float32")


def collect(runs: dict[str, list[Path]], folder: Path) -> None:
    copied(runs, folder, "numbers.csv")


def verdicts(folder: Path) -> list[Verdict]:
    found = []
    for base, table in numbers(folder, "numbers.csv").groupby("base", sort=False):
        own = table[table["method"].isin(ADDITIVE) & (table["way"] == "subtract")]
        worst = own[["units", "units_after"]].max().max()
        verdict = REPRODUCED if worst <= 1 else CONTRADICTED
        found.append(Verdict(PARTS[0], base, verdict, f"{worst:.2f} units at most"))
        own = table[(table["way"] == "inverse") & (table["dtype"] == "float32")]
        least = {name: own.loc[own["method"] == name, "units_after"].min() for name in OTHERS}
        verdict = REPRODUCED if min(least.values()) > 1 else CONTRADICTED
        words = ", ".join(f"{OTHERS[name]} {units:.0f}" for name, units in least.items())
        found.append(Verdict(PARTS[1], base, verdict, f"{words} units after a hundred, at least"))
    return complete(found, PARTS)
