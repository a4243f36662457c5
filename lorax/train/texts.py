"""Generates texts with trained members and scores them."""

import json
import time
from collections.abc import Callable
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
    c = member.config.eval
    prompts = tasks.prompts(task, c.generate)
    options = decoding_options(c)
    began = told = time.monotonic()

    def tell(done, total):
        nonlocal told
        if time.monotonic() - told > 10 and done < total:
            told = time.monotonic()
            left = (told - began) * (total - done) / done
            say(f"member {member.name}: {done} of {total} texts, {left:.0f} s left")

    asked = [p.text for p in prompts]
    texts = decode.complete(base, asked, params, options, batch_size=c.batch_size, progress=tell)
    texts = [text.strip() for text in texts]
    values = scores.of_texts(task, texts, [p.references for p in prompts])
    lines = [
        {"prompt": p.text, "text": text, "references": p.references}
        for p, text in zip(prompts, texts, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(rundir.texts(workdir, member.index), content.encode())
    say(f"member {member.name}: {len(texts)} texts in {time.monotonic() - began:.0f} s")
    return {name: round(float(value), 5) for name, value in values.items()}
