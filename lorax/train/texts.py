"""Generates texts with trained members and scores them.

On an accelerator, members that share a base decode side by side: a batch has the prompts of all of
them (`in_batches` says of which), and every product with a frozen weight is one product for all.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from lorax import decode, gather, rundir, tasks
from lorax.config import Member
from lorax.files import write_bytes
from lorax.models import Base, room
from lorax.progress import telling
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
    workdir: Path,
    members: Sequence[Member],
    base: Base,
    task: tasks.Task,
    bind: Callable[[int], dict],
    over: Mesh | None,
    say: Callable[[str], None],
) -> list[list[str]]:
    """Complete the task's prompts with all members of a program, and save the texts of each.

    bind(i): the parameters of member i of `members`. over: a mesh of devices that share the
    members. Writes texts/<member>.jsonl, one {"prompt", "text", "references"} per line. Returns
    each member's texts.
    """
    c, devices = members[0].config.eval, over.size if over else 1
    prompts, written = tasks.prompts(task, c.generate), []
    for batch in in_batches(base, prompts, bind, len(members), c, devices):
        its = members[len(written) : len(written) + len(batch)]
        told = f"member {its[0].name}" + f" and {len(its) - 1} more" * (len(its) > 1)
        filled = batch + batch[-1:] * (-len(batch) % devices)
        params = decode.Several.of(filled) if len(filled) > 1 else filled[0]
        report = lambda x, told=told: say(f"{told}: {x}")
        texts = _completed(base, prompts, params, c, report, over)
        for member, of_member in zip(its, texts, strict=False):
            _write(rundir.texts(workdir, member.index), prompts, of_member)
            written.append(of_member)
    return written


def in_batches(base: Base, prompts, bind: Callable[[int], dict], count: int, c, devices: int = 1):
    """Yields the bound parameters of the members that decode together: neighbours whose parameters
    have one structure and equal shapes, as those of a program have, and as many of them as half of
    the free memory allows with `eval.batch_size` prompts of each. On a base that a mesh divides,
    or where it would be slower (`side_by_side`), each member is alone."""
    if gather.mesh_of(base.params) is not None or not side_by_side():
        yield from ([bind(i)] for i in range(count))
        return
    batch = []
    asked, options = [p.text for p in prompts], decoding_options(c)
    each, most = decode.batch_bytes(base, asked, options, c.batch_size), room.free().bytes // 2
    for i in range(count):
        params = bind(i)
        if batch:
            differs = [
                x.nbytes
                for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(batch[0]), strict=False)
                if x is not y
            ]
            size = each + 2 * sum(differs)  # each member's own parameters, and these stacked
            full = (len(batch) + 1) * size > most and len(batch) % devices == 0
            if full or _shape(params) != _shape(batch[0]):
                yield batch
                batch = []
        batch.append(params)
    yield batch


def side_by_side() -> bool:
    """Whether members decode in one batch. On a CPU one after another is faster, two to three times
    without beams (measured: `lorax.bench texts`)."""
    return jax.default_backend() != "cpu"


def _shape(params):
    """What parameters that are stacked must have in common."""
    flat, structure = jax.tree.flatten(params)
    return structure, [(x.shape, x.dtype) for x in flat]


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
        (texts,) = _completed(base, missing, *arguments)
        known |= zip((p.text for p in missing), texts, strict=True)
        _write(file, missing, [known[p.text] for p in missing], lines, of)
    return scored(task, prompts, [known[prompt.text] for prompt in prompts])


def _completed(
    base: Base, prompts, params, c, say: Callable[[str], None], over: Mesh | None = None
) -> list[list[str]]:
    """The prompts' completions by each member of params. c: the config's `eval` section. say:
    prints the progress. over: as for `decode.generate`."""
    began = time.monotonic()
    asked, options = [p.text for p in prompts], decoding_options(c)
    how = dict(batch_size=c.batch_size, over=over, progress=telling(say, "texts"))
    texts = decode.complete(base, asked, params, options, **how)
    of_members = texts if isinstance(params, decode.Several) else [texts]
    say(f"{sum(map(len, of_members))} texts in {time.monotonic() - began:.0f} s")
    return [[text.strip() for text in of_member] for of_member in of_members]


def _write(file: Path, prompts, texts: list[str], before=(), more: Mapping = {}) -> None:
    """Write the lines of `before`, then one per prompt, with the fields of `more` in front."""
    lines = [
        {**more, "prompt": p.text, "text": text, "references": p.references}
        for p, text in zip(prompts, texts, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (*before, *lines))
    write_bytes(file, content.encode())


def scored(task: tasks.Task, prompts, texts: list[str]) -> dict[str, float]:
    """{metric: value} of the texts that complete the prompts."""
    values = scores.of_texts(task, texts, [p.references for p in prompts])
    return {name: round(float(value), 5) for name, value in values.items()}
