"""Loading a model, against transformers."""

import functools
import json
import os
import subprocess
import sys
import tempfile

from lorax import models
from lorax.bench import peft_models, timing

LOAD = """
import json, sys, time
start, (side, path, dtype) = time.process_time(), sys.argv[1:]
if side == "lorax":
    import jax, lorax
    lorax.load("gpt2-nano")
else:
    import torch, transformers
    from transformers import AutoModelForCausalLM
    transformers.utils.logging.disable_progress_bar()
    from transformers.models.llama import modeling_llama
def peak():  # Linux's; `getrusage` has that of the process which started this one, too
    lines = [line.split() for line in open("/proc/self/status")]
    return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
before, begin = peak(), time.process_time()
if side == "lorax":
    loaded = jax.block_until_ready(jax.tree.leaves(lorax.load(path, param_dtype=dtype).params))
    size = sum(x.nbytes for x in loaded)
else:
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).parameters()
    loaded = [x.detach() for x in loaded]
    [x.sum() for x in loaded]
    size = sum(x.nbytes for x in loaded)
end = time.process_time()
print(json.dumps([end - begin, end - start, (peak() - before) / size]))
"""


def bench_load(shapes: list[str], rounds: int) -> list[timing.Row]:
    """Loading a LLaMA of 135 million parameters (SmolLM2's shape; 538 MB in float32) against
    transformers' `from_pretrained`, each in a process of its own: CPU time of the call alone, and
    with the imports before it. transformers maps the files into memory, so its side ends when every
    weight has been read once. Memory is the peak of the process above what it has before the call,
    as a multiple of the weights in the dtype that is asked for."""
    if not peft_models.found():
        raise SystemExit("bench load compares with transformers: pip install torch transformers")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for stored, asked in (
            ("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"),
        ):  # fmt: skip
            path = os.path.join(directory, stored)
            if not os.path.exists(path):
                base = models.load("random:smollm2-135m", param_dtype=stored)
                models.save(path, base, stored)
            sides = {
                side: functools.partial(_loading, side, path, asked)
                for side in ("lorax", "transformers")
            }
            found = timing.measure(sides, rounds)
            for i, what in enumerate(
                ("CPU time of the call", "CPU time with imports", "peak memory")
            ):
                ours, theirs = (found[side][:, i] for side in sides)
                row = timing.row(
                    f"load, {asked} from {stored}, {what}", ours, theirs, "from_pretrained"
                )
                per = 1e-3 if what == "peak memory" else 1
                unit = "x weights" if what == "peak memory" else "ms"
                rows.append(
                    row._replace(value=per * row.value, baseline=per * row.baseline, unit=unit)
                )
    return rows


def _loading(side: str, path: str, dtype: str) -> list[float]:
    """[CPU seconds of the call, the same with imports, peak memory] of one process."""
    command = [sys.executable, "-c", LOAD, side, path, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
