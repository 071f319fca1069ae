"""What a person sees in a terminal while a run works: the screen after a run in a pseudo-terminal."""

import os
import pty
import re
import termios
import threading
from pathlib import Path

import pytest
import soak

pyte = pytest.importorskip("pyte")
ROWS = 50


def screens_of_a_run(tmp_path, columns: int) -> list[list[str]]:
    """The screen after each piece of output of a run in a terminal of `columns`, top line first."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (ROWS, columns))
    screen = pyte.Screen(columns, ROWS)
    stream, seen = pyte.ByteStream(screen), []

    def read() -> None:
        while True:
            try:
                stream.feed(os.read(master, 1 << 16))
            except OSError:  # the last process that had it open is gone
                return
            seen.append([line.rstrip() for line in screen.display])

    config = soak.compose("engine.log_every=2", "probe.images=0", "schedule.steps=20",
                          "schedule.warmup_steps=2", "schedule.eval_steps=5", "engine.save_every=100")
    run = soak.start(soak._train, config, str(tmp_path / "run"), folder=tmp_path / "run", log=Path(os.ttyname(slave)),
                     environment={"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""})
    reader = threading.Thread(target=read)
    reader.start()
    code = run.wait()
    os.close(slave)
    reader.join()
    assert code == 0, "\n".join(seen[-1])
    os.close(master)
    return seen


@pytest.mark.parametrize("columns", [80, 120])
def test_evaluations_stay_on_the_screen_and_the_bar_is_whole_and_goes(tmp_path, columns):
    seen = screens_of_a_run(tmp_path, columns)
    last = [line for line in seen[-1] if line]
    evaluated = [line for line in soak.lines(tmp_path / "run" / "metrics.jsonl") if "top1" in line]
    assert len(evaluated) == 4
    for line in evaluated:
        assert sum(f"step {line['step']} " in row and f"top-1 {line['top1']:.2f} %" in row for row in last) == 1, last
    assert "Finished" in "".join(last[-2:])
    assert not any("\u2501" in row or row.startswith(("train ", "evaluate ")) for row in last)

    bars = [[row for row in screen if row.startswith("train ")] for screen in seen]
    assert max(map(len, bars)) == 1  # no dead one above the living one
    told = [rows[0] for rows in bars if rows and "loss" in rows[0]]
    assert told
    for row in told:
        assert re.fullmatch(r"train +\d+/20 [\u2501\u2578\u257a ]{8,} loss \d\.\d{4} [\d.]+ img/s epoch \d\.\d\d"
                            r".* left (\d:\d\d:\d\d|-:--:--)", row), row
        assert ("lr " in row) == (columns == 120)
