import pytest

from softmoe_clip.data_pipelines import progress as module
from softmoe_clip.data_pipelines.progress import progress


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.delenv("SOFTMOE_CLIP_QUIET", raising=False)


def test_without_a_terminal_lines_tell_count_rate_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with progress("packing", total=3, unit="pictures") as advance:
        advance()
        advance(2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("packing: 1/3 pictures, ")
    assert lines[0].endswith(" left")
    assert lines[1].startswith("packing: 3/3 pictures, ")
    assert lines[2].startswith("packing: 3 pictures in ")


def test_short_work_and_quiet_work_say_nothing(monkeypatch, capsys):
    with progress("packing", total=2) as advance:
        advance(2)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("SOFTMOE_CLIP_QUIET", "1")
    with progress("packing") as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("packing", total=2, unit="pictures") as advance:
        advance()
        advance()
    assert "packing" in capsys.readouterr().err


def test_errors_pass_through(capsys):
    with pytest.raises(KeyboardInterrupt), progress("packing"):
        raise KeyboardInterrupt
