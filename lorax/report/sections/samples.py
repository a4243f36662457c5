"""The section on samples: images that the members of a diffusion run and their base made of the
same noise (`config.eval.samples`), and the share of them that a classifier recognises."""

import base64
import struct
import zlib

import numpy as np
import pandas as pd

from lorax.analysis import runs
from lorax.report import page, words
from lorax.report.page import Section
from lorax.report.selection import spread

IMAGES = 20  # of each member that are shown
OPEN = 10  # members that are shown; the others are folded
TITLE = "Samples"
SCALE = 4  # pixels on the page for each of a small image's


def samples(run: runs.Run, table: pd.DataFrame, by: runs.Axes) -> list[Section]:
    """A strip of images for the base and every member; no section if no member made any. table:
    from `runs.summary`."""
    made = {member: run.samples(member) for member in table.index}
    made = {member: arrays for member, arrays in made.items() if arrays is not None}
    if not made:
        return []
    order = [name for name in (by.main, *by.others, "seed") if name in table]
    members = list(table.loc[list(made)].sort_values(order, kind="stable").index)
    strips = {member: _strip(_called(table, member, by), made[member]) for member in members}
    asked_of = [made[member].get("captions", made[member].get("classes")) for member in members]
    asked = ", ".join(map(str, dict.fromkeys(x for of in asked_of for x in of.tolist())))
    first, score = asked_of[0], ""
    if first.dtype.kind != "U":
        asked = f"class {asked}"
        score = " The score is the share of a member's images that a classifier takes for the class"
        score += " that was asked for."
    content = page.aid(
        f"Images of {asked} that the base and the members made after training, all of "
        f"the same noise.{score}"
    )
    chosen = spread(members, OPEN)
    content += _bases(run, table, members)
    content += "".join(strips[member] for member in chosen)
    others = [strips[member] for member in members if member not in chosen]
    if others:
        count = f"{len(others)} members" if len(others) > 1 else "member"
        content += page.fold(f"The other {count}", "".join(others))
    if len(first) > IMAGES:
        content += page.aid(
            f"{IMAGES} of {len(first)} images, evenly spaced; samples/ has all of them."
        )
    return [Section(TITLE, f'<div class="samples">{content}</div>')]


def _bases(run: runs.Run, table: pd.DataFrame, members: list[int]) -> str:
    """The strips of the members' bases, each once."""
    strips = {}
    for member in members:
        arrays = run.base_samples(member)
        if arrays is not None:
            of_base = run.status.get("members", {}).get(str(member), {}).get("base_scores", {})
            name = f"base {table.loc[member].get('base', '')} without an adapter".replace("  ", " ")
            strips.setdefault(_strip(name + _scores(of_base), arrays))
    return "".join(strips)


def _called(table: pd.DataFrame, member: int, by: runs.Axes) -> str:
    """A member's values on the axes, and its scores."""
    row = table.loc[member]
    fields = [*by.fields, *(["seed"] if table["seed"].nunique() > 1 else [])]
    parts = [f"{words.axis(name)} {page.show(words.cell(name, row[name]))}" for name in fields]
    of = {name: row[name] for name in ("sample_accuracy",) if name in row}
    return (", ".join(parts) or f"member {member}") + _scores(of)


def _scores(of: dict[str, float]) -> str:
    return "".join(f": {100 * x:.0f}% recognised" for x in of.values() if np.isfinite(x))


def _strip(caption: str, arrays: dict[str, np.ndarray]) -> str:
    """A row of images under each other's caption."""
    shown = spread(range(len(arrays["images"])), IMAGES)
    images = arrays["images"][shown]
    _, height, width, channels = images.shape
    colours = np.broadcast_to(images[..., :3], (*images.shape[:3], 3))
    # One transparent pixel between two images.
    whole = np.zeros((height, len(images) * (width + 1) - 1, 4), np.uint8)
    for n, image in enumerate(colours):
        at = slice(n * (width + 1), n * (width + 1) + width)
        whole[:, at, :3], whole[:, at, 3] = image, 255
    code = base64.b64encode(_png(whole)).decode()
    scale = SCALE if width < 32 else 1
    return (
        f'<div class="strip"><img src="data:image/png;base64,{code}" '
        f'width="{scale * whole.shape[1]}" '
        f'height="{scale * height}" alt="{page.escape(f"{len(images)} images: {caption}")}">'
        f"<p>{page.escape(caption)}</p></div>"
    )


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (height, width, 4) uint8, red, green, blue and opacity."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with its filter, 0
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(lines.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )
