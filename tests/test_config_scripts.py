"""A user's own config script: what is wrong in it is one line with its place."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lorax import command_line

ROOT = Path(__file__).parents[1]
HEAD = "from lorax.config import default\ndef get_config(arg=None):\n    c = default()\n"
SCRIPTS = {
    "name": (HEAD + "    c.train.lr = undefined\n", ":4: NameError: name 'undefined' is"),
    "key": (HEAD + "    c.train.lrr = 1\n", ':4: AttributeError: .*Did you mean "lr"'),
    "type": (HEAD + "    c.train.lr = 'x'\n", ":4: TypeError: Could not override field 'lr'"),
    "syntax": (HEAD + "    c.train.lr = (\n", r":4: '\(' was never closed"),
    "import": ("import nolib\n" + HEAD, ":1: ModuleNotFoundError: No module named 'nolib'"),
    "own words": (HEAD + "    raise ValueError('no such size')\n", ":4: no such size$"),
    "file": (HEAD + "    open('/no/such')\n", ":4: no such file or directory: /no/such"),
    "none": (HEAD, ": get_config returns NoneType; expected the ConfigDict"),
    "dict": (HEAD + "    return {}\n", ": get_config returns dict; expected the ConfigDict"),
    "no function": ("x = 1\n", "AttributeError: module '--config' has no attribute 'get_config'"),
    "argument": (HEAD + "    return c\n", ":foo: the script ignores 'foo'; expected"),
    "no parameter": ("def get_config():\n    pass\n", "takes 0 positional arguments but 1 was"),
}


@pytest.mark.parametrize("fault", SCRIPTS)
def test_an_error_in_a_config_script_has_its_file_and_line(fault, tmp_path):
    text, message = SCRIPTS[fault]
    script = tmp_path / "study.py"
    script.write_text(text)
    given = f"--config={script}" + ":foo" * (fault in ("argument", "no parameter"))
    code = "import sys; from lorax import run; sys.exit(run.main(sys.argv))"
    # A process each: absl's flags are the process's.
    done = subprocess.run(
        [sys.executable, "-c", code, given], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING:absl")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    place = str(script) if message.startswith(":") else ""
    assert re.search(re.escape(place) + message, lines[0])


IGNORING = {"gpt2_rank_sweep", "methods_compare", "intrinsic_dimension_digits"}
IGNORING |= {"diffusion_rank"}


@pytest.mark.parametrize("script", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_a_script_that_ignores_its_argument_is_known(script):
    assert command_line.ignores_argument(str(script)) == (script.stem in IGNORING)


@pytest.mark.filterwarnings("ignore:the load_module.*:DeprecationWarning")  # of ml_collections
def test_a_key_whose_default_is_none_is_set_to_it(tmp_path):
    """What the script sets: rates that are tuned, with four-bit weights."""
    script, lines = tmp_path / "tuned.py", "    c.sweep.lr, c.sweep.tune = (1e-3, 1e-2), 'lr'\n"
    script.write_text(HEAD + lines + "    c.quant = 'nf4'\n    return c\n")
    given = ["--config.sweep.tune=None", "--config.quant=None"]
    settings, members, folder = command_line.read(["lorax.run", f"--config={script}", *given])
    assert settings.sweep.tune is None and settings.quant is None and len(members) == 2
    assert folder.name == "tuned-quant=none,tune=none"
