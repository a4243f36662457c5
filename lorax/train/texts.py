"""Generates texts with trained members and scores them."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lorax import decode, rundir, tasks
from lorax.config import Member
from lorax.files import write_bytes
from lorax.models import Base
from lorax.tasks import scores


def decoding_options(c) -> decode.DecodingOptions:
    """The options of config.eval. Raises ValueError for one that is out of range."""
    options = decode.DecodingOptions(
        max_new_tokens=c.new_tokens,
        num_beams=c.beams,
        length_penalty=c.length_penalty,
        no_repeat_ngram_size=c.no_repeat_ngram,
    )
    return decode.check(options, c.batch_size)


def check_texts(base: Base, task: tasks.Task, c, ahead: int, say: Callable[[str], None]) -> None:
    """Raises ValueError if the base can't complete the prompts of `eval.generate`, or lorax can't
    score the completions; reports unavailable scores.

    c: the config's `eval` section. ahead: virtual tokens in front of every prompt.
    """
    prompts = tasks.prompts(task, c.generate)
    if len(prompts) < c.generate:
        say(f"eval.generate: {c.generate} given, the task has {len(prompts)} prompts: all are used")
    asked, references = [p.text for p in prompts], [p.references for p in prompts]
    try:
        decode.encode(base, asked, decoding_options(c).max_new_tokens, ahead)
        scores.of_texts(task, asked, references, lambda line: say(f"eval.generate: {line}"))
    except ValueError as error:
        raise ValueError(f"eval.generate: {error}") from None


def write_texts(
    workdir: Path, member: Member, base: Base, task: tasks.Task, params, say
) -> dict[str, float]:
    """Complete the task's prompts with one member's parameters, save the texts, score them.

    Writes texts/<member>.jsonl, one {"prompt", "text", "references"} per line. Returns {metric:
    value}.
    """
    prompts = tasks.prompts(task, member.config.eval.generate)
    told = f"member {member.name}"
    texts = _completed(base, prompts, params, member.config.eval, lambda x: say(f"{told}: {x}"))
    _write(rundir.texts(workdir, member.index), prompts, texts)
    return _scored(task, prompts, texts)


def write_base_texts(
    workdir: Path, member: Member, base: Base, task: tasks.Task, say
) -> dict[str, float]:
    """Let the base without an adapter complete the prompts of a member, and score its texts.

    texts/base.jsonl has a line for each base, decoding and prompt: the fields of `rundir.writer`,
    "prompt", "text" and "references". What it already has is not generated again.
    """
    c, file = member.config, rundir.texts(workdir, rundir.BASE)
    of = rundir.writer(c.base, c.quant, c.eval)
    prompts = tasks.prompts(task, c.eval.generate)
    lines = rundir.read_texts(file)
    known = {x["prompt"]: x["text"] for x in lines if of.items() <= x.items()}
    missing = [prompt for prompt in prompts if prompt.text not in known]
    if missing:
        arguments = base.params, c.eval, lambda x: say(f"base {base.name}: {x}")
        known |= zip((p.text for p in missing), _completed(base, missing, *arguments), strict=True)
        _write(file, missing, [known[p.text] for p in missing], lines, of)
    return _scored(task, prompts, [known[prompt.text] for prompt in prompts])


def _completed(base: Base, prompts, params, c, say: Callable[[str], None]) -> list[str]:
    """The prompts' completions. c: the config's `eval` section. say: prints the progress."""
    began = told = time.monotonic()

    def tell(done, total):
        nonlocal told
        if time.monotonic() - told > 10 and done < total:
            told = time.monotonic()
            left = (told - began) * (total - done) / done
            say(f"{done} of {total} texts, {left:.0f} s left")

    asked, options = [p.text for p in prompts], decoding_options(c)
    texts = decode.complete(base, asked, params, options, batch_size=c.batch_size, progress=tell)
    say(f"{len(texts)} texts in {time.monotonic() - began:.0f} s")
    return [text.strip() for text in texts]


def _write(file: Path, prompts, texts: list[str], before=(), more: Mapping = {}) -> None:
    """Write the lines of `before`, then one per prompt, with the fields of `more` in front."""
    lines = [
        {**more, "prompt": p.text, "text": text, "references": p.references}
        for p, text in zip(prompts, texts, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*before, *lines))
    write_bytes(file, content.encode())


def _scored(task: tasks.Task, prompts, texts: list[str]) -> dict[str, float]:
    values = scores.of_texts(task, texts, [p.references for p in prompts])
    return {name: round(float(value), 5) for name, value in values.items()}
