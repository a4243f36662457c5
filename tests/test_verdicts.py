"""Every verdict follows from the committed numbers by its rule, and stands in the READMEs."""

import importlib
import math
import shlex

import numpy as np
import pandas as pd
import pytest
from synthetic import make_study

from experiments import losses, opening, rerun, tables, verdicts
from experiments.verdicts import CONTRADICTED, NOT_RUN, REPRODUCED, UNDECIDED, WITHDRAWN, Verdict
from lorax.analysis import compare

CLAIMS = verdicts.claims()
ALL = tables.recomputed()
PAGES = tables.pages(ALL)


# ------------------------------------------------------------------------------------- every claim


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_rule_says_what_a_reader_needs_and_its_verdicts_are_whole(claim):
    rule, found = verdicts.rule(claim), ALL[claim]
    for text in (rule.CLAIM, rule.SOURCE, rule.RULE):
        assert text and text == text.strip()
    assert "\n" not in rule.CLAIM + rule.SOURCE, "a line each"
    assert found and all(isinstance(verdict, Verdict) for verdict in found)
    assert {verdict.verdict for verdict in found} <= set(verdicts.WORDS)
    places = [(verdict.part, verdict.base) for verdict in found]
    assert len(set(places)) == len(places), "a part and base with two verdicts"
    for verdict in found:
        assert (verdict.verdict == NOT_RUN) == (verdict.number == ""), verdict
        assert "|" not in f"{verdict.part}{verdict.number}", "ends a cell of the table"
    decided = {verdict.base for verdict in found if verdict.verdict != NOT_RUN}
    assert decided <= set(rule.COMMANDS), "a number without the command that makes it"


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_without_numbers_is_not_run(claim, tmp_path):
    assert {verdict.verdict for verdict in verdicts.rule(claim).verdicts(tmp_path)} == {NOT_RUN}


@pytest.mark.parametrize("claim", CLAIMS)
def test_commands_are_of_python_and_name_what_is_there(claim):
    for commands in verdicts.rule(claim).COMMANDS.values():
        assert not isinstance(commands, str) and commands, "a tuple of commands is expected"
        for command in commands:
            python, flag, module, *_ = shlex.split(command)
            assert (python, flag) == ("python", "-m") and "--workdir" not in command, command
            assert importlib.util.find_spec(module), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_verdicts_in_the_readmes_are_recomputed(page):
    text = page.read_text(encoding="utf-8")
    # `python -m experiments.tables` writes them
    assert tables.filled(text, PAGES[page]) == text


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_readme_has_the_rule_word_for_word(claim):
    text = (verdicts.HERE / claim / "README.md").read_text(encoding="utf-8")
    assert " ".join(verdicts.rule(claim).RULE.split()) in " ".join(text.split())


# -------------------------------------------------------------------------------------- the rules


def test_an_interval_decides_for_a_side():
    of = lambda low, high: compare.Interval((low + high) / 2, low, high, "seeds")
    assert verdicts.by_interval(of(0.1, 0.2), "above") == REPRODUCED
    assert verdicts.by_interval(of(0.1, 0.2), "below") == CONTRADICTED
    assert verdicts.by_interval(of(0.1, 0.2), "above", 0.15) == UNDECIDED
    assert verdicts.by_interval(of(0.1, 0.2), "below", 0.3) == REPRODUCED
    assert verdicts.by_interval(of(math.nan, math.nan), "above") == UNDECIDED
    assert verdicts.by_equivalence(of(-0.1, 0.1), -0.2, 0.2) == REPRODUCED
    assert verdicts.by_equivalence(of(-0.3, 0.1), -0.2, 0.2) == UNDECIDED
    assert verdicts.by_equivalence(of(0.3, 0.4), -0.2, 0.2) == CONTRADICTED
    with pytest.raises(ValueError, match="choose above or below"):
        verdicts.by_interval(of(0, 1), "over")


def test_signs_decide_where_chance_seldom_gives_as_many():
    of = lambda right, wrong: np.array([1.0] * right + [-0.1] * wrong)
    assert verdicts.by_signs(of(9, 1), "above") == REPRODUCED
    assert verdicts.by_signs(of(1, 9), "above") == CONTRADICTED
    assert verdicts.by_signs(of(1, 9), "below") == REPRODUCED
    assert verdicts.by_signs(of(8, 2), "above") == UNDECIDED
    assert verdicts.by_signs(of(3, 0), "above") == UNDECIDED  # p = 0.25


def test_a_claim_that_says_several_things_holds_if_all_do():
    assert verdicts.all_of([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert verdicts.all_of([REPRODUCED, UNDECIDED]) == UNDECIDED
    assert verdicts.all_of([UNDECIDED, CONTRADICTED]) == CONTRADICTED


def members(losses: dict) -> pd.DataFrame:
    """Members of rank 1 from {rate: losses of the seeds}."""
    rows = [(1, lr, s, x) for lr, values in losses.items() for s, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["rank", "lr", "seed", "final_loss"])


def test_the_best_rate_has_a_loss_for_every_seed():
    table = members({1e-3: (3.0, 3.1), 2e-3: (2.0, 2.2), 4e-3: (1.0, math.nan)})
    best = verdicts.tuned(table, ["rank"])
    assert set(best.members["lr"]) == {2e-3} and best.doubts == {}


def test_a_best_rate_at_the_edge_of_the_grid_is_told():
    table = members({1e-3: (3.0, 3.1), 2e-3: (2.0, 2.2)})
    edge = "best rate of 1 at the edge of its grid, 0.002"
    best = verdicts.tuned(table, ["rank"])
    assert best.doubts == {"1": edge} and best.doubt("1") == best.doubt() == edge
    assert best.doubt("2") == ""
    one = verdicts.tuned(members({1e-3: (3.0,)}), ["rank"])
    assert one.doubts == {"1": "one learning rate, 0.001"}
    with pytest.raises(ValueError, match="1: no lr of which every seed has a final_loss"):
        verdicts.tuned(members({1e-3: (math.nan,)}), ["rank"])


def test_a_contrast_has_the_interval_of_the_bootstrap_over_seeds_and_rows():
    rng = np.random.default_rng(0)
    sums = rng.normal(2, 0.3, (3, 4, 1)) + rng.normal(0, 0.5, (1, 1, 30))
    sums = sums + rng.normal(0, 0.1, (3, 4, 30))
    drawn = compare.bootstrap(sums, np.ones(30))
    names = ["r8", "r64", losses.START]
    by_seed = pd.DataFrame(sums.mean(-1).T, columns=names)
    covariance = pd.DataFrame(np.cov(drawn.over_rows.T, bias=True), names, names)
    of = losses.Losses("test", None, by_seed, covariance, 30, {})
    mine = of.contrast({"r8": 1, "r64": -0.98, losses.START: -0.02})
    other = drawn.interval(lambda x: x[..., 0] - 0.98 * x[..., 1] - 0.02 * x[..., 2])
    assert mine.over == other.over == "seeds and rows"
    np.testing.assert_allclose(mine[:3], other[:3], rtol=1e-9)


def collected(tmp_path, best: float = 2e-2) -> dict[str, losses.Losses]:
    """Losses of a made-up run of two ranks and three rates, of which `best` is the best."""
    loss = lambda row: 2.0 + (0.1 if row["rank"] == 8 else 0.0) + abs(row["lr"] - best)
    axes = {"rank": (8, 64), "lr": (1e-2, 2e-2, 4e-2)}
    run = make_study(tmp_path / "run", axes, loss, stopped=(1, 2))  # seeds 1, 2 of 8 at 1e-2
    losses.collect({"gpt2-nano": [run]}, tmp_path, ["rank"], "gpt2_rank_sweep")
    return losses.read(tmp_path, ["rank"])


def test_losses_are_collected_at_the_best_rates_and_contrasted(tmp_path):
    of = collected(tmp_path)["gpt2-nano"]
    assert of.split == "test" and set(of.members["lr"]) == {2e-2} and not of.doubt("8", "64")
    difference = of.contrast({"8": 1, "64": -1})
    assert difference.value == pytest.approx(0.1, abs=5e-3) and difference.over == "seeds and rows"
    assert difference.low < 0.1 < difference.high
    assert of.contrast({losses.START: 1}).value == pytest.approx(3.0)
    means = of.means().set_index("rank")
    assert (means["low"] < means["loss"]).all() and (means["loss"] < means["high"]).all()


def test_a_setting_with_its_best_rate_at_the_edge_is_in_doubt(tmp_path):
    of = collected(tmp_path, best=4e-2)["gpt2-nano"]
    assert of.doubt("64", "8") == "best rate of 64 at the edge of its grid, 0.04"


def test_a_run_of_another_study_or_not_finished_has_no_numbers(tmp_path):
    collected(tmp_path)
    with pytest.raises(ValueError, match="need a run of configs/other.py"):
        losses.collect({"gpt2-nano": [tmp_path / "run"]}, tmp_path, ["rank"], "other")
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace('"state": "finished', '"state": "running'))
    with pytest.raises(ValueError, match="the run is running; run its command again"):
        losses.collect({"gpt2-nano": [tmp_path / "run"]}, tmp_path, ["rank"], "gpt2_rank_sweep")


def test_layers_of_one_seed_are_no_samples_of_their_own():
    one = pd.DataFrame(np.add.outer([0.0, 0.1, 0.2], [1.0, 2.0, 3.0, 4.0]))
    wide = verdicts.crossed(one)
    naive = compare.interval(one.to_numpy().ravel())
    assert wide.value == pytest.approx(naive.value) and wide.high - wide.low > 2 * (
        naive.high - naive.low
    )


def test_numbers_of_another_base_stay(tmp_path):
    first = pd.DataFrame({"base": ["SmolLM2-135M"] * 2, "x": [1.0, 2.0]})
    verdicts.write(first, tmp_path, "x.csv")
    verdicts.write(pd.DataFrame({"base": ["gpt2-nano"], "x": [3.0]}), tmp_path, "x.csv")
    again = pd.DataFrame({"base": ["SmolLM2-135M"], "x": [np.pi]})
    verdicts.write(again, tmp_path, "x.csv")
    text = (tmp_path / "x.csv").read_text()
    assert text == "base,x\ngpt2-nano,3\nSmolLM2-135M,3.14159\n"
    assert verdicts.numbers(tmp_path, "none.csv").empty


def test_parts_and_bases_without_a_verdict_are_not_run():
    one = Verdict("b", "MiniLM CoLA", REPRODUCED, "1")
    found = verdicts.complete([one, Verdict("a", "gpt2-nano", UNDECIDED, "2")], ("a", "b"))
    assert [v.part for v in found] == ["a"] * 4 + ["b"] * 5 and found[-1] == one
    assert verdicts.complete([one], ("b",), ("MiniLM CoLA",)) == [one]
    assert found[0].verdict == UNDECIDED and found[1].verdict == NOT_RUN
    with pytest.raises(ValueError, match="no part of"):
        verdicts.complete([one], ("a",))


def test_commands_name_the_base():
    bases = ("gpt2-nano", "MiniLM CoLA", "SmolLM2-135M random")
    commands = verdicts.commands("x", *bases, flags="--config.seed=1")
    ends = [command.partition("x.py")[2] for (command,) in commands.values()]
    flag = "--config.seed=1"
    assert ends == [f" {flag}", f":minilm-cola {flag}", f":smollm2-random {flag}"]


@pytest.mark.parametrize(
    ("full", "verdict"),
    [(3.0, REPRODUCED), (1.5, CONTRADICTED), (2.0, UNDECIDED), (0.0, WITHDRAWN)],
)
def test_bits_are_compared_as_ratios_of_what_was_stored(full, verdict, tmp_path):
    """full: bits a parameter of full fine-tuning, where LoRA stores 2; if 0, LoRA stores 0, too."""
    rows = [
        ("gpt2-nano", "pretrained", method, "o", lr, seed, 0.5, bits * (1 - 0.1 * abs(lr - 2)))
        for method, bits in (("full", full), ("lora", 2.0 if full else 0.0))
        for lr in (1, 2, 3)
        for seed in range(3)
    ]
    columns = ["base", "weights", "method", "targets", "lr", "seed", "recalled"]
    table = pd.DataFrame(rows, columns=[*columns, "bits_per_parameter"])
    table["bits_per_parameter"] *= 1 + 0.01 * (table["seed"] - 1) * (table["method"] == "full")
    table.to_csv(tmp_path / "bits.csv", index=False)
    found = verdicts.rule("bits_per_parameter").verdicts(tmp_path)
    (first,) = [v for v in found if (v.part, v.base) == ("full above LoRA", "gpt2-nano")]
    assert first.verdict == verdict


def test_the_jackknife_of_a_mean_is_its_t_interval():
    x = np.random.default_rng(0).normal(size=7)
    members = pd.DataFrame({"seed": range(7), "x": x})
    jackknife = verdicts.rule("forgetting_law").jackknife
    found = jackknife(members, lambda table: table["x"].mean())
    np.testing.assert_allclose(found[:3], compare.interval(x)[:3], rtol=1e-12)
    bent = jackknife(members, lambda table: max(0.3, table["x"].mean()))
    assert bent.low <= bent.value <= bent.high and bent.value == pytest.approx(max(0.3, x.mean()))


# --------------------------------------------------------------------------------------- tables


def test_columns_of_bases():
    bases = ("MiniLM", "MiniLM CoLA", "MiniLM random", "LeNet")
    assert [tables.column(base) for base in bases] == ["MiniLM", "MiniLM", tables.RANDOM, "others"]


def test_a_readme_without_marks_is_told():
    with pytest.raises(ValueError, match="0 pairs of the lines .*; 1 expected"):
        tables.filled("text", ["| table |"])


def test_parts_stand_between_their_marks():
    begin, end = tables.MARKS
    text = f"A {begin}old{end} B {begin}{end}"
    written = tables.filled(text, ["one", "two"])
    assert written == f"A {begin}\n\none\n\n{end} B {begin}\n\ntwo\n\n{end}"
    assert tables.filled(written, ["one", "two"]) == written


def test_a_sentence_has_the_numbers_of_the_verdicts_that_it_was_written_for():
    sentence = opening.Sentence("c", "Rank {0} is enough.", (("p", "MiniLM", REPRODUCED),), "c.png")
    now = {"c": [Verdict("p", "MiniLM", REPRODUCED, "8")]}
    line = "1. Rank 8 is enough. ([claim](c/README.md), [figure](c/c.png))"
    assert opening.lines(now, [sentence]) == line
    changed = {"c": [Verdict("p", "MiniLM", UNDECIDED, "8")]}
    with pytest.raises(ValueError, match="c: p .MiniLM. is undecided; .* written for reproduced"):
        opening.lines(changed, [sentence])


@pytest.mark.parametrize("sentence", opening.SENTENCES, ids=lambda sentence: sentence.claim)
def test_a_sentence_has_a_figure(sentence):
    assert (verdicts.HERE / sentence.claim / sentence.figure).exists()


# ---------------------------------------------------------------------------------------- rerun


def test_rerun_compares_in_halves_of_the_committed_interval():
    old = Verdict("a", "MiniLM", REPRODUCED, "2", compare.Interval(2.0, 1.0, 3.0, "seeds"))
    new = old._replace(number="2.5", interval=compare.Interval(2.5, 1.0, 4.0, "seeds"))
    changed, text = rerun.compared([old], [new], ["MiniLM"])
    assert not changed and "+0.50 half intervals" in text and text.endswith("no verdict changed")
    changed, text = rerun.compared([old], [new._replace(verdict=UNDECIDED)], ["MiniLM"])
    assert changed and text.endswith("a verdict changed")
    assert rerun.compared([old], [new._replace(verdict=UNDECIDED)], ["gpt2-nano"])[0] is False


def test_rerun_refuses_what_it_does_not_know(capsys):
    assert rerun.main(["ranck"]) == 2
    assert "no claim 'ranck'" in capsys.readouterr().err
    assert rerun.main(["--list"]) == 0
    with pytest.raises(SystemExit):
        rerun.main([])
