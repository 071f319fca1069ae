"""Many processes and long runs: the same numbers on 1, 2 and 4 ranks, two hosts that lose one, flat memory."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import soak

from deepvit.data.stream import Stream

# All that trains by batch statistics or randomness of its own, but for element-wise dropout: it is each rank's.
WITHOUT_DROPOUT = ["model.drop_rate=0", "schedule.steps=12", "schedule.eval_steps=12", "probe.images=0",
                   "engine.device_batch=32"]


def compared(config: dict, folder: Path, world: int, target=faults.train) -> list[float]:
    """Losses, gradient norms and the evaluation's loss of a run on `world` ranks."""
    ranks = faults.start_ranks(world, target, config, folder)
    assert [run.wait(180) for run in ranks] == [0] * world, ranks[0].words()
    return [line[name] for line in soak.lines(folder / "metrics.jsonl") for name in ("loss", "grad_norm")
            if name in line]


def spread(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    one, other = (np.array(values, dtype=float) for values in (one, other))  # null (an overflow in fp16): nan
    assert len(one) == len(other) == 25 and np.array_equal(np.isnan(one), np.isnan(other))
    return float(np.nanmax(np.abs(one / other - 1)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, list[float]]:
    """One rank, one micro-batch, with either stem."""
    place = tmp_path_factory.mktemp("ranks")
    return {stem: compared(soak.compose(*WITHOUT_DROPOUT, f"model.stem={stem}"), place / stem, 1)
            for stem in ("patch", "conv")}


@pytest.mark.parametrize(("stem", "world", "parts"), [
    ("conv", 2, 2), *(pytest.param(stem, world, parts, marks=pytest.mark.slow)
                      for stem in ("patch", "conv") for world in (1, 2, 4) for parts in (1, 2, 4)
                      if world * parts <= 4 and (stem, world, parts) != ("conv", 2, 2))])
def test_losses_do_not_depend_on_ranks_or_micro_batches(reference, tmp_path, stem, world, parts):
    """With head norm, stem norms, stochastic depth, mixup, cutmix, EMA and clipping: equal to rounding."""
    config = soak.compose(*WITHOUT_DROPOUT, f"model.stem={stem}", f"engine.device_batch={32 // world // parts}")
    assert spread(compared(config, tmp_path / "run", world), reference[stem]) < 1e-5


@pytest.mark.slow
def test_statistics_and_masks_of_each_rank_would_show(tmp_path):
    """The control: without groups and with masks drawn on each rank the losses differ a thousand times as much."""
    config = soak.compose(*WITHOUT_DROPOUT, "model.attention.norm_batch=null", "engine.device_batch=null")
    one, two = (compared(config, tmp_path / str(world), world, faults.train_with_masks_of_each_rank)
                for world in (1, 2))
    assert spread(one, two) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_a_run_begun_on_two_ranks_goes_on_along_the_same_curve(reference, tmp_path, world):
    config, folder = soak.compose(*WITHOUT_DROPOUT, "model.stem=conv", "engine.device_batch=auto"), tmp_path / "run"
    both = faults.start_ranks(2, faults.train, config, folder)
    both[0].wait_until(lambda: soak.step_reached(folder) >= 4)
    both[0].send(signal.SIGTERM)
    assert [run.wait() for run in both] == [75, 75]
    assert spread(compared(config, folder, world), reference["conv"]) < 1e-5


@pytest.mark.parametrize(("precision", "where", "step"), [
    ("fp32", "backward", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(
        ["fp32", "fp16"], ["forward", "backward"], [1, 10]) if case != ("fp32", "backward", 1))])
def test_one_of_two_ranks_runs_out_of_memory(reference, tmp_path, precision, where, step):
    """Both halve their micro-batches and go on along the same curve."""
    config = soak.compose(*WITHOUT_DROPOUT, "engine.device_batch=16", f"precision={precision}")
    folder = tmp_path / "run"
    ranks = faults.start_ranks(2, faults.train_short_of_memory, config, folder, where, step)
    assert [run.wait(180) for run in ranks] == [0, 0], ranks[0].words()
    event, = soak.events(folder, "out_of_memory")
    assert (event["step"], event["device_batch"]) == (step - 1, 8)
    losses = [line[name] for line in soak.lines(folder / "metrics.jsonl") for name in ("loss", "grad_norm")
              if name in line]
    expected = reference["patch"] if precision == "fp32" else compared(config, tmp_path / "uncut", 2)
    assert spread(losses, expected) < (1e-5 if precision == "fp32" else 5e-3)


def test_moments_that_do_not_fit_on_one_rank_are_refused_on_both(tmp_path):
    config = soak.compose(*WITHOUT_DROPOUT, "engine.device_batch=auto")
    ranks = faults.start_ranks(2, faults.train_short_of_memory, config, tmp_path / "run",
                               "optimizer", 0)
    assert [run.wait(180) for run in ranks] == [2, 2], ranks[0].words()
    assert "optimizer.opt=adamw" in ranks[0].words() and "Traceback" not in ranks[0].words()


def test_the_order_of_imagenets_images_is_the_same_for_any_ranks():
    """A run of ImageNet's size: the order of 1.28 million images, the same for any ranks, in milliseconds a step."""
    n, batch = 1_281_167, 1024
    begun = time.perf_counter()
    whole = next(iter(Stream(n, 0, batch, 10**6, start_step=625_000)))
    assert time.perf_counter() - begun < 20
    for world in (2, 4):
        shares = [next(iter(Stream(n, 0, batch, 10**6, start_step=625_000, rank=rank, world=world)))
                  for rank in range(world)]
        assert np.array_equal(np.concatenate([share.indices for share in shares]), whole.indices)
        assert np.array_equal(np.concatenate([share.epochs for share in shares]), whole.epochs)


def simulate_imagenet(folder: str) -> int:
    """Three short epochs' ends over 1.28 million entries with two workers; prints seconds and MiB as JSON lines."""
    import json

    from PIL import Image

    from deepvit import data
    from deepvit.data.imageset import ImageSet

    class Simulated(ImageSet):
        """Names, classes and targets as of ImageNet's size; one image stands for all."""

        def __init__(self) -> None:
            n = 1_281_167
            self.targets = np.arange(n) % 1000
            self.names = np.array([b"n00000000/n00000000_00000.JPEG"] * 1000)[self.targets]
            self.shown = Image.new("RGB", (32, 32), (90, 120, 60))

        def name(self, index: int) -> str:
            return self.names[index].decode()

        def image(self, index: int) -> Image.Image:
            return self.shown

        def take(self, indices: np.ndarray) -> ImageSet:
            raise AssertionError("not taken apart here")

    begun, images = time.perf_counter(), Simulated()
    transform, per_epoch = data.train_transform(8), 1_281_167 // 1024
    for epoch in range(3):
        start = epoch * per_epoch + per_epoch - 3
        for number, _ in enumerate(data.train_batches(images, transform, seed=0, batch_size=1024, start_step=start,
                                                      steps=start + 8, workers=2)):
            if number == 0:
                print(json.dumps({"first_batch_s": time.perf_counter() - begun}))
            workers = [memory_mib(int(child)) for child in children(os.getpid())]
        print(json.dumps({"epoch": epoch, "own_mib": memory_mib(os.getpid()), "worker_mib": max(workers)}), flush=True)
        begun = time.perf_counter()
    return 0


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def memory_mib(process: int) -> float:
    """Its own: pages shared with others are counted by their share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


@pytest.mark.slow
def test_a_run_of_imagenets_size_starts_at_once_and_stays_flat(tmp_path):
    run = soak.start(simulate_imagenet, str(tmp_path), folder=tmp_path / "run")
    assert run.wait(300) == 0, run.words()
    (tmp_path / "run.log").rename(tmp_path / "run.jsonl")
    seen = soak.lines(tmp_path / "run.jsonl")
    epochs = [line for line in seen if "epoch" in line]
    assert max(line["first_batch_s"] for line in seen if "first_batch_s" in line) < 60
    print(seen)
    for name in ("own_mib", "worker_mib"):
        assert epochs[2][name] < epochs[0][name] + 40, epochs
    assert epochs[2]["worker_mib"] < 400


def train_watched(config: dict, folder: str) -> int:
    """Notes memory, open files and children after every epoch (45 steps of 32 images)."""
    import json

    from deepvit.engine.fit import Fit
    original = Fit._evaluate_and_save

    def watched(self: Fit) -> bool:
        due = self.state.step % 45 == 0 and self.state.step > self.state.evaluated
        going_on = original(self)
        if due:
            with Path(folder + ".usage.jsonl").open("a") as file:
                file.write(json.dumps({"mib": memory_mib(os.getpid()), "files": len(os.listdir("/proc/self/fd")),
                                       "children": len(children(os.getpid()))}) + "\n")
        return going_on

    Fit._evaluate_and_save = watched
    return soak._train(config, folder)


@pytest.mark.slow
def test_memory_and_open_files_are_flat_over_fifty_epochs(tmp_path):
    config = soak.compose("schedule.steps=2250", "schedule.eval_steps=45", "data.workers=1", "engine.save_every=45",
                          "probe.every_epochs=1")
    run = soak.start(train_watched, config, str(tmp_path / "run"), folder=tmp_path / "run")
    assert run.wait(900) == 0, run.words()[-2000:]
    usage = soak.lines(tmp_path / "run.usage.jsonl")
    assert len(usage) == 50
    first, last = usage[9], usage[-1]  # the first epochs fill caches
    assert last["mib"] < first["mib"] + 40, (first, last)  # 40 epochs: under 1 MiB each
    assert last["files"] <= first["files"] + 1 and last["children"] <= first["children"]
    print(first, last)


# Two hosts: two torchrun agents on this machine

def agent(folder: Path, port: int, log: Path, steps: int) -> subprocess.Popen:
    overrides = [*soak.EVERYTHING, f"schedule.steps={steps}", "probe.images=0", "engine.timeout_s=20",
                 f"hydra.run.dir={folder}"]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=deepvit",
             "--rdzv-conf=last_call_timeout=5,join_timeout=60,is_host=" + str(int("first" in log.name)),
             "train.py", *overrides], cwd=soak.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_two_hosts_train_lose_one_and_recover(tmp_path):
    """The host that is left goes on alone from the last checkpoint: its global batch is the same."""
    folder, port = tmp_path / "run", faults.free_port()
    first, second = (agent(folder, port, tmp_path / f"{name}.log", 600) for name in ("first", "second"))
    try:
        end = time.monotonic() + 180
        while soak.step_reached(folder) < 20:
            assert time.monotonic() < end, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.05)
        assert len(faults.ranks_of(folder)) == 2
        ranks = [int(child) for child in children(second.pid)]  # torchrun gives them sessions of their own
        for process in (second.pid, *ranks):
            os.kill(process, signal.SIGKILL)
        assert first.wait(300) == 0, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert soak.events(folder, "finished")
    assert len(faults.ranks_of(folder)) == 1
    steps = [line["step"] for line in soak.lines(folder / "metrics.jsonl") if "lr" in line]
    assert steps == list(range(1, 601))


@pytest.mark.slow
def test_torchrun_does_not_restart_what_was_asked_to_stop(tmp_path):
    """One rank of two gets SIGUSR1: a checkpoint, PREEMPTED, and torchrun ends instead of starting them again."""
    folder = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3",
         "train.py", *soak.EVERYTHING, "schedule.steps=3000", "probe.images=0", f"hydra.run.dir={folder}"],
        cwd=soak.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 180
        while soak.step_reached(folder) < 5:
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(faults.ranks_of(folder)[1], signal.SIGUSR1)
        words = run.communicate(timeout=60)[0]
    finally:
        run.kill()
    assert run.returncode == 0, words
    assert len(soak.events(folder, "PREEMPTED")) == 1 and not soak.events(folder, "resume")


# Job schedulers

def test_the_configuration_for_slurm_is_composed():
    """Documented in docs/multi-node.md; the launcher is an optional extra."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install deepvit[slurm]")
    from hydra import compose, initialize_config_dir
    with initialize_config_dir(str(soak.ROOT / "conf"), version_base="1.3"):
        composed = compose("train", ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8",
                                     "hydra.launcher.timeout_min=1440", "hydra.launcher.signal_delay_s=120"],
                           return_hydra_config=True)
    assert composed.hydra.launcher._target_.endswith("SlurmLauncher")
    assert composed.hydra.launcher.gpus_per_node == 8
