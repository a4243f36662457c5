"""Complete prompts with a base model, with or without adapters.

    python -m lorax.generate --base gpt2-nano --prompt "Once upon a time"
    python -m lorax.generate --base gpt2-nano --adapter runs/gpt2_rank_sweep/adapters/6 \\
        --prompts prompts.txt --beams 4 --no-repeat-ngram 4 --out texts.jsonl
    python -m lorax.generate --base HuggingFaceTB/SmolLM2-135M-Instruct --chat

Several --adapter run side by side in one batch: each completes every prompt ("base" means the model
without an adapter). An adapter is a directory in PEFT's format or in lorax's own (your own method
also needs --method FILE, the Python file that registers it), or a checkpoint of loralib (with
--alpha). Only low-rank updates can share a batch; give other methods one at a time.

With --chat, every prompt is a message to the model, in its chat template. Without a prompt, each
line that you write is the next message of one conversation.

What you leave out is taken from the model's generation_config.json, and the command says what; a
text ends at each of its eos_token_id. --temperature 0 takes the likeliest token in any case.
"""

import argparse
import json
import sys
from pathlib import Path

from lorax.errors import fail
from lorax.files import check_can_write, read_text, write_bytes


def main(arguments: list[str]) -> int:
    """The command line. Exit code 0; 2 for a mistake in the input; 1 if the texts could not be
    written to --out and are printed instead."""
    args = _parser().parse_args(arguments)
    try:
        talks = args.chat and not args.prompt and args.prompts is None
        check_chat(args, talks)
        prompts = [] if talks else read_prompts(args.prompt, args.prompts)
        if args.out is not None:
            check_can_write(args.out, "--out")
        print(f"loading {args.base}", file=sys.stderr, flush=True)
        if talks:
            talk(args)
            return 0
        rows = run(args, prompts)
    except (ValueError, OSError) as error:
        return fail(error)
    if args.out is None:
        for row in rows:
            prompt = "" if args.chat else row["prompt"]
            show(f"[{row['adapter']}] " * (len(args.adapter) > 1) + prompt + row["text"])
        return 0
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_bytes(args.out, lines.encode())
    except OSError as error:
        show(lines.removesuffix("\n"))
        fail(OSError(f"--out: {error}; the {len(rows)} texts are printed instead"))
        return 1
    print(f"{len(rows)} texts in {args.out}", file=sys.stderr)
    return 0


def show(text: str) -> None:
    """Print a model's text, with escapes for characters that the terminal lacks."""
    coding = sys.stdout.encoding or "utf-8"
    print(text.encode(coding, "backslashreplace").decode(coding))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lorax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", required=True, help="shipped name, Hugging Face directory or Hub id")
    add(
        "--adapter",
        action="append",
        default=[],
        help="directory, checkpoint or base; repeatable",
    )
    add("--alpha", type=float, help="lora_alpha of loralib checkpoints")
    add("--method", metavar="FILE", help="Python file that registers the adapter's method")
    add("--prompt", action="append", default=[], help="a prompt; repeatable")
    add("--prompts", help='file of prompts: one per line, or .jsonl or .json with "prompt" fields')
    add("--chat", action="store_true", help="prompts are messages, in the model's chat template")
    add("--system", help="with --chat: a system message in front")
    add("--template", help="with --chat: another template, or a file of one, as task.template")
    add("--out", help="file for the texts, as JSON lines (default: print them)")
    default = "(default: the model's generation_config.json, or %s)"
    add(
        *("--max-new-tokens", "--new-tokens"),
        **{"type": int, "help": f"most tokens to generate {default % 64}"},
    )
    add("--temperature", type=float, help=f"0: greedy; above 0: sample {default % 0}")
    add("--top-k", type=int, help=f"sample only from the k likeliest tokens; 0: all {default % 0}")
    add("--top-p", type=float, help=f"sample only from the likeliest with sum p {default % 1}")
    add("--num-beams", "--beams", type=int, help=f"above 1: beam search {default % 1}")
    add("--length-penalty", type=float, help=f"of beam search {default % 1}")
    add(
        *("--no-repeat-ngram-size", "--no-repeat-ngram"),
        **{"type": int, "help": f"never repeat n tokens in a row; 0: off {default % 0}"},
    )
    add("--batch-size", type=int, default=32, help="prompts per batch")
    add("--seed", type=int, default=0, help="of sampling, from 0 to 2^32 - 1")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    return parser


def read_prompts(texts: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, then those of a file: the "prompt" of each record of a
    .jsonl or .json file (`lorax.tasks.records`), or each non-empty line of any other file.

    Only "\\n" and "\\r\\n" end a line. Raises ValueError or OSError that names file and line.
    """
    prompts = list(texts)
    for text in prompts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"--prompt: {text!r} is not UTF-8 at character {error.start + 1}; expected UTF-8"
            ) from None
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(f"--prompts: no file {file}")
        if path.suffix in (".jsonl", ".json"):
            from lorax.tasks import records

            prompts += [record.get("prompt") for record in records.read(path)]
        else:
            lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
            prompts += [line for line in lines if line]
    if not prompts:
        raise ValueError("--prompt: none given; pass --prompt TEXT or --prompts FILE")
    return prompts


def check_chat(args, talks: bool) -> None:
    """Raises ValueError for options that go with --chat alone, or with prompts."""
    for name in () if args.chat else ("system", "template"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: given without --chat")
    if talks and args.out is not None:
        raise ValueError("--out: given without a prompt; a conversation is printed")
    if talks and len(args.adapter) > 1:
        raise ValueError(f"--adapter: {len(args.adapter)} given; a conversation is with one")


def prepared(args):
    """(base, names of the adapters, what is loaded of them, decoding options)."""
    import lorax
    from lorax import adapters, catalogue, decode, generation_config, xla

    xla.keep_compiled()
    given = {name: getattr(args, name) for name in generation_config.OPTIONS if name in args}
    decode.check(generation_config.merged(given, {})[0], args.batch_size, args.seed)
    if args.method:
        catalogue.read(args.method)
    base = lorax.load(args.base, dtype=args.dtype)
    options, said = generation_config.merged(given, generation_config.read(base.directory))
    decode.check(options, args.batch_size, args.seed)
    if said:
        print(said, file=sys.stderr, flush=True)
    names = args.adapter or ["base"]
    loaded = [None if name == "base" else adapters.load(name, base, args.alpha) for name in names]
    return base, names, loaded, options


def run(args, prompts: list[str]) -> list[dict]:
    """{"prompt", "adapter", "text"} of every prompt with every adapter."""
    from lorax import decode

    base, names, loaded, options = prepared(args)
    asked = messages(args, base, [[prompt] for prompt in prompts]) if args.chat else prompts
    jobs = [(i, row) for i in range(len(prompts)) for row in range(len(loaded))]
    rows = [row for _, row in jobs] if len(loaded) > 1 else None
    params = bound(base, names, loaded, rows)
    progress = lambda done, total: print(f"{done} of {total} texts", file=sys.stderr, flush=True)
    texts = decode.complete(
        base, [asked[i] for i, _ in jobs], params, options,
        rows=rows, batch_size=args.batch_size, seed=args.seed, progress=progress,
    )  # fmt: skip
    return [
        {"prompt": prompts[i], "adapter": names[row], "text": text}
        for (i, row), text in zip(jobs, texts, strict=True)
    ]


def talk(args) -> None:
    """A conversation: each line of the standard input is a message, each answer is printed."""
    from lorax import decode

    base, names, loaded, options = prepared(args)
    params, said = bound(base, names, loaded, None), []
    messages(args, base, [["Hello"]])  # without a template it fails before anybody writes
    print("your messages, one a line (end with Ctrl-D):", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if not line.strip():
            continue
        (prompt,) = messages(args, base, [[*said, line.strip()]])
        (text,) = decode.complete(base, [prompt], params, options, seed=args.seed + len(said) // 2)
        show(text)
        sys.stdout.flush()
        said += [line.strip(), text.strip()]


def messages(args, base, conversations: list[list[str]]) -> list[str]:
    """Conversations, whose messages are the user's and the model's in turn, in the chat template,
    with the generation prompt. Raises ValueError if there is none."""
    from lorax.tasks import templates

    if base.vocabulary is None:
        raise ValueError(f"base: {base.name} has no tokenizer.json, which prompts need")
    texts = templates.chosen(args.template, base.vocabulary)
    if not texts:
        raise ValueError(f"--chat: {base.name} has no chat template; give one with --template FILE")
    system = [{"role": "system", "content": args.system}] if args.system else []
    roles = ("user", "assistant")
    chats = [
        [*system, *({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))]
        for turns in conversations
    ]
    return templates.prompts(texts, templates.spelling(base.vocabulary), chats)


def bound(base, names: list[str], loaded: list, rows: list[int] | None) -> dict:
    """The base's parameters with the loaded updates: `adapters.Trained`, or None for the bare base.
    With rows, row i of a batch uses loaded[rows[i]]."""
    from lorax import adapters

    if rows is None:
        return base.params if loaded[0] is None else loaded[0].bind()
    not_low_rank = [
        n for n, trained in zip(names, loaded, strict=True) if trained and trained.adapter is None
    ]
    if not_low_rank:
        raise ValueError(f"--adapter: {', '.join(not_low_rank)} can't share a batch with others")
    return adapters.mixed(base, [trained and trained.adapter for trained in loaded], rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
