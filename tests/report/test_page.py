"""A page of parts: what fails is said in its place, what is redrawn leaves nothing behind."""

import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest
from reading import Page
from synthetic import kernels, make_adapter, make_run, make_search

from lorax import report
from lorax.analysis import figures, intrinsic, tables
from lorax.report import charts, images, page
from lorax.report.__main__ import main
from lorax.report.pages import adapters, several_runs
from lorax.report.sections import members, outcome, setup


def fails(*_, **__):
    raise KeyError("planted [fault] <b>$x$</b>")


def files(directory):
    return {
        f"{path.parent.name}/{path.name}"
        for folder in ("figures", "analysis")
        for path in (directory / folder).iterdir()
    }


#: what fails -> (its section, a file that goes with it, headings and files that stay)
FAULTS = {
    "a figure's maker": (figures, "rank_curve", "Loss"),
    "learning curves": (figures, "learning_curves", "Learning curves"),
    "a table": (members, "members", "Members"),
    "the answer": (outcome, "section", "Answer"),
    "facts": (setup, "facts", "What was run"),
    "spectra": (figures, "spectra", "Spectra of the updates"),
    "ranks": (figures, "update_ranks", "Effective rank"),
    "similarity": (figures, "diagonal", "Subspace similarity"),
    "the base": (figures, "intruder_counts", "Against the base"),
    "all updates": (tables, "spectra", "Updates"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_section_that_fails_is_an_error_in_its_place(name, whole, tmp_path, undrawn, monkeypatch):
    directory = shutil.copytree(whole, tmp_path / "run")
    headings = Page((directory / "report.html").read_text()).headings
    module, function, title = FAULTS[name]
    monkeypatch.setattr(module, function, fails)
    with pytest.warns(
        page.SectionFailed, match=f"{title}: failed .*planted.*traceback in .*errors.txt"
    ):
        text = report.write(directory, kernels()).read_text()
    seen = Page(text)
    assert not seen.open and title in seen.headings
    section = text.split(f'id="{page.slug(title)}">')[1].split("</section>")[0]
    assert "This section could not be made: KeyError: &#x27;planted [fault] &lt;b&gt;" in section
    assert f"To redraw the page: <code>python -m lorax.report {directory}</code>" in section
    assert text.count("could not be made") == 1
    # The titles of parts of it, and of what comes of the same work.
    lost = {"Against the base": 4, "Subspace similarity": 3, "Updates": 9}.get(title, 0)
    assert len(seen.headings) >= len(headings) - lost and "Method notes" in seen.headings
    assert "settings.csv" in {path.name for path in (directory / "analysis").iterdir()}
    assert "in fails" in (directory / "errors.txt").read_text()


def test_a_figure_without_a_specification_costs_itself_alone(tmp_path, undrawn, monkeypatch):
    directory = make_run(tmp_path / "run", ranks=(1, 2), adapters=False)
    broken = lambda *_, **__: "no chart"
    monkeypatch.setattr(figures, "rank_curve", broken)
    with pytest.warns(page.SectionFailed, match="Loss against rank, figure rank_curve: failed"):
        text = report.write(directory).read_text()
    assert "Figure rank_curve could not be made: " in text and not Page(text).open
    assert Page(text).table("rank", "95% from")  # the table of the same section
    assert {"figures/rank_curve.csv", "figures/learning_curves.csv"} <= files(directory)
    assert "figures/rank_curve" not in text and 'data-chart="rank_curve"' not in text


def test_an_image_that_cannot_be_drawn_costs_itself_alone(tmp_path, monkeypatch, capsys):
    """Vega finds some faults of a chart only when it draws."""
    directory = make_run(tmp_path / "run", ranks=(1, 2), adapters=False)

    def draw(spec):
        if spec["title"] == "rank":
            raise ValueError("nothing(datum.x)")
        return b"drawn"

    monkeypatch.setitem(images.FORMATS, "png", draw)
    monkeypatch.setattr("warnings.filters", [])
    monkeypatch.setattr(charts, "read", lambda text: {"a": {"title": "rank"}, "b": {"title": ""}})
    assert main([str(directory), "--figures=png"]) == 1
    assert "lorax.report: figure a: failed (nothing(datum.x);" in capsys.readouterr().err
    assert "nothing(datum.x)" in (directory / "errors.txt").read_text()
    assert "figures/b.png" in files(directory) and "figures/a.png" not in files(directory)


def test_pages_of_searches_runs_and_adapters_too(tmp_path, undrawn, monkeypatch):
    make_search(tmp_path / "search")
    one, two = (make_run(tmp_path / name, ranks=(1, 2)) for name in ("one", "two"))
    make_adapter(tmp_path / "adapter", 0, base="elsewhere")
    for module in (intrinsic, figures):
        for name in ("estimate", "curves", "by_layer"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fails)
    with pytest.warns(page.SectionFailed, match="Intrinsic dimension"):
        text = report.write(tmp_path / "search").read_text()
    assert text.count("could not be made") == 1
    with pytest.warns(page.SectionFailed, match="Curves"):
        text = several_runs.write([one, two], tmp_path / "both").read_text()
    assert text.count("could not be made") == 1 and "Members" in Page(text).headings
    with pytest.warns(page.SectionFailed, match="Layer by layer"):
        text = adapters.write([tmp_path / "adapter"], None, tmp_path / "of").read_text()
    assert text.count("could not be made") == 1 and "What it is" in Page(text).headings


def test_the_command_ends_with_1_where_a_section_failed(tmp_path, undrawn, monkeypatch, capsys):
    make_run(tmp_path / "run", ranks=(1,), adapters=False)
    arguments = [str(tmp_path / "run"), "--base=gpt2-nano"]
    assert main(arguments) == 0
    monkeypatch.setattr(members, "members", fails)
    monkeypatch.setattr("warnings.filters", [])
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out.strip().endswith("report.html")
    assert said.err.startswith("lorax.report: Members: failed (KeyError: 'planted")
    assert "--base=gpt2-nano</code>" in (tmp_path / "run" / "report.html").read_text()


def test_a_redrawn_page_leaves_nothing_of_another(tmp_path, undrawn):
    """A page with the base, then one without: what the second does not write is gone, what a person
    or the run put there stays."""
    directory = make_run(tmp_path / "run", ranks=(1, 2))
    (directory / "analysis").mkdir()
    (directory / "analysis" / "sensitivity.csv").write_text(
        "member,path,energy,share,score,rank\n0,h/1/attn/v,3.0,0.9,0.006,4\n"
    )
    report.write(directory, kernels())
    (directory / "figures" / "mine.png").write_bytes(b"mine")
    assert {"figures/intruders.csv", "analysis/amplification.csv"} <= files(directory)
    text = report.write(directory).read_text()
    left = files(directory)
    assert not {name for name in left if "intruder" in name or "amplification" in name}
    assert {"figures/mine.png", "analysis/sensitivity.csv", "analysis/settings.csv"} <= left
    listed = set(json.loads((directory / page.MANIFEST).read_text())["files"])
    assert listed == left - {"figures/mine.png", "analysis/sensitivity.csv"}
    linked = {a["href"] for tag, a in Page(text).tags if tag == "a" and "href" in a}
    assert {name for name in linked if name.startswith("figures/")} <= left


def test_no_list_removes_what_is_not_a_pages(tmp_path, undrawn):
    directory = make_run(tmp_path / "run", ranks=(1,), adapters=False)
    (tmp_path / "precious").write_text("")
    names = ["../precious", "/etc/x", "status.json", "figures/../members.jsonl", 7, ""]
    (directory / page.MANIFEST).write_text(json.dumps({"files": names}))
    report.write(directory)
    assert (tmp_path / "precious").exists() and (directory / "members.jsonl").exists()
    assert (directory / "status.json").exists()


def test_the_command_that_redraws_a_page_draws_the_same(tmp_path, undrawn, monkeypatch, capsys):
    """With every argument, quoted: names with spaces and signs that a shell would take apart."""
    monkeypatch.chdir(tmp_path)
    factors = make_adapter(tmp_path / "plain", 0)
    arrays = {}
    for path, (a, b, *_) in factors.items():
        module = path.replace("/", ".")
        arrays |= {f"{module}.lora_A": a.T, f"{module}.lora_B": b.T}
    np.savez(tmp_path / "my $1 adapter.npz", **arrays)
    make_run(tmp_path / "a run", ranks=(1,), adapters=False)
    make_run(tmp_path / "-run", ranks=(2,), adapters=False)
    for arguments in (
        ["my $1 adapter.npz", "--alpha=8.0", "--layers=1", "--out=my page; ls"],
        ["plain", "--base=gpt2-nano", "--out=other"],
        ["a run", "--base=gpt2-nano"],
        ["a run", "./-run", "--out=of two"],
    ):
        assert main(arguments) == 0
        written = pathlib.Path(capsys.readouterr().out.splitlines()[-1])
        text = written.read_text()
        said = text.split("<dt>Redraw this page</dt>")[1].split("<code>")[1].split("</code>")[0]
        command = shlex.split(page.html.unescape(said))
        assert command[:3] == ["python", "-m", "lorax.report"]
        assert sorted(command[3:]) == sorted(arguments)
        written.unlink()
        assert main(command[3:]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(written)
        assert written.read_text() == text
