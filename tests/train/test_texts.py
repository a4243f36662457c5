"""Texts of members that decode side by side, and which members do."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from small import noisy

import lorax
from lorax import config, decode, memory
from lorax.train import texts

PROMPTS = [SimpleNamespace(text=text, references=()) for text in ("Once upon", "The dog ran")]


@pytest.fixture(scope="module")
def base():
    return lorax.load("gpt2-nano")


def evaluation():
    c = config.default().eval
    c.generate, c.new_tokens, c.batch_size = 2, 3, 2
    return c


def bound(base, name, seed):
    """The parameters of a member that has moved off the start."""
    method = lorax.method(name, **({"tokens": 2} if name == "prefix" else {}))
    state = method.init(jax.random.key(seed), base.params, base.sites)
    learned = noisy(state.trainable, 0.3, seed)
    return method.bind(learned, state.constants, base.params, sites=base.sites)


def sizes(base, bind, count, devices=1):
    """The numbers of members of each batch."""
    batches = texts.in_batches(base, PROMPTS, bind, count, evaluation(), devices)
    return [len(batch) for batch in batches]


def test_batches_of_members_fit_in_half_of_the_free_memory(base, monkeypatch):
    def bind(i):
        scale = jnp.full_like(base.params["ln_f"]["scale"], i)
        return base.params | {"ln_f": base.params["ln_f"] | {"scale": scale}}

    own = 2 * base.params["ln_f"]["scale"].nbytes
    asked = [prompt.text for prompt in PROMPTS]
    of_one = own + decode.batch_bytes(base, asked, texts.decoding_options(evaluation()), 2)
    assert sizes(base, bind, 2) == [1, 1]  # on a CPU
    monkeypatch.setattr(texts, "side_by_side", lambda: True)
    for free, devices, want in (
        (10 * of_one, 1, [5]), (10 * of_one - 2, 1, [4, 1]), (4 * of_one, 1, [2, 2, 1]),
        (0, 1, [1] * 5), (0, 2, [2, 2, 1]),
    ):  # fmt: skip
        monkeypatch.setattr("lorax.models.room.free", lambda n=free: memory.Free(n, "are free"))
        assert sizes(base, bind, 5, devices) == want


def test_members_of_several_methods_write_what_each_writes_alone(base, tmp_path, monkeypatch):
    """Of methods whose parameters differ in structure (a prefix has more) and of some whose
    parameters don't; and a member twice, which differs from itself in nothing."""
    monkeypatch.setattr("lorax.tasks.prompts", lambda task, n: PROMPTS)
    monkeypatch.setattr(texts, "side_by_side", lambda: True)
    names = ("prefix", "full", "bitfit", "bitfit")
    params = [bound(base, name, i) for i, name in enumerate(names)]
    params.append(params[-1])
    assert sizes(base, params.__getitem__, 5) == [1, 4]
    assert sizes(base, lambda i: params[-1], 2) == [2]
    c = SimpleNamespace(eval=evaluation())
    members = [SimpleNamespace(index=i, name=str(i), config=c) for i in range(5)]
    say = lambda line: None
    (tmp_path / "texts").mkdir()
    written = texts.write_texts(tmp_path, members, base, None, params.__getitem__, None, say)
    twice = texts.write_texts(tmp_path, members[3:], base, None, lambda i: params[-1], None, say)
    options = texts.decoding_options(evaluation())
    asked = [prompt.text for prompt in PROMPTS]
    alone = [decode.complete(base, asked, of_one, options) for of_one in params[:4]]
    alone = [[text.strip() for text in of_one] for of_one in alone]
    assert written == [*alone, alone[3]] and twice == [alone[3]] * 2
    assert len({tuple(of_one) for of_one in alone}) == 4
    for i, want in enumerate(written):
        lines = (tmp_path / "texts" / f"{i}.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == want
