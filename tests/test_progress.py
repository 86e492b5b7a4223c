import io

import pytest
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lqf_lightning import progress
from lqf_lightning.progress import track


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal would show."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    return screen


def test_items_pass_in_order_and_lazily():
    drawn = []
    tracked = track((drawn.append(k) or k for k in range(3)), "counting", total=3)
    assert drawn == []
    assert next(tracked) == 0
    assert drawn == [0]
    assert list(tracked) == [1, 2]


def test_a_log_file_shows_nothing(capsys):
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_the_work(terminal):
    assert list(track(iter("ab"), "counting sheep", total=2)) == ["a", "b"]
    assert "counting sheep" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_other_ranks_show_nothing(terminal, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert list(track(range(2), "counting")) == [0, 1]
    assert terminal.getvalue() == ""


def test_an_error_of_the_work_comes_through(terminal):
    def fail():
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        list(track(fail(), "failing", total=2))
