"""An answer in words: the three lines that the terminal and the report print."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lorax.analysis import runs
from lorax.analysis.compare import SEEDS

MOST_DIGITS = 5  # after the point
MANY = 3  # names in a sentence
MOST_CONDITIONS = 4  # with a line each


def lines(answer: Mapping[str, Any]) -> list[str]:
    """Three lines: the answer, how sure it is and where its grid ends, what to run next. If there
    are several conditions, a line for each instead. answer: from `lorax.analysis.answer.answer`."""
    if "conditions" in answer:
        several, first = answer["conditions"], f"Answer: {answer['why']}"
        if len(several) > MOST_CONDITIONS:
            return [f"{first}; analysis/answer.json has all {len(several)}."]
        return [f"{first}.", *(_prefix(one) + headline(one) for one in several)]
    if answer["setting"] is None:
        return [headline(answer)]
    return [headline(answer), sureness(answer), following(answer)]


def _prefix(answer: Mapping[str, Any]) -> str:
    return f"{in_words(answer['condition'])}: "


# ---------------------------------------------------------------------------------------- the lines


def headline(answer: Mapping[str, Any]) -> str:
    """The answer, and what it rests on."""
    return " ".join(sentences(answer))


def sentences(answer: Mapping[str, Any]) -> list[str]:
    """The answer in a sentence, then how it compares and what is open."""
    if answer["setting"] is None:
        return [f"No answer yet: {answer['why']}."]
    best, base = answer["best"], amount(answer["baseline"]["value"])
    if answer["verdict"] == "nothing beats the base":
        text = f"Nothing beats the base: {called(answer)} {base} before training"
        return [f"{text}, {amount_of(best)} with the best setting, {best['words']}."]
    reached = f"{called(answer)} {amount_of(answer)}{_gain(answer)}"
    size = f"{answer['words']} ({answer['trainable_params']:,} trainable parameters)"
    if answer["verdict"] == "one setting":
        return [f"One setting, so nothing is compared: {size} has {reached}."]
    if answer["chosen"] is None:
        return [f"Undecided: the best, {size}, has {reached}.", *_why(answer)]
    return [f"Answer: {size} has {reached}.", _standing(answer), *_may(answer)]


def _why(answer: Mapping[str, Any]) -> list[str]:
    """Why nothing is decided: the cheaper settings that may be as good, or what is missing."""
    why = f"{answer['why'][:1].upper()}{answer['why'][1:]}."
    return _may(answer) if answer["undecided"] and answer["seeds"] >= SEEDS else [why]


def _standing(answer: Mapping[str, Any]) -> str:
    """How the chosen setting compares with the best."""
    best, delta = answer["best"], f"{amount(answer['delta']['value'])} {answer['unit']}".strip()
    if answer["setting"] != best["setting"]:
        return f"It is as good as the best, {best['words']}, within {delta}."
    size = answer["trainable_params"]
    cheaper = {row["verdict"] for row in answer["settings"] if row["trainable_params"] < size}
    if cheaper and cheaper <= {"worse", "not eligible"}:
        return f"It is the best, and every cheaper setting is shown to lose more than {delta}."
    return "It is the best."


def _may(answer: Mapping[str, Any]) -> list[str]:
    """Which cheaper settings may be as good, and how many seeds would tell."""
    some = answer["undecided"]
    if not some:
        return []
    names = listed(_some([row["name"] for row in some]), "or")
    needed = [row["seeds"] for row in some]
    text = f"Whether {names} {'is' if len(some) == 1 else 'are'} as good, "
    text += f"{answer['seeds']} seed{'s' * (answer['seeds'] != 1)} can't tell"
    if None not in needed and max(needed) > answer["seeds"]:
        text += f"; about {max(needed)} would"
    return [text + "."]


def _gain(answer: Mapping[str, Any]) -> str:
    """ ", 2.65 [2.6, 2.7] below the base"."""
    gain = answer["gain"]
    if gain is None:
        return ""
    side = "above" if answer["higher_is_better"] else "below"
    text = f", {with_interval(gain)} {side} the base's {amount(answer['baseline']['value'])}"
    unsure = gain["low"] is not None and gain["low"] <= 0
    return text + ", which may be chance" * unsure


def sureness(answer: Mapping[str, Any]) -> str:
    """What the intervals know, what is equal, the neighbours of the setting, and edges."""
    text = _intervals(answer)
    tuned = answer["axes"]["at_its_best"]
    text += f"; each setting is at its own best {listed(tuned)} on the validation rows" * bool(
        tuned
    )
    parts = [text, *filter(None, map(_neighbour, _told(answer))), *edges(answer)]
    lost = [row["words"] for row in answer["excluded"] if row["why"].startswith("diverged")]
    if lost:
        parts.append(f"Not eligible, because a seed diverged: {listed(_some(lost))}")
    if answer["full"]:
        parts.append(_full(answer))
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def _intervals(answer: Mapping[str, Any]) -> str:
    """What the intervals are over."""
    interval, seeds = answer["interval"], answer["seeds"]
    of_seeds = f"{seeds} seed{'s' * (seeds != 1)}"
    of_rows = f"{answer['rows'] or 0:,} {answer['split']} rows"
    if interval["low"] is None:
        return f"{of_seeds}, so there is no interval"
    over = {
        "seeds and rows": f"{of_seeds} and {of_rows}",
        "seeds": f"{of_seeds}, not over the rows, whose losses are not known",
        "rows": f"{of_rows}, not over seeds ({seeds})",
    }
    return f"{interval['level']:.0%} intervals are over {over[interval['over']]}"


def following(answer: Mapping[str, Any]) -> str:
    """The next command, and why."""
    found = answer["next"]
    if found["command"]:
        return f"Next ({found['why']}): {found['command']}"
    if found["changes"]:
        values = "; ".join(f"config.sweep.{k} = {tuple(v)}" for k, v in found["changes"].items())
        return f"Next ({found['why']}): {values}"
    return "Next: nothing to refine in this grid."


def _told(answer: Mapping[str, Any]) -> list[Mapping]:
    """The neighbours along the axes that decide the size, and along the learning rate; else those
    along all."""
    told = {*answer["axes"]["compared"], "lr"}
    return [n for n in answer["neighbours"] if n["axis"] in told] or answer["neighbours"]


def _neighbour(found: Mapping[str, Any]) -> str:
    """ "at rank 8 it is 0.02 [0.01, 0.03] worse, at rank 32 0.01 [0, 0.02] better"."""
    texts = []
    for side in ("lower", "higher"):
        if side in found and found[side]["behind"] is not None:
            verb = " it is" if not texts else ""
            at = f"at {found['axis']} {runs.in_words(found[side]['value'])}{verb}"
            texts.append(f"{at} {difference(found[side]['behind'])}")
    return ", ".join(texts)


def edges(answer: Mapping[str, Any]) -> list[str]:
    """A sentence, without its full stop, for each axis at whose end the best lies or the loss still
    falls."""
    is_best = answer["setting"] == answer["best"]["setting"]
    told = {found["axis"] for found in _told(answer) if is_best}
    return [text for edge in answer["edges"] if (text := _edge(edge, edge["axis"] in told))]


def _edge(edge: Mapping[str, Any], is_told: bool) -> str:
    """is_told: whether the difference to the value beside it is said already."""
    extreme = {"lower": "smallest", "higher": "largest"}
    if edge["at"]:
        also = f" (also of {listed(_some(edge['also']))})" if edge["also"] else ""
        text = f"The best {edge['axis']}, {runs.in_words(edge['value'])}{also}, is the"
        text += f" {extreme[edge['at']]} tried"
        if edge["limit"]:
            return f"{text} and possible" if edge["open"] else ""
        if edge["fall"] is not None and not is_told:
            beside = runs.in_words(edge["beside"])
            text += f", {with_interval(edge['fall'])} better than {edge['axis']} {beside}"
        return text + ("" if edge["open"] else ": going on gains little")
    if edge["falls_at"]:
        ends = listed([runs.in_words(edge["ends"][side]) for side in edge["falls_at"]])
        return f"The loss falls again at the end of the grid, {edge['axis']} {ends}"
    return ""


def _full(answer: Mapping[str, Any]) -> str:
    full = answer["full"]
    text = f"Full fine-tuning has {amount_of(full)}"
    share = full["share_of_gain"]["value"]
    return text if share is None else f"{text}; this setting has {share:.1%} of its gain"


# --------------------------------------------------------------------------------------- the pieces


def called(answer: Mapping[str, Any]) -> str:
    """ "test loss": the split and the metric."""
    return f"{answer['split']} {answer['metric']}"


def in_words(setting: Mapping[str, Any], between: str = ", ") -> str:
    """A setting: "dora, rank 4, lr 0.01"; in a list, with spaces between its parts."""
    alone = ("method", "setting")  # their values say what they are
    named = lambda axis: "" if axis in alone else f"{axis} "
    return between.join(named(axis) + runs.in_words(x, axis) for axis, x in setting.items())


def amount(x: float | None) -> str:
    """A loss or a difference: three digits after the point, more for small ones."""
    if x is None:
        return "unknown"
    return f"{x:.2g}" if 0 < abs(x) < 10**-MOST_DIGITS else f"{x:.{_digits(x)}f}"


def _digits(size: float) -> int:
    """How many digits after the point show a number of this size."""
    return min(max(3, math.ceil(-math.log10(abs(size)))), MOST_DIGITS) if size else 3


def difference(found: Mapping[str, Any]) -> str:
    """ "0.02 [0.01, 0.03] worse", or "better" with the signs turned."""
    if found["value"] >= 0:
        return f"{with_interval(found)} worse"
    low, high = found["low"], found["high"]
    turned = (None, None) if low is None else (-high, -low)
    return (
        f"{with_interval({'value': -found['value'], 'low': turned[0], 'high': turned[1]})} better"
    )


def with_interval(found: Mapping[str, Any]) -> str:
    """ "0.512 [0.498, 0.526]"; without an interval that has no width."""
    low, high = found["low"], found["high"]
    if low is None or high - low <= 10**-MOST_DIGITS * max(abs(low), abs(high)):
        return amount(found["value"])
    width = (high - low) / 2
    if width < 10**-MOST_DIGITS:
        return f"{found['value']:.3g} [{low:.3g}, {high:.3g}]"
    digits = _digits(width)
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def amount_of(row: Mapping[str, Any]) -> str:
    """The value of a part of an answer (a setting, the base...), with its interval."""
    return with_interval({"value": row["value"], **row["interval"]})


def _some(names: list[str]) -> list[str]:
    more = len(names) - MANY
    return names if more <= 0 else [*names[:MANY], f"{more} more"]


def listed(names: Iterable[Any], word: str = "and") -> str:
    """ "a, b and c"; "" for none."""
    *most, last = [str(name) for name in names] or [""]
    return f"{', '.join(most)} {word} {last}" if most else last
