"""The progress bar, on a real terminal and in a real notebook."""

import logging
import os
import pty
import re
import select
import sys
import termios
import threading
import time
from collections.abc import Iterator
from typing import Any

import nbclient
import nbformat
import pytest

from sparkdl.progress import Progress, is_notebook, is_terminal

PLAN = {
    "event": "plan",
    "epochs": 3,
    "steps": 10,
    "rows": 100,
    "shards": 2,
    "cache": "memory",
    "batch_size": 10,
    "world_size": 2,
    "device": "cpu",
    "threads": 1,
    "resumed": 0,
}

_MARK = "\0read so far\0"


def step(epoch: int, number: int, **more: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "epoch": epoch,
        "step": number,
        "global_step": 10 * (epoch - 1) + number,
        "loss": 0.5,
        **more,
    }


def epoch(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "step": 10 * number, "loss": 0.25, "rows_per_second": 1234.0, **more}


class Terminal:
    """A pseudo-terminal in the place of stderr, and what was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 200))
        self._stderr = os.fdopen(slave, "w")
        self._monkeypatch = monkeypatch

    def progress(self, *, shown: bool = True) -> Progress:
        """Progress on this terminal; for the test itself to call, as pytest sets stderr before each of its phases."""
        self._monkeypatch.setattr(sys, "stderr", self._stderr)
        return Progress(shown=shown)

    def text(self) -> str:
        """All that was written since the last call."""
        self._stderr.write(_MARK)  # what is written to a pseudo-terminal takes its time to come out of it
        self._stderr.flush()
        found = b""
        while not found.endswith(_MARK.encode()):
            assert select.select([self._master], [], [], 20)[0]
            found += os.read(self._master, 65536)
        return found.decode().removesuffix(_MARK)

    def last_line(self) -> str:
        """What somebody would see on the last line that is not empty."""
        lines = re.split(r"[\r\n]+", self.text())
        return next(line for line in reversed(lines) if line.strip())

    def close(self) -> None:
        self._stderr.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    found = Terminal(monkeypatch)
    yield found
    monkeypatch.undo()
    found.close()


# ---- on a terminal ---------------------------------------------------------------------------------------------------
def test_the_bar_says_where_the_fit_is_and_what_holds_it_up(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        assert is_terminal()
        progress(PLAN)
        assert re.search(r"epoch 1/3: +0%.* 0/30 ", terminal.last_line())
        progress(step(1, 4, rows_per_second=5000.0, data_wait=0.031, synchronisation=0.2))
        time.sleep(0.11)  # tqdm draws ten times a second at most
        progress(step(1, 7, rows_per_second=5000.0, data_wait=0.031, synchronisation=0.2))
        line = terminal.last_line()
        assert re.search(r"epoch 1/3: +23%.* 7/30 \[", line)
        assert re.search(r"<\d\d:\d\d, ", line)  # what is left
        assert "loss=0.5, rows/s=5000, data wait=3%, sync=20%" in line
        progress(epoch(1, validation_loss=0.75))
        assert re.search(r"10/30 .*loss=0.25, validation=0.75, rows/s=1234,", terminal.last_line())
        for number in (2, 3):
            progress(epoch(number))
    line = terminal.last_line()
    assert re.search(r"epoch 3/3: 100%.* 30/30 ", line)
    assert "validation=0.75" in line  # the last that is known
    assert terminal.text() == ""


def test_a_fit_that_stops_early_has_a_full_bar_that_says_so(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        progress(PLAN)
        progress(epoch(1))
        progress(epoch(2))
    assert re.search(r"epoch 2/3, stopped early: 100%.* 20/20 ", terminal.last_line())


def test_a_fit_whose_events_were_lost_has_a_full_bar(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        progress(PLAN)
        progress(epoch(1))
        progress(step(2, 5))
    line = terminal.last_line()
    assert re.search(r"epoch 2/3: 100%.* 15/15 ", line)
    assert "stopped early" not in line


def test_a_fit_that_fails_leaves_its_bar_where_it_was(terminal: Terminal) -> None:
    progress = terminal.progress()

    def fit() -> None:
        with progress:
            progress(PLAN)
            progress(epoch(1))
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        fit()
    text = terminal.text()
    assert re.search(r"epoch 1/3: +33%.* 10/30 ", text)
    assert text.endswith("\n")  # what is printed next begins on a line of its own
    progress(epoch(2))  # an event that was still on its way
    assert terminal.text() == ""


def test_a_restart_goes_on_where_its_checkpoint_was_written(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        progress(PLAN)
        progress(epoch(1))
        progress(epoch(2))
        terminal.text()
        progress({**PLAN, "world_size": 1, "resumed": 15})
        assert re.search(r"epoch 2/3: +50%.* 15/30 ", terminal.last_line())
        assert progress.plan["world_size"] == 1
        progress(step(2, 7))
        time.sleep(0.11)
        progress(step(2, 8))
        assert re.search(r" 18/30 ", terminal.last_line())
        progress(epoch(2))
        progress(epoch(3))
    line = terminal.last_line()
    assert re.search(r"epoch 3/3: 100%.* 30/30 ", line)
    (rate,) = re.findall(r"([\d.]+)step/s", line)
    assert float(rate) < 300  # 15 steps took a tenth of a second; with those of the checkpoint it were twice as many


def test_a_resumed_fit_starts_its_bar_there(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        progress({**PLAN, "resumed": 20})
        assert re.search(r"epoch 3/3: +67%.* 20/30 ", terminal.last_line())
        progress(epoch(3))


def test_skipped_steps_do_not_hold_the_bar_back(terminal: Terminal) -> None:
    with terminal.progress() as progress:
        progress(PLAN)
        for number in (1, 2, 3):
            progress({**epoch(number), "step": 9 * number, "skipped_steps": 1})
    assert re.search(r"epoch 3/3: 100%.* 30/30 ", terminal.last_line())


def test_events_may_come_from_another_thread_while_the_fit_ends(terminal: Terminal) -> None:
    progress, begun = terminal.progress(), threading.Event()

    def send() -> None:
        progress(PLAN)
        for number in range(1000):
            progress(step(1 + number // 400, 1 + number % 10))
            begun.set()

    thread = threading.Thread(target=send)
    with progress:
        thread.start()
        assert begun.wait(20)
    before = terminal.text()
    thread.join(20)
    assert before.endswith("\n")
    assert terminal.text() == ""


# ---- elsewhere -------------------------------------------------------------------------------------------------------
def test_without_a_terminal_the_bar_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_terminal()
    assert not is_notebook()
    with Progress(shown=True) as progress:
        for event in (PLAN, step(1, 5), epoch(1), {"event": "rebalance"}):
            progress(event)
    assert capsys.readouterr() == ("", "")


def test_verbose_false_is_quiet_on_a_terminal(terminal: Terminal) -> None:
    with terminal.progress(shown=False) as progress:
        for event in (PLAN, step(1, 5), epoch(1)):
            progress(event)
    assert terminal.text() == ""


def test_a_fit_that_never_began_shows_nothing(terminal: Terminal) -> None:
    with terminal.progress():
        pass
    assert terminal.text() == ""


def test_the_log_has_a_line_for_the_plan_and_one_for_every_epoch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparkdl.progress"), Progress(shown=False) as progress:
        progress(PLAN)
        progress(epoch(1))
        progress(epoch(2, validation_loss=0.5, validation_f1=0.75, validation_seconds=3.0))
    assert caplog.messages == [
        "2 ranks on cpu, 1 torch threads each; batchSize 10 = 2 x 5; 100 rows, 2 shards, 10 steps per epoch",
        "kept for later epochs: memory",
        "epoch 1: loss 0.25, 1234 rows/s",
        "epoch 2: loss 0.25, validation loss 0.5, validation f1 0.75, 1234 rows/s",
    ]


def test_a_notebook_shows_the_bar_and_the_plot_of_a_history() -> None:
    cells = [
        "from sparkdl.history import History\nHistory([{'epoch': 1, 'loss': 1.0}]).plot()",
        f"from sparkdl.progress import Progress\nwith Progress(shown=True) as progress:\n    progress({PLAN!r})\n"
        f"    for number in (1, 2):\n        progress({{**{epoch(1)!r}, 'epoch': number}})\n",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    (picture,) = book.cells[0].outputs
    assert picture.data["image/png"]
    # With ipywidgets the text of the bar is that of its widget, else it goes to stderr.
    shown = str(book.cells[1].outputs) + str(book.metadata.get("widgets", ""))
    assert re.search(r"epoch.2/3,.stopped.early:.100%", shown)
