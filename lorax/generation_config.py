"""generation_config.json: how a model's authors would have it write texts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax import fields
from lorax.decode import DecodingOptions
from lorax.files import read_json

NAME = "generation_config.json"
NUMBER = fields.Kind("a number", lambda x: type(x) in (int, float), float)
#: Fields that are options of `decode`, which checks the values.
OPTIONS = {
    "max_new_tokens": fields.whole(1),
    "temperature": NUMBER,
    "top_k": fields.COUNT,
    "top_p": NUMBER,
    "num_beams": fields.whole(1),
    "length_penalty": NUMBER,
    "early_stopping": fields.FLAG,
    "no_repeat_ngram_size": fields.COUNT,
}
SAMPLING = ("temperature", "top_k", "top_p")
BEAMS = ("length_penalty", "early_stopping")
TOP_K = 50  # of transformers, where a file asks for sampling and names none
#: Fields that change what transformers writes and that `decode` has no option for: {name: value
#: without effect}.
OTHERS = {
    **dict.fromkeys(("repetition_penalty", "typical_p", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "diversity_penalty"), 0),
    **dict.fromkeys(("encoder_no_repeat_ngram_size",), 0),
    **dict.fromkeys(("num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("max_length", "min_new_tokens", "min_p", "top_h", "bad_words_ids")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "guidance_scale", "max_time")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "penalty_alpha")),
    **dict.fromkeys(("constraints", "force_words_ids", "dola_layers")),
}


def read(directory: Path | None) -> dict[str, Any]:
    """The fields of a model directory's file that concern texts, without nulls; {} for no file.
    Raises ValueError naming the file and the field that is wrong."""
    if directory is None or not (directory / NAME).is_file():
        return {}
    raw = read_json(directory / NAME)
    kinds = OPTIONS | {"do_sample": fields.FLAG}
    known = {name: fields.optional(kind) for name, kind in kinds.items()}
    if raw.get("early_stopping") == "never":  # stops only where no beam can improve
        raw |= {"early_stopping": False}
    found = fields.read(raw, known, directory / NAME) | {n: raw[n] for n in OTHERS if n in raw}
    return {name: value for name, value in found.items() if value is not None}


def merged(given: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[DecodingOptions, str]:
    """(options; a line about what is taken from the file, "" for nothing).

    given: {option: the user's value, or None}. stored: of `read`. What the user gives stands, the
    file decides what they left out, and the defaults of `DecodingOptions` the rest. The file's
    do_sample holds unless the user chose a temperature (0: none is drawn) or beams; as in
    transformers, temperature, top_k and top_p only matter for samples.
    """
    ours = {name: value for name, value in given.items() if value is not None}
    asked = stored.get("do_sample", False)
    if "temperature" in ours:
        sampled = ours["temperature"] != 0
    else:
        sampled = asked and ours.get("num_beams", 1) == 1
    theirs = {name: stored[name] for name in OPTIONS if name in stored and name not in ours}
    if sampled and asked:
        theirs = {"temperature": 1.0, "top_k": TOP_K} | theirs
    beams = ours.get("num_beams", 1 if sampled else theirs.get("num_beams", 1))
    for name in () if sampled else SAMPLING:
        theirs.pop(name, None)
    for name in () if beams > 1 else BEAMS:
        theirs.pop(name, None)
    left_out = {n: stored[n] for n in OTHERS if n in stored and stored[n] != OTHERS[n]}
    if sampled and theirs.pop("num_beams", 1) > 1:
        left_out["num_beams"] = stored["num_beams"]
    theirs = {name: value for name, value in theirs.items() if name not in ours}
    options = DecodingOptions(**theirs | ours)
    return options, _said(theirs, left_out)


def _said(used: Mapping[str, Any], left_out: Mapping[str, Any]) -> str:
    listed = lambda values: ", ".join(f"{name} {fields.shown(x)}" for name, x in values.items())
    parts = [listed(used)] * bool(used)
    parts += [f"not used: {listed(left_out)}"] * bool(left_out)
    return f"{NAME}: {'; '.join(parts)}" if parts else ""
