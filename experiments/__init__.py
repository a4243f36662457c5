"""Claims of the literature, checked: a folder each, with its rule, its numbers and its verdicts.

`verdicts` has the rules that claims share, `sweeps` reads runs, `tables` writes the verdicts into
the READMEs, and `python -m experiments.rerun` runs a claim again. A folder holds

README.md  claim and source, rule, power, commands, numbers, verdicts, limits
rule.py    the same as code, in NumPy, pandas and SciPy:
    CLAIM, SOURCE, RULE     one line, one line, one paragraph
    COMMANDS                {base: the shell commands that make its runs}. "{1}" is the directory of
                            the first command, for those that read it
    MINUTES                 {base: wall-clock minutes on two CPU cores}, where measured
    collect(runs, folder)   writes the CSVs; runs: {base: [directory of each command]}
    verdicts(folder)        a list of `verdicts.Verdict`, from the CSVs alone
figure.py  draws the figures from the CSVs

README.md has **Claim.**, **Rule.**, **Command.** and **Verdict.** in this order, the verdicts as
`python -m experiments.tables` writes them, and names every CSV and figure of the folder. A folder
whose rule is committed before its numbers has neither CSVs nor figures.
"""
