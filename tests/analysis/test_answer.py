"""The answer of a sweep: which setting, how sure, and what to run next."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from synthetic import make_run, make_search, make_study

from lorax import config, rundir
from lorax.analysis import answer, runs
from lorax.analysis.answer import next_run
from lorax.run import show_answer

ROOT = pathlib.Path(__file__).parents[2]
RANKS = (1, 2, 4, 8, 16)


def bend(member):
    """Falls until rank 8 and is flat from there."""
    return 1 + 0.5 * max(0.0, 1 - member["rank"] / 8)


def ask(directory, axes, loss=bend, **more):
    found = answer.answer(runs.load(make_study(directory, axes, loss, **more)))
    assert json.loads(json.dumps(found, allow_nan=False)) is not None
    return found


def verdicts(found):
    return [row["verdict"] for row in found["settings"]]


# ---------------------------------------------------------------------------------------- deciding


def test_the_cheapest_setting_that_is_as_good_as_the_best(tmp_path):
    found = ask(tmp_path, {"rank": RANKS})
    assert found["verdict"] == "decided" and found["setting"] == {"rank": 8}
    assert found["metric"] == "loss" and found["split"] == "test" and found["unit"] == "nats"
    assert verdicts(found)[:4] == ["worse", "worse", "worse", "as good"]
    assert found["value"] == pytest.approx(1.0, abs=0.003)
    assert found["interval"]["low"] < found["value"] < found["interval"]["high"]
    assert found["interval"]["over"] == "seeds and rows" and found["interval"]["level"] == 0.95
    assert found["gain"]["low"] < 2.0 < found["gain"]["high"]
    assert found["baseline"]["value"] == pytest.approx(3.0) and found["members"] == [9, 10, 11]
    # 1% of what the best improves on the base.
    assert found["delta"]["value"] == pytest.approx(0.01 * found["best"]["gain"]["value"])
    first, second, third = answer.lines(found)
    assert first.startswith("Answer: rank 8 (800 trainable parameters) has test loss 1.00")
    assert "It is as good as the best, rank 16, within 0.020 nats." in first
    assert "over 3 seeds and 40 test rows" in second and third.startswith("Next (")


def test_cheap_is_by_parameters_not_by_rank(tmp_path):
    """Rank 2 on six targets has more parameters than rank 4 on one."""
    make_study(tmp_path, {"rank": (2, 4)}, lambda member: 1.0)
    rows = [json.loads(line) for line in (tmp_path / "members.jsonl").read_text().splitlines()]
    for row in rows:
        row["trainable_params"] = {2: 600, 4: 400}[row["rank"]]
    (tmp_path / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer.answer(runs.load(tmp_path))["setting"] == {"rank": 4}


def test_a_plateau_with_little_noise_is_decided_and_with_much_is_not(tmp_path):
    flat = lambda member: 1.0
    assert ask(tmp_path / "a", {"rank": RANKS}, flat, noise=1e-4)["setting"] == {"rank": 1}
    found = ask(tmp_path / "b", {"rank": RANKS}, flat, noise=0.03)
    assert found["verdict"] == "undecided" and found["chosen"] is None
    (open_,) = found["undecided"]
    assert open_["setting"] == {"rank": 1} and open_["seeds"] > 3
    first, _, third = answer.lines(found)
    assert (
        first.startswith("Undecided: ")
        and f"3 seeds can't tell; about {open_['seeds']} would" in first
    )
    assert "(with 20 seeds" in third and '--config.sweep.rank="(1, 2)"' in third


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_fewer_than_three_seeds_decide_nothing(tmp_path, seeds):
    found = ask(tmp_path, {"rank": RANKS}, seeds=seeds)
    assert found["verdict"] == "undecided" and found["chosen"] is None
    assert "at least 3 are needed" in found["why"] and found["interval"]["over"] == "rows"
    assert found["next"]["changes"]["seed"] == (0, 1, 2)


def test_without_test_rows_the_evaluation_rows_speak(tmp_path):
    found = ask(tmp_path, {"rank": RANKS}, rows=False)
    assert found["split"] == "eval" and found["interval"]["over"] == "seeds"
    assert "not over the rows, whose losses are not known" in answer.lines(found)[1]


def test_a_setting_with_a_diverged_seed_is_not_eligible(tmp_path):
    """Two seeds of rank 8 would be as good as rank 16."""
    found = ask(tmp_path, {"rank": (4, 8, 16)}, diverged=(4,))
    assert found["setting"] == {"rank": 16} and verdicts(found)[1] == "not eligible"
    (lost,) = found["excluded"]
    assert lost["setting"] == {"rank": 8} and lost["why"] == "diverged (member 4)"
    assert "Not eligible, because a seed diverged: rank 8" in answer.lines(found)[1]
    none = ask(tmp_path / "all", {"rank": (4, 8)}, diverged=range(6))
    assert none["setting"] is None and answer.lines(none)[0].startswith("No answer yet")


def test_a_setting_with_a_seed_less_is_not_eligible(tmp_path):
    make_study(tmp_path, {"rank": (4, 8)}, bend)
    lines = (tmp_path / "members.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "members.jsonl").write_text("".join(lines[:-1]))
    found = answer.answer(runs.load(tmp_path))
    assert found["setting"] == {"rank": 4} and found["excluded"][0]["why"] == "2 of 3 seeds"


def test_nothing_beats_the_base(tmp_path):
    found = ask(tmp_path, {"rank": (4, 8)}, lambda member: 3.1)
    assert found["verdict"] == "nothing beats the base" and found["chosen"] is None
    assert answer.lines(found)[0].startswith("Nothing beats the base: test loss 3.000 before")
    assert max(found["next"]["changes"]["lr"]) < 1e-2


def test_a_score_is_better_when_higher(tmp_path):
    asked = {"analysis": {"metric": "accuracy"}}
    score = lambda member: 0.95 - 0.05 * bend(member)
    found = ask(tmp_path, {"rank": RANKS}, score, metric="accuracy", config=asked)
    assert found["setting"] == {"rank": 8} and found["higher_is_better"]
    assert found["value"] == pytest.approx(0.9, abs=0.005) and found["gain"]["value"] > 0.79
    assert found["interval"]["over"] == "seeds and rows"  # each row's score is kept
    assert "0.800" in answer.lines(found)[0] and "above the base's 0.100" in answer.lines(found)[0]
    assert found["settings"][0]["behind"]["value"] > 0
    run = runs.load(make_study(tmp_path / "loss", {"rank": RANKS}, bend, config=asked))
    with pytest.raises(
        ValueError, match="analysis.metric: 'accuracy' given, this run measures loss"
    ):
        answer.answer(run)


def test_delta_and_level_are_the_configs(tmp_path):
    wide = {"analysis": {"delta": 0.15, "level": 0.9}}
    found = ask(tmp_path / "a", {"rank": RANKS}, config=wide)
    assert found["setting"] == {"rank": 4} and found["interval"]["level"] == 0.9
    found = ask(tmp_path / "b", {"rank": RANKS}, config={"analysis": {"margin": 0.4}})
    assert found["setting"] == {"rank": 2} and found["delta"]["value"] == 0.4
    settings = config.default()
    settings.analysis.delta = 0.0
    with pytest.raises(ValueError, match="analysis.delta"):
        config.members(settings)


# -------------------------------------------------------------------------------- several axes


def tuned(member):
    """Best at a rate of 1e-2."""
    return bend(member) + 0.3 * abs(np.log10(member["lr"] / 1e-2))


def test_every_rank_is_at_its_own_best_rate(tmp_path):
    best = {4: 1e-3, 8: 1e-2}
    loss = lambda member: bend(member) + 0.3 * (member["lr"] != best[member["rank"]])
    found = ask(tmp_path, {"rank": (4, 8), "lr": (1e-3, 1e-2)}, loss)
    assert [row["setting"] for row in found["settings"]] == [
        {"rank": 4, "lr": 1e-3},
        {"rank": 8, "lr": 1e-2},
    ]
    assert found["axes"] == {"compared": ["rank"], "at_its_best": ["lr"]}
    assert "each at its own best lr" in found["delta"]["rule"]
    assert found["neighbours"][0]["lower"]["behind"]["value"] == pytest.approx(0.25, abs=0.01)


def test_a_rate_at_the_edge_is_said_and_gone_beyond(tmp_path):
    found = ask(tmp_path, {"rank": (4, 8), "lr": (1e-3, 3e-3, 1e-2)}, tuned)
    edge = {edge["axis"]: edge for edge in found["edges"]}["lr"]
    assert edge["at"] == "higher" and edge["open"] and edge["also"] == ["rank 4"]
    assert edge["falls_at"] == ["higher"] and edge["fall"]["low"] > 0
    assert "The best lr, 0.01 (also of rank 4), is the largest tried" in answer.lines(found)[1]
    # All ranks stay: each may be best at another rate.
    assert found["next"]["changes"] == {"rank": (4, 8, 16, 32), "lr": (0.01, 0.03, 0.09)}
    inside = ask(tmp_path / "b", {"rank": RANKS, "lr": (1e-3, 1e-2, 1e-1)}, tuned)
    assert not any(edge["open"] for edge in inside["edges"])
    assert inside["next"]["changes"]["lr"] == (0.0032, 0.01, 0.032)


def test_rates_that_halving_stopped_are_no_candidates(tmp_path):
    axes = {"rank": (4, 8), "lr": (1e-3, 1e-2)}
    found = ask(tmp_path, axes, tuned, stopped=(0, 1, 2, 6, 7, 8))
    assert found["setting"] == {"rank": 8, "lr": 1e-2} and found["verdict"] == "decided"
    assert {row["why"].partition(" (")[0] for row in found["excluded"]} == {
        "stopped for better values"
    }
    assert found["diverged"] == []
    # More seeds race over the same rates.
    near = lambda member: 1 + 0.06 * (member["rank"] != 4) + 0.1 * (member["lr"] < 1e-2)
    out = [n for n in range(27) if n // 3 % 3 != 1]  # but for the middle rate of each rank
    noisy = {"stopped": out, "noise": 0.03, "config": {"sweep": {"tune": "lr"}}}
    found = ask(tmp_path / "b", {"rank": (2, 4, 8), "lr": (1e-3, 1e-2, 1e-1)}, near, **noisy)
    changes = found["next"]["changes"]
    assert found["verdict"] == "undecided" and changes["rank"] == (2, 4)
    assert len(changes["seed"]) > 3 and "lr" not in changes


def test_main_effects_are_over_balanced_settings(tmp_path):
    axes = {"rank": (4, 8), "lr": (1e-3, 1e-2, 1e-1)}
    found = ask(tmp_path, axes, tuned, diverged=(8,), noise=0)
    rank, lr = found["effects"]
    # Rank 4 at 0.1 diverged, so only two rates are averaged over, and one rank has all rates.
    assert (rank["settings"], rank["left_out"]) == (2, 1) and rank["averaged_over"] == ["lr"]
    assert rank["range"]["value"] == pytest.approx(0.25, abs=1e-5) and rank["best"] == 8
    assert (lr["settings"], lr["left_out"]) == (1, 1)
    np.testing.assert_allclose(lr["means"], [1.3, 1.0, 1.3], atol=1e-5)


def test_what_was_trained_on_other_data_is_not_compared(tmp_path):
    found = ask(tmp_path, {"n_train": (100, 200), "rank": (4, 8)})
    assert found["setting"] is None
    assert [one["condition"] for one in found["conditions"]] == [{"n_train": 100}, {"n_train": 200}]
    assert all(one["setting"] == {"rank": 8} for one in found["conditions"])
    first, *more = answer.lines(found)
    assert "differ in n_train can't be compared" in first and more[0].startswith("n_train 100: ")
    many = ask(tmp_path / "many", {"noise": tuple(range(6))}, seeds=(0,))
    assert len(answer.lines(many)) == 1


def test_full_fine_tuning_is_beside_the_answer(tmp_path):
    less = {"lora": 0.0, "dora": 0.3, "full": -0.1}
    loss = lambda member: 1 + less[member["method"]] + 0.2 * (member["lr"] > 1e-2)
    found = ask(tmp_path, {"method": tuple(less), "lr": (1e-2, 2e-2)}, loss)
    assert [row["setting"]["method"] for row in found["settings"]] == ["lora", "dora"]
    assert found["setting"] == {"method": "lora", "lr": 1e-2}
    full = found["full"]
    assert full["setting"] == {"method": "full", "lr": 1e-2} and full["behind"]["value"] > 0.09
    assert full["share_of_gain"]["value"] == pytest.approx(2.0 / 2.1, abs=0.01)
    assert "this setting has 95." in answer.lines(found)[1]


def test_one_method_beside_full_fine_tuning_goes_by_its_rank(tmp_path):
    """As sweep.full_lr trains it: without a rank, at a rate of its own."""
    make_study(tmp_path, {"rank": (4, 8, 16)}, bend)
    rows = [json.loads(line) for line in (tmp_path / "members.jsonl").read_text().splitlines()]
    for row in rows[-3:]:
        row |= {"method": "full", "rank": None, "lr": 2e-3, "trainable_params": 10**6}
    (tmp_path / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answer.answer(runs.load(tmp_path))
    assert found["words"] == "rank 8" and found["axes"]["compared"] == ["rank"]
    assert found["full"]["setting"] == {"method": "full", "lr": 2e-3}
    assert found["full"]["share_of_gain"]["value"] == pytest.approx(1.0, abs=0.01)
    (tmp_path / "members.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    found = answer.answer(runs.load(tmp_path))
    assert found["verdict"] == "one setting" and found["words"] == "rank 8" and found["full"]


# ------------------------------------------------------------------------------------ what is next


def test_an_axis_is_not_taken_beyond_what_is_possible(tmp_path):
    falls = lambda member: 2 - 0.2 * np.log2(member["rank"])
    assert ask(tmp_path / "a", {"rank": (1, 2, 4)}, falls)["next"]["changes"]["rank"] == (4, 8, 16)
    rises = lambda member: 1 + 0.2 * np.log2(member["rank"])
    (edge,) = ask(tmp_path / "b", {"rank": (1, 2, 4)}, rises)["edges"]
    assert edge["at"] == "lower" and edge["limit"] and not edge["open"]
    # Adapters tell how wide the matrices are: 24.
    make_run(tmp_path / "c", ranks=(6, 12, 24), seeds=(0, 1, 2))
    for line in ("members.jsonl", "metrics.jsonl"):
        assert (tmp_path / "c" / line).exists()
    field = answer.fields(runs.load(tmp_path / "c"))[0]
    assert next_run.is_limit(field, "rank", 24, "higher")
    assert not next_run.is_limit(field, "rank", 12, "higher")


COMMANDS = (
    "python -m lorax.run --config=configs/gpt2_rank_sweep.py",
    "python -m lorax.run --config configs/gpt2_rank_sweep.py '--config.sweep.rank=(1, 2)'",
    "python -m lorax.run --config=configs/gpt2_rank_sweep.py --config.sweep.seed '(5, 6)' "
    "--workdir=/tmp/x '--config.sweep.axes={\"train.warmup\": (0, 10)}'",
)
READ = """
import json, os, sys
from lorax import command_line
for sys.argv in json.load(sys.stdin):
    if not os.fork():
        settings, members, workdir = command_line.read(sys.argv)
        sweep = settings.sweep
        print(json.dumps([sweep.rank, sweep.targets, dict(sweep.axes), sweep.seed, str(workdir)]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def test_the_next_command_is_one_that_lorax_reads():
    changes = {"rank": (8, 16), "lr": (0.01, 0.03), "targets": (["q", "v"], ["all-linear"])}
    changes |= {"seed": (0, 1, 2), "train.warmup": (0, 50)}
    sweep = {"axes": {"train.warmup": [0, 10], "train.b2": [0.9]}}
    texts = [next_run.rerun(command, changes, sweep) for command in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps([shlex.split(text)[2:] for text in texts]),
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    axes = {"train.warmup": [0, 50], "train.b2": [0.9]}
    right = [[8, 16], [["q", "v"], ["all-linear"]], axes, [0, 1, 2]]
    assert [row[:4] for row in found] == [right] * 3
    assert found[2][4] == "/tmp/x-next"
    assert next_run.rerun("lorax.run(config, 'x')", changes, {}) is None


def test_axes_that_are_tied_go_on_together(tmp_path):
    tie = {"sweep": {"alpha": (2.0, 4.0, 8.0), "zip": [["rank", "alpha"]]}}
    falls = lambda member: 2 - 0.2 * np.log2(member["rank"])
    found = ask(tmp_path, {"rank": (1, 2, 4)}, falls, config=tie)
    assert found["next"]["changes"] == {"rank": (4, 8, 16), "alpha": (8.0, 16.0, 32.0)}


# ------------------------------------------------------------------------------- files and terminal


def test_the_terminal_says_what_the_file_holds(tmp_path, capsys):
    run = runs.load(make_study(tmp_path / "run", {"rank": (4, 8)}, bend))
    found = answer.write(run)
    assert answer.read(tmp_path / "run") == json.loads(json.dumps(found))
    assert answer.lines(answer.read(tmp_path / "run")) == answer.lines(found)
    assert rundir.answer(tmp_path / "run") == tmp_path / "run" / "analysis" / "answer.json"
    settings = config.default()
    show_answer(tmp_path / "run", settings)
    assert capsys.readouterr().out.splitlines()[1:] == answer.lines(found)
    settings.search.threshold = 0.9
    show_answer(make_search(tmp_path / "search"), settings)
    assert capsys.readouterr().out == ""


def test_adapters_come_with_commands(tmp_path):
    make_run(tmp_path, ranks=(2, 4), seeds=(0, 1, 2))
    found = answer.answer(runs.load(tmp_path))
    assert found["adapters"] == ["adapters/3", "adapters/5", "adapters/4"]
    folder = tmp_path / "adapters" / "3"
    assert found["commands"]["show"] == f"python -m lorax.convert show {folder}"
    assert found["commands"]["merge"].endswith(f"gpt2-nano {folder} {tmp_path}/merged-3")
    assert re.search(rf"PeftModel.from_pretrained\(model, '{folder}'\)", found["commands"]["peft"])
