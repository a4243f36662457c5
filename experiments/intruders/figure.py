"""Draws what measure.py measured and prints the tables of the README.

    python -m experiments.intruders.figure

Reads members.csv, counts.csv and scaled.csv beside itself, writes intruders.png (configs/intruders)
and rates.png (configs/lr_vs_rank, where it was measured). Of k and epsilon it shows K and EPSILON,
the paper's, and prints the others.
"""

import pathlib

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from experiments import sweeps
from experiments.plotting import COLOURS, MARKERS, STYLE, line, line_style
from lorax.analysis import compare

HERE = pathlib.Path(__file__).parent
K, EPSILON = 10, 0.5
FULL = "full fine-tuning"
FORGOTTEN = "forgetting (nats a token)"
WAYS = {
    "intruder": "top intruder scaled by λ",
    "matched": "dW scaled to the same norm",
    "whole": "every dW scaled by λ",
}


def line_of(row) -> str:
    """Which line of the figure a member is on."""
    if row["method"] == "full":
        return FULL
    return f"LoRA, α = {'8' if row['alpha'] == 8 else '2r'}"


def spearman(table, a, b, given=None) -> float:
    """Rank correlation of two columns, ties at their mean rank; `given`: partial, with a third's
    ranks held fixed."""
    r = table[[a, b, *([given] if given else [])]].rank().corr()
    if given is None:
        return r.loc[a, b]
    x, y = r.loc[a, given], r.loc[b, given]
    return (r.loc[a, b] - x * y) / np.sqrt((1 - x**2) * (1 - y**2))


def correlations(table, names=("count", "control", "norm", "task")) -> dict[str, str]:
    """Spearman's with forgetting, in words."""
    own = {f"with {name}": f"{spearman(table, name, 'forgotten'):.2f}" for name in names}
    held = {name: spearman(table, name, "forgotten", "norm") for name in names[:2]}
    return own | {f"{name}, norm held": f"{value:.2f}" for name, value in held.items()}


def show(rows: list[dict]) -> None:
    """Print a table in Markdown, under the rows' keys; a row may lack some."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(head, "") for head in heads] for row in rows]
    print(sweeps.markdown(heads, cells), end="\n\n")


def half(groups) -> np.ndarray:
    """Half of the 95% interval of each group's mean over seeds."""
    return compare.half_width(groups.sem(), groups.count())


# --------------------------------------------------------------------------------------- read
counts, members = pd.read_csv(HERE / "counts.csv"), pd.read_csv(HERE / "members.csv")
at = counts[(counts["k"] == K) & (counts["epsilon"] == EPSILON)]
key = ["base", "config", "member"]
members = members.merge(at[[*key, "count", "control", "matrices"]], on=key)
members["forgotten"] = members["text"] - members["base_text"]
members["control_forgotten"] = members["control_text"] - members["base_text"]
members["line"] = [line_of(row) for _, row in members.iterrows()]
lowest = members.groupby(["base", "config", "line", "rank"])["lr"].transform("min")
members["factor"] = (members["lr"] / lowest).round().astype(int)
main = members[members["config"] == "intruders"]
rates = members[members["config"] == "lr_vs_rank"]
settings = ["line", "rank", "lr"]

# -------------------------------------------------------------------------------------- tables
for size, own in main.groupby("base", sort=False):
    matrices, before = own["matrices"].iloc[0], own["base_text"].iloc[0]
    print(f"{size}: {matrices} matrices, k = {K}, epsilon = {EPSILON}; text before {before:.3f}\n")
    rows = []
    for (of_line, r, lr), seeds in own.groupby(settings):
        row = {
            "": of_line,
            "r": r or "-",
            "lr": f"{lr:.2g}",
            "norm of dW": f"{seeds['norm'].mean():.1f}",
        }
        row["eval loss"] = sweeps.words(seeds["task"])
        row["intruders"] = sweeps.words(seeds["count"], 1)
        row["control"] = sweeps.words(seeds["control"], 1)
        row["forgetting"] = sweeps.words(seeds["forgotten"])
        row["control's"] = sweeps.words(seeds["control_forgotten"])
        rows.append(row)
    show(rows)

    print(
        f"{size}: intruders (control) at other epsilon, k = {K}, and other k, epsilon = {EPSILON}\n"
    )
    all_counts = counts[(counts["base"] == size) & (counts["config"] == "intruders")]
    all_counts = all_counts.merge(own[["member", "line"]], on="member")
    rows = []
    for (of_line, r, lr), seeds in all_counts.groupby(settings):
        mean = seeds.groupby(["k", "epsilon"])[["count", "control"]].mean()
        pick = {f"ε = {e:g}": (K, e) for e in sorted(set(seeds["epsilon"]))}
        pick |= {f"k = {k}": (k, EPSILON) for k in sorted(set(seeds["k"])) if k != K}
        row = {"": of_line, "r": r or "-", "lr": f"{lr:.2g}"}
        in_words = lambda pair: f"{pair['count']:.0f} ({pair['control']:.0f})"
        rows.append(row | {name: in_words(mean.loc[where]) for name, where in pick.items()})
    show(rows)

    print(f"{size}: α = 8 minus α = 2r, seed by seed\n")
    lora = own[own["method"] == "lora"].set_index(["factor", "rank", "seed"])
    values = lora[["count", "forgotten", "task"]]
    gap = values[lora["line"] == "LoRA, α = 8"] - values[lora["line"] == "LoRA, α = 2r"]
    rows = []
    for (factor, r), seeds in gap.groupby(["factor", "rank"]):
        row = {"lr": f"x {factor}", "r": r, "intruders": sweeps.words(seeds["count"], 1)}
        row["forgetting"] = sweeps.words(seeds["forgotten"])
        rows.append(row | {"eval loss": sweeps.words(seeds["task"])})
    show(rows)

    print(f"{size}: Spearman's correlation with forgetting\n")
    lora = own[own["method"] == "lora"]
    average = lora.groupby(settings).mean(numeric_only=True)
    rows = [{"": "LoRA, members", "n": len(lora)} | correlations(lora)]
    rows += [{"": "LoRA, means of settings", "n": len(average)} | correlations(average)]
    rows += [{"": "all members", "n": len(own)} | correlations(own)]
    show(rows)

for size, own in rates.groupby("base", sort=False):
    print(
        f"{size}, configs/lr_vs_rank: Spearman's correlation with forgetting over learning rates\n"
    )
    groups = [(sweeps.name(m, r), g) for (m, r), g in own.groupby(["method", "rank"])]
    show([{"": name, "n": len(g)} | correlations(g) for name, g in groups])
    print(f"{size}, configs/lr_vs_rank: intruders / forgetting, mean of seeds\n")
    rows = []
    for name, group in groups:
        mean = group.groupby("lr").mean(numeric_only=True)
        cells = {
            f"rate {n}": f"{m['count']:.0f} ({m['control']:.0f}) / {m['forgotten']:.2f}"
            for n, (_, m) in enumerate(mean.iterrows(), 1)
        }
        rows.append({"": name, "rates": f"{mean.index[0]:.2g} to {mean.index[-1]:.2g}"} | cells)
    show(rows)

scaled = pd.DataFrame()
if (HERE / "scaled.csv").exists():
    scaled = pd.read_csv(HERE / "scaled.csv")
    whole = scaled[(scaled["lambda"] == 1) & (scaled["way"] == "whole")]
    scaled = scaled.merge(whole[[*key, "task", "text"]], on=key, suffixes=("", "_at_1"))
    scaled = scaled.merge(members[[*key, "base_text"]], on=key)
    scaled["d_task"] = scaled["task"] - scaled["task_at_1"]
    scaled["d_text"] = scaled["text"] - scaled["text_at_1"]
    scaled["share"] = 100 * scaled["d_text"] / (scaled["text_at_1"] - scaled["base_text"])
    for (size, r), own in scaled.groupby(["base", "rank"], sort=False):
        print(f"{size}, r = {r}, α = 8, lr {own['lr'].iloc[0]:g}: change against λ = 1 of the ")
        print("task's loss / of that on the pretraining text (in % of what was forgotten)\n")
        rows = []
        for lam, of_lambda in own.groupby("lambda"):
            row = {"λ": lam}
            for way, words in WAYS.items():
                seeds = of_lambda[of_lambda["way"] == way]
                row[words] = f"{sweeps.words(seeds['d_task'])} / {sweeps.words(seeds['d_text'])}"
                row[words] += f" ({seeds['share'].mean():.0f}%)"
            rows.append(row)
        show(rows)

# ------------------------------------------------------------------------------------- figures
with matplotlib.rc_context(STYLE):
    sizes = list(dict.fromkeys(main["base"]))
    figure = Figure(figsize=(10.2, 0.6 + 3.2 * len(sizes)), layout="constrained")
    for (left, middle, right), size in zip(
        figure.subplots(len(sizes), 3, squeeze=False), sizes, strict=True
    ):
        own = main[main["base"] == size]
        adapted = sorted(set(own[own["method"] == "lora"]["rank"]))
        for n, (way, of_way) in enumerate(own.groupby("line")):
            for factor, group in of_way.groupby("factor"):
                style = {"color": COLOURS[n], "marker": MARKERS[n], "capsize": 3}
                style |= {"fillstyle": "full" if factor == 1 else "none"}
                style |= {"linestyle": "-" if factor == 1 else (0, (3, 1.5))}
                style |= {"label": way if factor == 1 else f"{way}, 3 x lr"}
                mean = group.groupby("rank")["count"].mean()
                x = [2 * adapted[-1]] if way == FULL else mean.index
                left.errorbar(x, mean, half(group.groupby("rank")["count"]), **style)
                control = group.groupby("rank")["control"].mean()
                style |= {"color": "0.6", "label": None}
                left.errorbar(x, control, half(group.groupby("rank")["control"]), **style)
                style |= {"color": COLOURS[n], "linestyle": "none"}
                middle.errorbar(group["count"], group["forgotten"], **style)
        left.set_xscale("log", base=2)
        left.set_xticks([*adapted, 2 * adapted[-1]], [*adapted, "full"])
        left.xaxis.set_minor_locator(NullLocator())
        left.set(xlabel="rank r of the adapter", title=size)
        matrices = own["matrices"].iloc[0]
        words = f"intruders in {matrices} matrices (k = {K}, ε = {EPSILON})"
        left.set_ylabel(f"{words}\ngrey: control")
        middle.set(xlabel=words, ylabel=FORGOTTEN, title="a point a member")
        here = scaled[scaled["base"] == size] if len(scaled) else scaled
        for way, words in WAYS.items():
            for r, group in here[here["way"] == way].groupby("rank") if len(here) else ():
                n, mean = (
                    list(WAYS).index(way),
                    group.groupby("lambda")[["d_task", "d_text"]].mean(),
                )
                style = line_style(n) | {"fillstyle": "full" if r > 1 else "none", "markersize": 4}
                right.plot(mean["d_task"], mean["d_text"], label=f"{words}, r = {r}", **style)
        right.axhline(0, color="0.7", linewidth=0.8)
        right.axvline(0, color="0.7", linewidth=0.8)
        right.set(xlabel="change of eval loss on the task (nats)", title="α = 8, 3 seeds")
        right.set_ylabel("change of loss on pretraining text (nats)")
        right.set_xlim(-0.1, 1.3)  # what shrinks on costs the task far more
    small = {"ncols": 3, "fontsize": 6.5, "columnspacing": 1}
    for panel, where in ((figure.axes[0], "left"), (figure.axes[2], "right")):
        figure.legend(*panel.get_legend_handles_labels(), loc=f"outside lower {where}", **small)
    figure.savefig(HERE / "intruders.png", dpi=150)

    if len(rates):
        sizes = list(dict.fromkeys(rates["base"]))
        figure = Figure(figsize=(6.8, 0.6 + 2.6 * len(sizes)), layout="constrained")
        for panels, size in zip(figure.subplots(len(sizes), 2, squeeze=False), sizes, strict=True):
            own = rates[rates["base"] == size]
            for n, ((method, r), group) in enumerate(own.groupby(["method", "rank"])):
                for panel, name in zip(panels, ("count", "forgotten"), strict=True):
                    values = group.pivot(index="lr", columns="seed", values=name)
                    line(panel, n, values, sweeps.name(method, r))
                    panel.set_xscale("log")
                    panel.xaxis.set_minor_formatter(NullFormatter())
                    panel.set(xlabel="learning rate", title=size)
            panels[0].set_ylabel(f"intruders (k = {K}, ε = {EPSILON})")
            panels[1].set_ylabel(FORGOTTEN)
            panels[0].legend(fontsize=7)
        figure.savefig(HERE / "rates.png", dpi=150)
