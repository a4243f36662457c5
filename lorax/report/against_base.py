"""Sections that set the updates against the frozen weights."""

import pandas as pd

from lorax.analysis import updates
from lorax.interop.peft import Factors
from lorax.report import page, words
from lorax.report.bases import Kernels
from lorax.report.page import Section
from lorax.report.updates import label


def amplification(
    found: dict[int, dict[str, Factors]], kernels: Kernels, shown: pd.DataFrame, main: str
) -> Section:
    """Table 7 for every member, of which the shown ones' are in the page.

    Raises KeyError or ValueError where the kernels do not fit the updates.
    """
    amplified = updates.amplifications(found, kernels)
    here = label(amplified, shown, main)
    layers = sorted(set(here["layer"]))
    if not layers:
        text = "Not computed: no member of the best setting's line has an adapter."
        return Section("Amplification", page.paragraph(text))
    layer = layers[len(layers) // 2]
    columns = ["delta_norm", "w_in_delta", "w_in_w", "w_in_random", "factor"]
    here = here[here["layer"] == layer]
    means = here.groupby(["target", main], sort=True, dropna=False)[columns].mean().reset_index()
    rows = [
        [row["target"], row[main], *(page.Fixed(row[name], 3) for name in columns)]
        for _, row in means.iterrows()
    ]
    header = ["target", words.axis(main), "‖ΔW‖", "‖UᵀWV‖ in ΔW's directions", "W's own"]
    header += ["random", "amplification"]
    place = f"layer {layer}" if layer >= 0 else "the embeddings"
    caption = (
        f"Frobenius norms for {place}, means over seeds; every layer is in "
        "analysis/amplification.csv. Amplification = ‖ΔW‖/‖UᵀWV‖ with ΔW's directions: large where "
        "the update strengthens what the base hardly has."
    )
    content = page.table(header, rows, caption)
    return Section("Amplification", content, files={"amplification.csv": amplified})
