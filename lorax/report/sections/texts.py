"""The section on texts: what the members and their base wrote for the task's prompts
(`config.eval.generate`), and its scores."""

from collections.abc import Mapping

import pandas as pd

from lorax.analysis import runs
from lorax.report import page, words
from lorax.report.page import Section
from lorax.report.selection import spread

PROMPTS = 6  # that are shown
OPEN = 3  # members beside the reference and the base; the others are folded
TITLE = "Texts"


def texts(run: runs.Run, table: pd.DataFrame) -> list[Section]:
    """Prompts with their references, and what the base and the members wrote; no section if no
    member wrote any. table: from `runs.summary`."""
    written = {member: run.texts(member) for member in table.index}
    ordered = table.loc[[m for m in table.index if written[m]]].sort_values(
        "final_loss", kind="stable"
    )
    if not len(ordered):
        return []
    chosen = spread(list(ordered.index), OPEN)
    first, base = written[chosen[0]], run.base_texts(chosen[0])
    prompts = spread(range(len(first)), PROMPTS)
    content = page.aid(
        f"The members with the lowest, the middle and the highest loss of {len(ordered)}, the base "
        "without an adapter, and a reference, for the same prompts."
        if len(ordered) > 1
        else "What the member, and the base without an adapter, wrote for the same prompts."
    )
    headings = [_called(ordered, member) for member in chosen]
    rows = [
        [first[n]["prompt"], " / ".join(first[n]["references"])]
        + [base.get(first[n]["prompt"])]
        + [_text(written[member], first[n]["prompt"]) for member in chosen]
        for n in prompts
    ]
    shown = f"{len(prompts)} of {len(first)} prompts, evenly spaced" * (len(prompts) < len(first))
    caption = f"{shown or 'All prompts'}; analysis/texts.csv has every text."
    header = ["prompt", "reference", "base", *headings]
    content += f'<div class="texts">{page.table(header, rows, caption)}</div>'
    content += _scores(run, ordered)
    others = [member for member in ordered.index if member not in chosen]
    if others:
        folded = "".join(_of_member(ordered, member, written[member]) for member in others)
        count = f"{len(others)} members" if len(others) > 1 else "member"
        content += page.fold(f"The other {count}", folded)
    return [Section(TITLE, content, {}, {"texts.csv": _every(run, table, written)})]


def _called(table: pd.DataFrame, member: int) -> str:
    """A member's number, the values in which it differs from others of the table, and its loss."""
    names = [set(name.split(",")) for name in table["name"]]
    common = set.intersection(*names) if len(names) > 1 else set()
    own = [part for part in table.loc[member, "name"].split(",") if part not in common]
    loss = page.show(page.Fixed(table.loc[member, "final_loss"], 3))
    return f"{member}: {', '.join([*own, f'loss {loss}'])}"


def _text(lines: list[dict], prompt: str) -> str | None:
    """What a member wrote for a prompt; None if it had another set of prompts."""
    return next((line["text"] for line in lines if line["prompt"] == prompt), None)


def _of_member(table: pd.DataFrame, member: int, lines: list[dict]) -> str:
    """A table of what one member wrote, folded."""
    few = [lines[n] for n in spread(range(len(lines)), PROMPTS)]
    rows = [[x["prompt"], " / ".join(x["references"]), x["text"]] for x in few]
    caption = f"Member {member}: {len(few)} of {len(lines)} prompts."
    listed = page.table(["prompt", "reference", "text"], rows, caption)
    return page.fold(_called(table, member), f'<div class="texts">{listed}</div>')


def _scores(run: runs.Run, ordered: pd.DataFrame) -> str:
    """A table of the scores of the texts: the base's, then every member's."""
    of = run.status.get("members", {})
    results = {member: of.get(str(member), {}) for member in ordered.index}
    bases = {
        str(ordered.loc[member, "base"]) if "base" in ordered else "base": row["base_scores"]
        for member, row in results.items()
        if row.get("base_scores")
    }
    names = list(dict.fromkeys(name for scores in bases.values() for name in scores))
    if not names:
        return ""
    rows = [
        [f"base {base}", None, *(page.Fixed(scores.get(name), 3) for name in names)]
        for base, scores in bases.items()
    ]
    for member, row in results.items():
        scores: Mapping = row.get("scores", {})
        rows.append(
            [ordered.loc[member, "name"], page.Fixed(ordered.loc[member, "final_loss"], 3)]
            + [page.Fixed(scores.get(name), 3) for name in names]
        )
    header = ["by", "validation loss", *map(words.axis, names)]
    caption = "Scores of all generated texts, for each base and every member."
    return page.table(header, rows, caption, sortable=True)


def _every(run: runs.Run, table: pd.DataFrame, written: Mapping[int, list[dict]]) -> pd.DataFrame:
    """One row per member and prompt: member, name, prompt, reference, base, text."""
    rows = []
    for member, lines in written.items():
        base = run.base_texts(member) if lines else {}
        rows += [
            {"member": member, "name": table.loc[member, "name"], "prompt": line["prompt"]}
            | {"reference": " / ".join(line["references"]), "base": base.get(line["prompt"])}
            | {"text": line["text"]}
            for line in lines
        ]
    return pd.DataFrame(rows)
