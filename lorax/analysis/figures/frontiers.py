"""The figure of a frontier: what is forgotten for what is learned."""

import altair as alt
import pandas as pd

from lorax.analysis.figures import style

COLUMNS = 2
WIDTH, HEIGHT = 300, 260  # pixels of a panel beside others


def frontier(points: pd.DataFrame, means: pd.DataFrame, unit: str = "nats") -> alt.TopLevelMixin:
    """Forgetting against the loss on the task, a panel for each further task; down and to the left
    is better. Thin lines are members from the first step to the last; thick ones the frontiers of
    `means`, with their intervals.

    Args:
      points: of `analysis.forgetting.points`.
      means: columns task, line, loss, forgetting, low, high, n (seeds); may be empty.
      unit: of losses.
    """
    tasks = list(dict.fromkeys(points["task"]))
    order = list(dict.fromkeys(points["line"]))
    size = {"width": WIDTH if len(tasks) > 1 else "container", "height": HEIGHT}
    charts = [
        _panel(*(table[table["task"] == task] for table in (points, means)), task, order, unit)
        .properties(**size)
        for task in tasks
    ]  # fmt: skip
    chart = charts[0] if len(charts) == 1 else alt.concat(*charts, columns=COLUMNS)
    return style.themed(chart)


def _panel(
    points: pd.DataFrame, means: pd.DataFrame, task: str, order: list[str], unit: str
) -> alt.LayerChart:
    scale = alt.Scale(zero=False)
    x = alt.X("loss:Q", title=f"validation loss ({unit})", scale=scale)
    y = alt.Y("forgetting:Q", title=f"forgetting of {task} ({unit})", scale=scale)
    lines = lambda marks: style.lines_of("line", order, marks)
    numbers = {"loss": ("validation loss", ".4f"), "forgetting": ("forgetting", ".4f")}
    member = {"line": "", "member": "member", "step": "step"} | numbers
    walked = alt.Chart(points).encode(x=x, y=y, detail="member:N", order="step:Q")
    walked = walked.mark_line(style="member", strokeWidth=1)
    walked = walked.encode(color=lines("rule")["color"], tooltip=style.tooltips(member))
    drawn = alt.Chart(means).encode(x=x)
    bars = drawn.mark_rule(strokeOpacity=0.5)
    words = {"line": ""} | numbers | style.interval(".4f") | {"n": "seeds"}
    parts = [
        walked,
        bars.encode(y=alt.Y("low:Q"), y2="high:Q", **lines("rule")),
        drawn.mark_line(strokeWidth=2.2).encode(y=y, **lines("line")),
        drawn.mark_point(size=30).encode(y=y, tooltip=style.tooltips(words), **lines("point")),
    ]
    # Without means there is no mark that would have a legend of lines.
    return alt.layer(*(parts if len(means) else [walked]))
