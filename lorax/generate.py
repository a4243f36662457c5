"""Complete prompts with a base model, with or without adapters.

    python -m lorax.generate --base gpt2-nano --prompt "Once upon a time"
    python -m lorax.generate --base gpt2-nano --adapter runs/gpt2_rank_sweep/adapters/6 \\
        --prompts prompts.txt --beams 4 --no-repeat-ngram 4 --out texts.jsonl

Several --adapter run side by side in one batch: each completes every prompt ("base" means the model
without an adapter). An adapter is a directory in PEFT's format or in lorax's own (your own method
also needs --method FILE, the Python file that registers it), or a checkpoint of loralib (with
--alpha). Only low-rank updates can share a batch; give other methods one at a time.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from lorax.errors import fail
from lorax.files import read_text, write_bytes


def main(arguments: list[str]) -> int:
    """The command line. Exit code 0; 2 for a mistake in the input; 1 if the texts could not be
    written to --out and are printed instead."""
    args = _parser().parse_args(arguments)
    try:
        prompts = read_prompts(args.prompt, args.prompts)
        if args.out is not None:
            check_out(args.out)
        print(f"loading {args.base}", file=sys.stderr, flush=True)
        rows = run(args, prompts)
    except (ValueError, OSError) as error:
        return fail(error)
    if args.out is None:
        for row in rows:
            show(f"[{row['adapter']}] " * (len(args.adapter) > 1) + row["prompt"] + row["text"])
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
    add("--out", help="file for the texts, as JSON lines (default: print them)")
    add(
        "--max-new-tokens",
        "--new-tokens",
        type=int,
        default=64,
        help="most tokens to generate (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0: greedy (default); above 0: sample",
    )
    add("--top-k", type=int, default=0, help="sample only from the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="sample only from the likeliest with sum p")
    add("--num-beams", "--beams", type=int, default=1, help="above 1: beam search")
    add("--length-penalty", type=float, default=1.0, help="of beam search")
    add(
        *("--no-repeat-ngram-size", "--no-repeat-ngram"),
        **{"type": int, "default": 0, "help": "never repeat n tokens in a row; 0: off"},
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


def check_out(file: str) -> None:
    """Raises ValueError if no file can be written to that path."""
    path = Path(file).absolute()
    if path.exists() and not path.is_file():
        raise ValueError(f"--out: {file!r} is not a regular file; expected a file's path")
    folder = next(folder for folder in path.parents if folder.exists())
    if not folder.is_dir():
        raise ValueError(f"--out: {str(folder)!r} is not a folder, so {file!r} can't be in it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--out: {file!r} can't be written: no write access to {str(folder)!r}")


def run(args, prompts: list[str]) -> list[dict]:
    """{"prompt", "adapter", "text"} of every prompt with every adapter."""
    import lorax
    from lorax import adapters, catalogue, decode

    options = decode.DecodingOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
    decode.check(options, args.batch_size, args.seed)
    if args.method:
        catalogue.read(args.method)
    base = lorax.load(args.base, dtype=args.dtype)
    names = args.adapter or ["base"]
    loaded = [None if name == "base" else adapters.load(name, base, args.alpha) for name in names]
    jobs = [(prompt, row) for prompt in prompts for row in range(len(loaded))]
    rows = [row for _, row in jobs] if len(loaded) > 1 else None
    params = bound(base, names, loaded, rows)
    show = lambda done, total: print(f"{done} of {total} texts", file=sys.stderr, flush=True)
    texts = decode.complete(
        base, [prompt for prompt, _ in jobs], params, options,
        rows=rows, batch_size=args.batch_size, seed=args.seed, progress=show,
    )  # fmt: skip
    return [
        {"prompt": prompt, "adapter": names[row], "text": text}
        for (prompt, row), text in zip(jobs, texts, strict=True)
    ]


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
