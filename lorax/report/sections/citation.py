"""The last section on a run: how to cite it, with what identifies it."""

import hashlib
import json

import lorax
from lorax.analysis import runs
from lorax.report import page
from lorax.report.page import Section


def citation(run: runs.Run) -> Section:
    """BibTeX of the run: lorax's version, the day when it began, hashes of its config and base."""
    settings = run.config.get("config", {})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    versions = run.config.get("versions") or {}
    version = versions.get("lorax-research", lorax.__version__)
    base = run.config.get("base_sha256") or "unknown"
    name = run.directory.resolve().name
    date = run.config.get("date", "")
    fields = {
        "title": f"{{{_tex(name)}}}: {len(run.members)} members trained with lorax {version}",
        "author": "{The lorax authors}",
        "year": date[:4],
        "note": ", ".join(
            [
                f"lorax {version}",
                *[f"begun {date}"] * bool(date),
                f"sha256 of config {digest[:16]}",
                f"of base {base[:16]}",
            ]
        ),
    }
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items() if value]
    entry = "\n".join([f"@misc{{lorax-{digest[:8]},", *lines, "}"])
    text = (
        "The config's hash is of the value of config in config.json, with its keys sorted; the "
        "base's is in config.json."
    )
    return Section("Cite this run", page.command_block(entry) + page.aid(text))


def _tex(text: str) -> str:
    """A name with TeX's special characters escaped."""
    return "".join(f"\\{char}" if char in "_&%$#" else char for char in text)
