"""The figure of a frontier: what is forgotten for what is learned."""

import pandas as pd

from lorax.analysis.figures import style, vega

COLUMNS = 2
WIDTH, HEIGHT = 300, 260  # pixels of a panel beside others


def frontier(points: pd.DataFrame, means: pd.DataFrame, unit: str = "nats") -> vega.Chart:
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
    chart = charts[0] if len(charts) == 1 else vega.concat(*charts, columns=COLUMNS)
    return style.themed(chart)


def _panel(
    points: pd.DataFrame, means: pd.DataFrame, task: str, order: list[str], unit: str
) -> vega.Chart:
    scale = dict(zero=False)
    x = vega.column("loss:Q", title=f"validation loss ({unit})", scale=scale)
    y = vega.column("forgetting:Q", title=f"forgetting of {task} ({unit})", scale=scale)
    lines = lambda marks: style.lines_of("line", order, marks)
    numbers = {"loss": ("validation loss", ".4f"), "forgetting": ("forgetting", ".4f")}
    member = {"line": "", "member": "member", "step": "step"} | numbers
    walked = vega.Chart(points).encode(x=x, y=y, detail="member:N", order="step:Q")
    walked = walked.mark("line", style="member", strokeWidth=1)
    walked = walked.encode(color=lines("rule")["color"], tooltip=style.tooltips(member))
    drawn = vega.Chart(means).encode(x=x)
    bars = drawn.mark("rule", strokeOpacity=0.5)
    words = {"line": ""} | numbers | style.interval(".4f") | {"n": "seeds"}
    parts = [
        walked,
        bars.encode(y=vega.column("low:Q"), y2="high:Q", **lines("rule")),
        drawn.mark("line", strokeWidth=2.2).encode(y=y, **lines("line")),
        drawn.mark("point", size=30).encode(y=y, tooltip=style.tooltips(words), **lines("point")),
    ]
    # Without means there is no mark that would have a legend of lines.
    return vega.layer(*(parts if len(means) else [walked]))
