"""What a run does when the disk, the numbers or another process let it down."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import faults
import pytest
import soak
import torch
import yaml

from deepvit.commands.main import main
from deepvit.engine import checkpoint
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.run.train import train


@pytest.fixture(scope="module")
def config():
    return soak.compose("schedule.steps=24", "probe.images=0")


@pytest.fixture(scope="module")
def uncut(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reliability") / "uncut"
    run = soak.train(config, folder)
    assert run.wait(180) == 0, run.words()
    return folder


@pytest.fixture
def stopped(config, tmp_path) -> Path:
    """A run asked to stop in its middle: a last checkpoint and one before it."""
    folder = tmp_path / "run"
    run = soak.train(config, folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 8)
    run.send(signal.SIGTERM)
    assert run.wait() == 75, run.words()
    return folder


# Storage

def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit])
def test_the_checkpoint_before_is_taken_where_the_last_is_damaged(config, uncut, stopped, harm):
    last, previous = (stopped / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    step = checkpoint.load(previous)["step"]
    harm(last)
    run = soak.train(config, stopped)
    assert run.wait() == 0, run.words()
    assert f"The checkpoint {last} does not match its sha256: it is torn or was altered." in run.words()
    assert f"Continuing from {previous} instead." in run.words()
    assert soak.events(stopped, "resume")[0]["step"] == step
    assert soak.differences(uncut, stopped) == 0


def test_no_whole_checkpoint_is_a_sentence(config, stopped):
    for name in ("last.pt", "previous.pt"):
        zero(stopped / "checkpoints" / name)
    run = soak.train(config, stopped)
    assert run.wait() == 2
    assert "No whole checkpoint is left. fresh=true starts over." in run.words() and "Traceback" not in run.words()


def fill_disk(run: soak.Run) -> None:
    """From its second step on the run can write no file as large as its checkpoints."""
    run.wait_until(lambda: soak.step_reached(run.folder) >= 2)
    size = (run.folder / "checkpoints" / "last.pt").stat().st_size
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))


def test_full_disk(config, uncut, tmp_path):
    """The old checkpoint stays, the partial one goes, training goes on, tries again and ends well with more room."""
    folder = tmp_path / "run"
    run = soak.train(config, folder)
    fill_disk(run)
    run.wait_until(lambda: len(soak.events(folder, "save_failed")) >= 2)
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["step"] < soak.step_reached(folder)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert run.wait() == 0, run.words()
    assert ("last.pt could not be written (File too large): about" in run.words() and "bytes" in run.words()
            and "are free. Training goes on and tries again at the next save." in run.words())
    assert "Traceback" not in run.words()
    assert soak.differences(uncut, folder) == 0


def test_a_disk_that_stays_full_ends_the_run_with_a_sentence_and_a_whole_checkpoint(config, uncut, tmp_path):
    folder = tmp_path / "run"
    run = soak.train(config, folder)
    fill_disk(run)
    assert run.wait() == 1
    assert run.words().strip().splitlines()[-1].startswith(f"The checkpoint {folder}/checkpoints/last.pt could not be")
    assert not list(folder.rglob("*.tmp"))
    assert soak.train(config, folder).wait() == 0
    assert soak.differences(uncut, folder) == 0


def test_no_room_for_a_first_checkpoint_is_said_at_the_start(config, tmp_path):
    run = soak.train(config, tmp_path / "run", largest_file=10_000)
    assert run.wait() == 1
    assert "could not be written (File too large)" in run.words() and "step 1/" not in run.words()


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_is_really_full(config, uncut, small_disk):
    """Everything is refused at once, the lines of the metrics too; none of them is lost once there is room."""
    folder = small_disk / "run"
    run = soak.train(config, folder, log=small_disk.parent / "log")
    run.wait_until(lambda: soak.step_reached(folder) >= 2)
    with (small_disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    run.wait_until(lambda: "metrics.jsonl cannot be written" in run.words()
                   and "No space left on device" in run.words())
    (small_disk / "filler").unlink()
    assert run.wait() in (0, 1), run.words()
    if run.process.exitcode:  # its very last checkpoint was still refused
        assert soak.train(config, folder, log=small_disk.parent / "log").wait() == 0
    assert soak.differences(uncut, folder) == 0
    assert soak.events(folder, "finished")


def test_read_only_folder_is_refused_at_the_start(config, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = soak.train(config, small_disk / "run", log=small_disk.parent / "log")
    assert run.wait() == 2
    assert run.words().strip() == (f"The run folder {small_disk}/run cannot be written (Read-only file system): "
                                   f"choose another with hydra.run.dir=...")


def test_a_file_in_the_way_is_refused_at_the_start(config, tmp_path):
    (tmp_path / "file").write_text("")
    run = soak.train(config, tmp_path / "file" / "run", log=tmp_path / "log")
    assert run.wait() == 2 and "cannot be written (Not a directory)" in run.words()


# Numbers

def strict_lines(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_nan_on_one_rank_skips_the_update_on_all(config, tmp_path):
    """Batch 4 is skipped and its indices kept, both ranks go on alike to the end, however often is logged."""
    weights = []
    for log_every in (1, 8):
        folder = tmp_path / f"every{log_every}"
        both = faults.start_ranks(2, faults.train_with_nan, soak.changed(config, engine_log_every=log_every), folder,
                                  [4], 1)
        assert [run.wait(120) for run in both] == [0, 0], [run.words() for run in both]
        event, = [event for event in strict_lines(folder / "events.jsonl") if event["event"] == "skipped"]
        assert (event["batch"], event["step"]) == (4, 5) and len(event["indices"]) == 32
        assert event["losses"][0] > 0 and event["losses"][1] is None and event["grad_norm"] is None
        assert "Step 5 skipped: loss" in both[0].words()
        steps = [line["step"] for line in strict_lines(folder / "metrics.jsonl") if "lr" in line]
        assert steps == list(range(log_every, 25, log_every))
        content = checkpoint.load(folder / "checkpoints" / "last.pt")
        assert content["step"] == 24
        weights.append([x for part in ("model", "ema") for x in content[part].values()])
        assert all(torch.isfinite(x).all() for x in weights[-1])
    assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))


def test_nan_in_a_row_ends_the_run_and_names_the_first_layer(config, tmp_path, capsys):
    """The message's own command shows the same again."""
    folder = tmp_path / "run"
    run = soak.start(faults.train_with_bad_weights, soak.changed(config, engine_max_skipped=3), str(folder),
                     folder=folder)
    assert run.wait() == 1
    assert "3 batches in a row gave a loss or gradient that is not finite." in run.words()
    assert "First to go wrong in batch 4, rank 0: the output of blocks.1.mlp.fc1 (" in run.words()
    assert f"deepvit replay {folder} --batch 4." in run.words() and "Traceback" not in run.words()
    assert [event["batch"] for event in soak.events(folder, "skipped")] == [2, 3, 4]
    assert main(["replay", str(folder), "--batch", "4"]) == 0
    assert main(["replay", str(folder), "--batch", "99999"]) == 2
    shown = capsys.readouterr().out
    assert "First not finite: the output of blocks.1.mlp.fc1 (" in shown and "blocks.0.attn" in shown
    assert main(["replay", str(tmp_path), "--batch", "4"]) == 2


@pytest.mark.parametrize(("words", "expected"), [
    (["--batch", "-3"], "--batch -3"),
    (["--batch", "1"], "has no checkpoint"),
    (["--batch", "1"], "config.yaml is torn"),
], ids=["batch", "no checkpoint", "torn config"])
def test_what_cannot_be_replayed_is_one_sentence(config, tmp_path, capsys, words, expected):
    (tmp_path / "config.yaml").write_text("a: [" if "torn" in expected else yaml.safe_dump(config))
    assert main(["replay", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and "fresh=true" not in said


def test_a_batch_replayed_as_two_ranks_is_the_same_batch(tmp_path, capsys):
    """Which branches stochastic depth leaves out belongs to the images, so every rank replays its rows of the masks."""
    config = soak.compose("model.drop_path_rate=0.3", "model.drop_rate=0", "schedule.steps=1",
                          "schedule.warmup_steps=0", "probe.images=0")
    train(config, tmp_path, Ranks(0, 1, torch.device("cpu")), StopRequest())
    last, losses = tmp_path / "checkpoints" / "last.pt", []
    for world in (1, 2):
        content = checkpoint.load(last)
        checkpoint.save(last, {**content, "world": world, "micro_batch": content["micro_batch"] // world})
        assert main(["replay", str(tmp_path), "--batch", "0"]) == 0
        losses.append(float(capsys.readouterr().out.rpartition("Loss of the batch: ")[2]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Other ranks

@pytest.fixture(scope="module")
def two_ranks(config, tmp_path_factory) -> Path:
    """A run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("reliability") / "two"
    both = faults.start_ranks(2, faults.train, config, folder)
    assert [run.wait(120) for run in both] == [0, 0], [run.words() for run in both]
    return folder


@pytest.mark.parametrize("harm", [os.kill, faults.stall], ids=["dies", "stalls"])
def test_a_lost_rank_is_named_by_those_that_are_left(config, tmp_path, harm):
    folder = tmp_path / "run"
    first, second = faults.start_ranks(2, faults.train, soak.changed(config, engine_timeout_s=4.0), folder)
    first.wait_until(lambda: soak.step_reached(folder) >= 3)
    harm(second.pid, *([signal.SIGKILL] if harm is os.kill else []))
    begun = time.monotonic()
    assert first.wait(60) == 1
    assert time.monotonic() - begun < 4 + 15
    message = first.words().strip().splitlines()[-1]
    assert message.startswith(f"Rank 0 lost rank 1 (process {second.pid} on ")
    assert "last heard of after step " in message and " at its own step " in message
    assert "Traceback" not in first.words()
    second.send()


def test_one_of_two_ranks_is_asked_to_stop(config, two_ranks, tmp_path):
    folder = tmp_path / "run"
    both = faults.start_ranks(2, faults.train, config, folder)
    both[0].wait_until(lambda: soak.step_reached(folder) >= 4)
    both[1].send(signal.SIGUSR1)
    assert [run.wait() for run in both] == [75, 75], both[0].words()
    assert len(soak.events(folder, "PREEMPTED")) == 1
    again = faults.start_ranks(2, faults.train, config, folder)
    assert [run.wait() for run in again] == [0, 0]
    assert soak.differences(two_ranks, folder) == 0


def test_a_request_to_stop_waits_for_a_micro_batch_not_for_the_step(config, tmp_path):
    """A step of 16 seconds is given up between its micro-batches, on both ranks."""
    folder = tmp_path / "run"
    slow = soak.changed(config, engine_device_batch=8, data_batch_size=256)
    both = faults.start_ranks(2, faults.train_slowly, slow, folder, 1.0)
    both[0].wait_until(lambda: soak.events(folder, "start"))
    time.sleep(1)
    both[1].send(signal.SIGTERM)
    begun = time.monotonic()
    assert [run.wait() for run in both] == [75, 75], both[0].words()
    assert time.monotonic() - begun < 5
    event, = soak.events(folder, "PREEMPTED")
    assert event["saved"] and event["step"] == 0
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["step"] == 0


def test_a_request_to_stop_at_any_moment_of_a_step(config, uncut, tmp_path):
    """Nothing is due for 24 steps; cut in first and second micro-batches: the same bits."""
    folder, rarely = tmp_path / "run", soak.changed(config, engine_log_every=99, engine_save_every=99)
    stopped_at = []
    for seconds in (0.65, 0.75, 0.85, 0.95):  # a step takes 0.2
        run = soak.start(faults.train_slowly, rarely, str(folder), 0.1, folder=folder)
        run.wait_until(lambda: len(soak.events(folder, "start") + soak.events(folder, "resume")) > len(stopped_at))
        time.sleep(seconds)
        run.send(signal.SIGTERM)
        assert run.wait() == 75, run.words()
        stopped_at.append(soak.events(folder, "PREEMPTED")[-1]["step"])
    assert [0, *stopped_at, 24] == sorted({0, *stopped_at, 24})
    assert soak.train(rarely, folder).wait() == 0
    assert soak.fingerprint(folder) == soak.fingerprint(uncut)


@pytest.mark.slow
def test_the_launcher_passes_a_request_to_stop_on(config, two_ranks, tmp_path):
    """SIGTERM to the parent alone: its ranks save, it ends with 75 in seconds, and leaves nobody behind."""
    folder, devices = tmp_path / "run", soak.changed(config, engine_devices=2)
    run = soak.start(faults.train_in_parent, devices, str(folder), folder=folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 4)
    ranks = faults.ranks_of(folder)
    run.send(signal.SIGTERM)
    begun = time.monotonic()
    assert run.wait() == 75, run.words()
    assert time.monotonic() - begun < 10
    assert len(ranks) == 2 and not any(faults.is_alive(rank) for rank in ranks)
    event, = soak.events(folder, "PREEMPTED")
    assert event["saved"] and "Stopped on request (SIGTERM)." in run.words() and "Traceback" not in run.words()


@pytest.mark.slow
def test_the_launcher_starts_all_ranks_again_when_one_dies(config, two_ranks, tmp_path):
    """From the last checkpoint, to the bits of a run that lost none; nobody is left behind."""
    folder, devices = tmp_path / "run", soak.changed(config, engine_devices=2)
    run = soak.start(faults.train_in_parent, devices, str(folder), folder=folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 7)
    ranks = faults.ranks_of(folder)
    os.kill(ranks[1], signal.SIGKILL)
    assert run.wait(120) == 0, run.words()
    assert f"Rank 0 lost rank 1 (process {ranks[1]} on " in run.words()
    assert soak.events(folder, "resume")[-1]["restarts"] >= 1
    assert soak.differences(two_ranks, folder) == 0
    assert not any(faults.is_alive(rank) for rank in {*ranks, *faults.ranks_of(folder)})


@pytest.mark.slow
def test_restarts_that_do_not_help_end_in_a_sentence(config, tmp_path):
    folder = tmp_path / "run"
    run = soak.start(faults.train_in_parent, soak.changed(config, engine_devices=2, engine_max_restarts=0),
                     str(folder), folder=folder)
    run.wait_until(lambda: soak.step_reached(folder) >= 2)
    os.kill(faults.ranks_of(folder)[1], signal.SIGKILL)
    assert run.wait(120) == 1
    assert "Rank 1 was killed by SIGKILL, and 0 restarts did not help" in run.words()
    assert "Traceback" not in run.words()
    shutil.rmtree(folder)
