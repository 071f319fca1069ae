"""A run that was cut continues as if it had not been: every logged number and every bit of the last checkpoint."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import soak
import yaml

from deepvit.engine.folder import RunFolder
from deepvit.engine.step import Stepper
from deepvit.run.launch import run_rank


@pytest.fixture(scope="module")
def config():
    return soak.compose("schedule.steps=45")


@pytest.fixture(scope="module")
def uncut(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "uncut"
    run = soak.train(config, folder)
    assert run.wait(180) == 0, run.words()
    return folder


def test_killed_five_times(config, uncut, tmp_path):
    """While starting, training, saving and evaluating, with 0, 1 and 2 loading processes in turn."""
    tally = soak.Kills()
    soak.run_cut(config, tmp_path / "cut", random.Random(0), 5, tally, longest=0.8, workers=(0, 1, 2))
    assert tally.count >= 3
    assert soak.record(tmp_path / "cut") == soak.record(uncut)
    assert soak.fingerprint(tmp_path / "cut") == soak.fingerprint(uncut)
    assert [line["step"] for line in soak.lines(uncut / "metrics.jsonl") if "lr" in line] == list(range(1, 46))


def test_what_was_due_at_a_stop_is_done_once(tmp_path, monkeypatch):
    """An evaluation is due every two steps, kept weights every three."""
    class Killed(BaseException):
        pass

    config = soak.compose(
        "schedule.steps=7", "schedule.warmup_steps=2", "schedule.eval_steps=2", "engine.save_every=50", "logger=null",
        "engine.keep_epochs=1", "engine.device_batch=32", "data.fraction=0.06")
    update = Stepper.update
    moments = [(1, "stop"), (2, "kill"), (2, "stop"), (6, "stop")]  # before the update of that batch
    for name, moment in [("uncut", None), *(("cut", moment) for moment in moments), ("cut", None)]:
        def updated(self, state, batches, stop=None, moment=moment):
            if moment == (state.step, "kill"):
                raise Killed
            if moment == (state.step, "stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, state, batches, stop)

        monkeypatch.setattr(Stepper, "update", updated)
        with suppress(Killed):
            assert run_rank("train", config, tmp_path / name).code == (75 if moment else 0)
    assert soak.differences(tmp_path / "uncut", tmp_path / "cut") == 0
    kept = [{path.name for path in (tmp_path / name / "checkpoints").iterdir()} for name in ("uncut", "cut")]
    assert "step-3.pt" in kept[0] and kept[0] == kept[1]


def test_lines_of_metrics_that_are_lost_or_foreign(tmp_path):
    """The tail went with the machine's power while the last checkpoint stands, or the user wrote a line."""
    config = soak.compose("schedule.steps=4", "schedule.warmup_steps=2", "schedule.eval_steps=2", "logger=null",
                          "engine.device_batch=32", "data.fraction=0.06")
    assert run_rank("train", config, tmp_path / "whole").code == 0
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    evaluated = [index for index, line in enumerate(lines) if '"top1"' in line]
    note = '{"step": "all", "note": "mine"}\n'
    for name, kept in [("tail", lines[:evaluated[-1]]), ("all", lines[:evaluated[0]]), ("foreign", [note, *lines])]:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "metrics.json").unlink()
        (folder / "metrics.jsonl").write_text("".join(kept))
        outcome = run_rank("train", config, folder)
        assert outcome.code == 0, outcome.message
        results = [json.loads((tmp_path / one / "metrics.json").read_text()) for one in ("whole", name)]
        assert results[0]["loss"] == results[1]["loss"] and results[0]["top1"] == results[1]["top1"]
    assert (folder / "metrics.jsonl").read_text().startswith(note)
    assert soak.fingerprint(tmp_path / "whole") == soak.fingerprint(tmp_path / "tail")
    assert [len(soak.lines(tmp_path / one / "metrics.jsonl")) for one in ("whole", "tail")] == [len(lines)] * 2


def test_a_result_whose_steps_are_no_number_is_not_a_finished_runs(tmp_path):
    folder = RunFolder(tmp_path)
    for steps, finished in ((4, True), ("4", False), (None, False)):
        folder.result.write_text(json.dumps({"finished": True, "top1": 50.0, "steps": steps}))
        assert folder.is_finished() is finished


def test_weights_alone_do_not_continue_a_run(tmp_path):
    """The best checkpoint was copied over the last one; and a digest may be anything."""
    config = soak.compose("schedule.steps=1", "schedule.warmup_steps=0", "logger=null", "engine.device_batch=32",
                          "data.fraction=0.06")
    assert run_rank("train", config, tmp_path).code == 0
    (tmp_path / "metrics.json").unlink()
    last, best = (tmp_path / "checkpoints" / name for name in ("last.pt", "best.pt"))
    last.with_name("last.pt.sha256").write_bytes(b"\xff")
    assert run_rank("train", config, tmp_path).code == 0  # from the checkpoint before
    (tmp_path / "metrics.json").unlink()
    last.with_name("previous.pt").unlink()
    for suffix in ("", ".sha256"):
        shutil.copy(f"{best}{suffix}", f"{last}{suffix}")
    outcome = run_rank("train", config, tmp_path)
    assert outcome.code == 2 and f"{last} holds weights alone" in outcome.message


@pytest.mark.slow
def test_killed_twenty_times(config, uncut, tmp_path):
    tally, number = soak.Kills(), 0
    while tally.count < 20:
        folder = tmp_path / f"cut{number}"
        soak.run_cut(config, folder, random.Random(number), 10, tally, longest=0.8, workers=(2, 1, 0))
        assert soak.differences(uncut, folder) == 0
        number += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
                         ids=lambda number: number.name)
def test_asked_to_stop(config, uncut, tmp_path, number):
    """Within one step of the request: a checkpoint of that step, PREEMPTED, 75; then it goes on to the same bits."""
    folder = tmp_path / "run"
    run = soak.train(config, folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 5)
    run.send(number)
    asked, before = time.monotonic(), soak.step_reached(folder)
    assert run.wait() == 75
    assert time.monotonic() - asked < 5
    event, = soak.events(folder, "PREEMPTED")
    assert event["signal"] == number.name and event["saved"]
    assert before <= event["step"] == soak.step_reached(folder) <= before + 2  # the line of a step may just be missing
    assert f"Stopped at step {event['step']} on request ({number.name})" in run.words()
    assert soak.train(config, folder).wait() == 0
    assert soak.differences(uncut, folder) == 0


def test_asked_to_stop_while_evaluating(config, uncut, tmp_path):
    folder = tmp_path / "run"
    slow = soak.changed(config, data_eval_batch_size=1)
    run = soak.train(slow, folder)
    run.wait_until(lambda: soak.step_reached(folder) == 10)
    run.send(signal.SIGTERM)
    assert run.wait() == 75
    assert soak.events(folder, "PREEMPTED")[0]["step"] in (10, 11)
    assert soak.train(config, folder).wait() == 0
    assert soak.differences(uncut, folder) == 0


@pytest.mark.slow
def test_signal_to_the_whole_group_spares_the_loading_processes(config, uncut, tmp_path):
    """As a job scheduler sends it; torch's own handler would end the loading processes and so the run."""
    folder = tmp_path / "run"
    run = soak.train(soak.changed(config, data_workers=2), folder, own_group=True)
    run.wait_until(lambda: soak.step_reached(folder) >= 5)
    run.send(signal.SIGTERM, group=True)
    assert run.wait() == 75, run.words()
    assert soak.train(config, folder).wait() == 0
    assert soak.differences(uncut, folder) == 0


def test_the_lock_ends_with_its_process(config, tmp_path):
    """Also where loading processes outlive it for seconds."""
    folder = tmp_path / "run"
    run = soak.train(soak.changed(config, data_workers=2), folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 3)
    run.send()
    run.wait()
    again = soak.train(config, folder)
    again.wait_until(lambda: soak.step_reached(folder) >= 8)
    second = soak.train(config, folder, log=tmp_path / "second.log")
    assert second.wait() == 2
    assert second.words().strip() == (f"The run folder {folder} is in use by process {again.pid} on "
                                      f"{soak.events(folder, 'start')[0]['host']}: wait for it or stop it.")
    again.send(signal.SIGTERM)
    assert again.wait() == 75
    assert not soak.events(folder, "resume")[0]["restarts"]


@pytest.mark.slow
def test_the_program_itself_is_killed_and_continues(tmp_path):
    """`python train.py`, not a function of ours: killed once, then run to its end; a third start has nothing to do."""
    command = [sys.executable, "train.py", "model=vit", "model.depth=1", "model.embed_dim=16", "model.num_heads=2",
               "schedule.epochs=2", "engine.save_every=2", "engine.log_every=1", "probe.images=0",
               f"hydra.run.dir={tmp_path / 'run'}"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=soak.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start()
    end = time.monotonic() + 120
    while soak.step_reached(tmp_path / "run") < 4 and first.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    first.kill()
    first.communicate()
    words = start().communicate(timeout=120)[0]
    step = int(re.search(r"Continuing from step (\d+) in", words)[1])
    assert step >= 2 and "Finished: top-1" in words
    assert [line["step"] for line in soak.lines(tmp_path / "run" / "metrics.jsonl") if "lr" in line] == [
        *range(1, len(soak.losses(tmp_path / "run")) + 1)]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    finished = soak.train(config, tmp_path / "run")
    assert finished.wait() == 0 and "is finished" in finished.words()
    changed = soak.train(soak.changed(config, optimizer_lr=0.5), tmp_path / "run", log=tmp_path / "changed.log")
    assert changed.wait() == 2 and "finished with other settings: optimizer.lr was 0.002" in changed.words()
