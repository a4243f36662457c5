"""Parts whose workers somebody else starts."""

import functools
import threading
from pathlib import Path

import pytest
from launching import fakes

from lorax import rundir
from lorax.launching import elsewhere, state

options = functools.partial(fakes.options, elsewhere, "--workers=3")


def work(part: Path, *errors):
    """Workers of a part, one after another: each raises its error, or ends well (None)."""
    for error in errors:
        try:
            with rundir.locked(part), state.recorded(part):
                if error:
                    raise error
        except Exception as raised:
            assert raised is error


def test_parts_end_as_their_files_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "SECONDS", 0.01)
    waiting = [tmp_path / "parts" / str(i) for i in range(4)]
    for part in waiting:
        part.mkdir(parents=True)
    work(waiting[3], None)  # before this launcher
    lost, wrong = RuntimeError("device lost"), ValueError("lr: 0 given")
    plans = [(lost, lost, None), (lost, lost, lost), (lost, wrong)]

    def run():
        for part, plan in zip(waiting, plans, strict=False):
            while not (part / state.LAUNCH).exists():
                pass
            work(part, *plan)

    thread = threading.Thread(target=run)
    thread.start()
    found = dict(elsewhere.run(waiting, options("--retries=2")))
    thread.join()
    assert found[waiting[0]] is None and found[waiting[3]] is None
    assert found[waiting[1]].startswith("device lost; see ")
    assert found[waiting[2]].startswith("lr: 0 given; see ")
    assert capsys.readouterr().out.endswith(f"python -m lorax.launching.worker {waiting[0]}\n")


def test_what_can_not_work_is_refused_before():
    with pytest.raises(ValueError, match="--gpus: -1 given, must be at least 0"):
        options("--gpus=-1")
