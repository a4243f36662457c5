"""A page that is handed on: one file with all in it, without paths of the machine it is from."""

import base64
import gzip
import json
import re

import pandas as pd
import pytest
from reading import Page
from synthetic import kernels, make_run

from lorax import report
from lorax.report import sharing
from lorax.report.__main__ import main
from lorax.report.pages import one_run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """(the run's directory, the shared page); the folders have spaces and a person's name."""
    folder = tmp_path_factory.mktemp("home") / "ada lovelace"
    directory = make_run(folder / "my run", ranks=(1, 2))
    config = json.loads((directory / "config.json").read_text())
    config["config"]["base"] = str(folder / "models" / "a base")
    config["command"] = f"python -m lorax.run --workdir='{directory}' '--config={folder}/sweep.py'"
    (directory / "config.json").write_text(json.dumps(config))
    written = one_run.write(directory, kernels(), share=folder / "page.html")
    return directory, written.read_text()


def inside(text):
    """{name: bytes} of the files in a page."""
    links = re.findall(r'<a download="([^"]+)" href="data:[^;]+;base64,([^"]+)">', text)
    files = {name: base64.b64decode(data) for name, data in links}
    return {
        name.removesuffix(".gz"): gzip.decompress(data) if name.endswith(".gz") else data
        for name, data in files.items()
    }


def test_a_shared_page_has_its_files_in_it(shared, tmp_path):
    directory, text = shared
    assert not Page(text).open and len(text) < 5e6
    assert {path.name for path in directory.parent.iterdir()} == {"my run", "page.html"}
    assert not (directory / "report.html").exists() and not (directory / "figures").exists()
    addresses = [a["href"] for tag, a in Page(text).tags if tag == "a"]
    assert all(address.startswith(("#", "https:", "data:")) for address in addresses)
    files = inside(text)
    assert {"rank_curve.csv", "settings.csv", "config.json"} <= set(files)
    (tmp_path / "curve.csv").write_bytes(files["rank_curve.csv"])
    assert set(pd.read_csv(tmp_path / "curve.csv")["rank"]) == {1, 2}
    assert json.loads(files["config.json"])["config"]["base"] == "a base"


def test_a_shared_page_names_no_path_of_this_machine(shared):
    directory, text = shared
    parts = [text, *(data.decode(errors="ignore") for data in inside(text).values())]
    assert not any("lovelace" in part or str(directory.parents[2]) in part for part in parts)
    commands = re.findall(r'<pre class="command"><code>(python.*?)</code>', text)
    for said in ("--config=sweep.py", "python -m lorax.report &#x27;my run&#x27;"):
        assert any(said in command for command in commands), said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--workdir=/home/ada/runs/a --x", "--workdir=a --x"),
        ("~/models/base, ../data", "base, data"),
        ("h/0/attn/q and 1/√n", "h/0/attn/q and 1/√n"),
        ("https://arxiv.org/abs/2106.09685", "https://arxiv.org/abs/2106.09685"),
        ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M"),
        ("<td>a/b</td></tr>", "<td>a/b</td></tr>"),
        ("/mine/stat.py:rank", "stat.py:rank"),
    ],
)
def test_paths_become_names(text, said):
    assert sharing.without_paths([])(text) == said


def test_wrong_names_of_a_shared_page_are_said(tmp_path, capsys):
    run = str(make_run(tmp_path / "run", ranks=(1,), adapters=False))
    assert main([run, "--share=page.pdf"]) == 2
    assert "--share=page.pdf: the name of a file that ends with .html" in capsys.readouterr().err
    assert main([run, "--share=page.html", "--out=there"]) == 2
    assert "leave --out away" in capsys.readouterr().err
    assert main([run, "--share=page.html", "--figures=png"]) == 2
    assert "--figures: files beside a page" in capsys.readouterr().err
    assert main([run, "--figures=png,gif"]) == 2
    assert "--figures: 'gif' given, must be some of png, pdf" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--figures: 'gif' given, must be some of png, pdf"):
        report.draw(run, figures=("png", "gif"))
