"""A run directory as TensorBoard events: scalars and hyperparameters a member, and the figures."""

import shutil
from pathlib import Path

import numpy as np
from matplotlib import image
from tensorboardX import SummaryWriter

from lorax.analysis import runs


def write(directory: Path) -> Path:
    """Write `directory/tb` anew from metrics.jsonl, members.jsonl and figures/*.png; its path.

    Made from the run directory and not while training, so that a resumed run has no point twice.
    """
    run, target = runs.load(directory), Path(directory) / "tb"
    shutil.rmtree(target, ignore_errors=True)
    for _, member in run.members.iterrows():
        with SummaryWriter(str(target / member["name"]), write_to_disk=True) as writer:
            points = run.metrics[run.metrics["member"] == member["member"]]
            for _, point in points.iterrows():
                for name in ("loss", "grad_norm"):
                    if name in point and np.isfinite(point[name]):
                        writer.add_scalar(
                            f"{point['split']}/{name}", point[name], int(point["step"])
                        )
            evals = points[points["split"] == "eval"]["loss"].dropna()
            hyper = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in member.items()
                if name not in ("member", "group", "name")
                and not (isinstance(value, float) and np.isnan(value))  # a method's without it
            }
            final = {"eval/final_loss": float(evals.iloc[-1])} if len(evals) else {}
            writer.add_hparams(hyper, final, name=".")
    figures = sorted((Path(directory) / "figures").glob("*.png"))
    with SummaryWriter(str(target / "figures")) as writer:
        for file in figures:
            pixels = image.imread(file)[..., :3]
            writer.add_image(file.stem, pixels, dataformats="HWC")
    return target
