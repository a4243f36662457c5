"""What a run says: on anything but a terminal, lines."""

from lorax.terminal import Screen


def test_asking_for_colour_does_not_make_a_pipe_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebooks ask their subprocesses
    with Screen() as screen:
        for done in range(11):
            screen.progress(done, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0].strip() for line in lines] == [str(n) for n in range(0, 101, 10)]
    assert "\x1b" not in "".join(lines)
