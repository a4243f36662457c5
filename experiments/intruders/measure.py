"""Intruders of every member, what it forgot, and what scaling its intruders does.

    python -m experiments.intruders.measure [--data=DIR] [--workdir=DIR] RUN...

The runs are of configs/intruders.py, or of configs/lr_vs_rank.py for five learning rates (all
linear layers in both). DIR holds tinystories/tinystories_sample.txt and tinyshakespeare/input.txt,
which the bases were trained on: stories-llama-260k on the first, gpt2-nano on both.

Writes beside itself or into --workdir (rows of runs that are not named stay as they are):

members.csv   a row a member: the task's loss and that on the pretraining text, in nats a token,
              and the same of the control: an update with the same singular values in random
              directions
counts.csv    a row a member, k and epsilon: intruders summed over matrices, of it and its control
scaled.csv    a row a member, lambda and way of changing dW, for some LoRA members of
              configs/intruders.py, with both losses. Ways: "intruder" scales each matrix's top
              intruder by lambda, "matched" the matrix's whole dW to the norm that it then has,
              "whole" every dW by lambda
"""

import argparse
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from safetensors.numpy import load_file

import lorax
from experiments import sweeps
from experiments.verdicts import tuned
from lorax import adapters, losses, tasks, tree
from lorax.analysis import intervene, intruders, norm_matched, update_svd
from lorax.interop.peft import Adapter, Factors
from lorax.models import kernels
from lorax.tasks.rows import encode_texts
from lorax.train.batches import eval_batches

HERE = pathlib.Path(__file__).parent
END = "<|endoftext|>"  # between two stories of the file; speeches have empty lines between them
STORIES = "tinystories/tinystories_sample.txt", END, 1
PLAYS = "tinyshakespeare/input.txt", "\n\n", 3  # three speeches are one text
TEXTS = {"stories-llama-260k": (STORIES,), "gpt2-nano": (STORIES, PLAYS)}
TOKENS = 128
KS = (1, 2, 5, 10)
EPSILONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # for the largest k; the other k at this one:
EPSILON = 0.5
LAMBDAS = (0.0, 0.25, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3)
SCALED = (1, 8)  # the ranks whose intruders are scaled, at alpha = 8 and the better learning rate


def text_batches(file, separator, together, vocabulary):
    """The first TOKENS tokens of each text in the last twentieth of a file, (N, B, ...). Texts
    begin as in pretraining, with the start token; gpt2-nano's is the end of the text before."""
    parts = [part.strip() for part in file.read_text(encoding="utf-8").split(separator)]
    held_out = parts[round(len(parts) * 0.95) :]
    texts = ["\n\n".join(held_out[i : i + together]) for i in range(0, len(held_out), together)]
    start = [*vocabulary.start] or [vocabulary.end]
    rows = [start + ids[:TOKENS] for ids in encode_texts(texts, vocabulary).values()]
    tokens = np.array([row for row in rows if len(row) == TOKENS + len(start)], np.int32)
    rows = {"tokens": tokens, "mask": np.ones(tokens.shape, np.float32)}
    return eval_batches(tasks.Task("text", rows, rows, ""), 64)


def task_batches(config, vocabulary):
    """The rows on which the run evaluated, (N, B, ...)."""
    length, examples = config["train"]["seq_len"], config["eval"]["examples"]
    return eval_batches(tasks.build(config["task"], vocabulary, length, examples), 64)


def loss_with(module):
    """A program (parameters, batches) -> nats a token that counts, as training's evaluation has."""

    @jax.jit
    def loss(params, batches):
        add = lambda sums, batch: (
            jax.tree.map(jnp.add, sums, losses.lm_loss(module, params, batch)[:2]),
            None,
        )
        (nats, tokens), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), batches)
        return nats / tokens

    return loss


def changed(base, factors):
    """The base's parameters with {path: (a, b)} or (a, b, s) added."""
    own = {path: Factors(*(*f[:3], 1.0)[:3], None) for path, f in factors.items()}
    return adapters.merge(base, Adapter(own, {}, {})).params


def update_of(run, member, method, base):
    """({path: factors, or dW (in, out)} of the linear layers, the adapted parameters)."""
    if method == "lora":
        found = {path: f[:3] for path, f in run.adapter(member).items()}
        return found, changed(base, found)
    # Full fine-tuning moves the embedding and the norms as well; no intruders are counted there.
    found = {path: dw for path, dw in run.delta(member).items() if path.startswith("h/")}
    trained = load_file(run.directory / "adapters" / str(member) / "state.safetensors")
    moved = {
        path.removeprefix("trainable/").removesuffix("/w"): jnp.asarray(w)
        for path, w in trained.items()
    }
    return found, tree.unflatten(tree.flatten(base.params) | moved)


def scaled(w, svds, found, update, kind, lam):
    """{path: factors} of an update that is changed in one of the ways of scaled.csv."""
    if kind == "whole":
        return {path: (a, b, lam * s) for path, (a, b, s) in update.items()}
    result = {}
    for path, (a, b, s) in update.items():
        done = intervene(w[path], (a, b, s), lam, w_svd=svds[path], found=found[path])
        if kind == "intruder":
            result[path] = np.hstack([s * a, done.a]), np.vstack([b, done.b])
        else:
            result[path] = a, b, s * float(done.scale)
    return result


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("runs", nargs="+", metavar="RUN")
parser.add_argument(
    "--data",
    required="LORAX_DATA" not in os.environ,
    default=os.environ.get("LORAX_DATA"),
    type=pathlib.Path,
    help="folder of the two texts, by default $LORAX_DATA",
)
parser.add_argument("--workdir", default=HERE, type=pathlib.Path, help="for the tables")
flags = parser.parse_args()
flags.workdir.mkdir(parents=True, exist_ok=True)

members, counts, trials = [], [], []
for directory in flags.runs:
    # ------------------------------------------------------------------ the base and its two texts
    name = "lr_vs_rank" if "lr_vs_rank" in directory else "intruders"
    size, run, table = sweeps.load(directory, name)
    base = lorax.load(run.config["config"]["base"])
    if base.sha256 != run.config["base_sha256"]:
        raise ValueError(f"{directory}: trained from other weights than {base.name} has now")
    w = {path: kernel for path, kernel in kernels(base).items() if path.startswith("h/")}
    svds = {path: np.linalg.svd(kernel, full_matrices=False) for path, kernel in w.items()}
    of_texts = [
        text_batches(flags.data / file, *how, base.vocabulary) for file, *how in TEXTS[size]
    ]
    loss = loss_with(base.module)
    on_text = lambda params, loss=loss, of_texts=of_texts: np.mean(
        [float(loss(params, batches)) for batches in of_texts]
    )
    label = {"base": size, "config": name}
    before = on_text(base.params)

    # ---------------------------------------------------------- every member: intruders, forgetting
    lora, of_scaling = table[(table["method"] == "lora") & (table["alpha"] == 8)], []
    if name == "intruders":
        own = tuned(lora[lora["rank"].isin(SCALED)], ["rank"]).members
        of_scaling = own["member"].tolist()
        of_task = task_batches(run.config["config"], base.vocabulary)
    for member, row in table[table["status"] == "finished"].iterrows():
        update, params = update_of(run, member, row["method"], base)
        rng = np.random.default_rng(member)
        control = {path: norm_matched(rng, dw) for path, dw in update.items()}
        found, totals = {}, {"count": 0, "control": 0}
        for path, dw in update.items():
            for kind, change in (("count", dw), ("control", control[path])):
                own = intruders(w[path], change, max(KS), EPSILONS, w_svd=svds[path])
                # (k, e): how many of the first k are below epsilon
                totals[kind] = totals[kind] + np.cumsum(own.mask.T, 0)
                found[path] = own if kind == "count" else found[path]
        sigmas = np.concatenate([update_svd(dw)[1] for dw in update.values()])
        own = {name: row[name] for name in ("method", "rank", "alpha", "lr", "seed")}
        own = label | {"member": member} | own
        counts += [
            own
            | {"k": k, "epsilon": e, "matrices": len(update)}
            | {kind: int(total[k - 1, i]) for kind, total in totals.items()}
            for k in KS
            for i, e in enumerate(EPSILONS)
            if k == max(KS) or e == EPSILON
        ]
        members.append(
            own
            | {"norm": np.linalg.norm(sigmas), "task": row["final_loss"]}
            | {"base_text": before, "text": on_text(params)}
            | {"control_text": on_text(changed(base, control))}
        )
        print(members[-1], flush=True)

        # ------------------------------------------------------------------ scaling the intruders
        if member not in of_scaling:
            continue
        for kind in ("intruder", "matched", "whole"):
            for lam in LAMBDAS:
                params = changed(base, scaled(w, svds, found, update, kind, lam))
                both = {"task": float(loss(params, of_task)), "text": on_text(params)}
                trials.append(own | {"way": kind, "lambda": lam} | both)
        again = next(t["task"] for t in trials[::-1] if t["lambda"] == 1)
        if abs(again - row["final_loss"]) > 1e-3:
            raise ValueError(f"{directory}: member {member} has {again}, not {row['final_loss']}")

for file, rows in (("members", members), ("counts", counts), ("scaled", trials)):
    rows, path = pd.DataFrame(rows), flags.workdir / f"{file}.csv"
    if path.exists() and len(rows):
        kept = pd.read_csv(path)
        measured = kept.set_index(["base", "config"]).index.isin(
            rows.set_index(["base", "config"]).index
        )
        rows = pd.concat([kept[~measured], rows])
    if len(rows):
        rows.to_csv(path, index=False, float_format="%.6g")
