"""`hydra/launcher=parallel`: cells side by side end as they would alone, whatever becomes of the others.

A sweep is started as a process of its own, since one that has trained cannot fork others that train.
"""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import soak
import torch
import yaml
from omegaconf import OmegaConf

from deepvit.commands import parallel
from deepvit.commands.main import main
from deepvit.commands.parallel import Cell, Machine, SweepTable
from deepvit.engine import device
from deepvit.errors import BAD_INPUT, DONE, STOPPED

TINY = ["model=vit", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "data.batch_size=256",
        "engine.log_every=1", "probe.images=0", "logger=null", "schedule.warmup_epochs=0"]
CLOCKS = {"images_per_s", "eval_images_per_s", "data_wait"}


def start(tmp_path: Path, *words: str) -> soak.Run:
    return soak.start(sweep, tmp_path, words, folder=tmp_path, log=tmp_path / f"{len(list(tmp_path.iterdir()))}.said")


def sweep(folder: Path, words: tuple[str, ...]) -> int:
    os.chdir(folder)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    return main(["train", "-m", *TINY, "hydra/launcher=parallel", *words])


def ended(run: soak.Run) -> tuple[int, str]:
    """Exit code, and what was said."""
    return run.wait(120), run.words()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(folder: Path) -> tuple[list[dict], dict]:
    """All that a run wrote down but for times, and its weights."""
    logged = [{name: value for name, value in line.items() if name not in CLOCKS}
              for line in lines(folder / "metrics.jsonl")]
    return logged, torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["model"]


def await_until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "not reached"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_numbers_are_the_same_alone_one_after_another_and_side_by_side(run, tmp_path):
    words = ["schedule.epochs=1", "model.num_heads=2,3", "seed=0,1"]
    code, said = ended(start(tmp_path, *words))
    assert code == BAD_INPUT and "2 of 4 cells are done" in said, said
    assert said.count("failed: ") == 2 and "does not divide into 3 heads" in said
    found = {folder.name: numbers(folder) for folder in tmp_path.glob("runs/digits/vit/*")}
    assert len(found) == 2  # a refused cell leaves no folder
    first, second = found.values()
    assert first[0] != second[0] and any("top1" in line for line in first[0])

    assert run("train", "-m", *TINY, *words[:1], "seed=0,1", "hydra.sweep.dir=serial")[0] == DONE
    assert run("train", *TINY, *words[:1], "seed=1", "hydra.run.dir=alone")[0] == DONE
    others = {folder.name: numbers(folder) for folder in tmp_path.glob("serial/digits/vit/*")}
    others["alone"], found["alone"] = numbers(tmp_path / "alone"), found[next(name for name in found if "seed" in name)]
    for name, (logged, weights) in found.items():
        assert logged == others[name][0]
        assert all(torch.equal(weights[key], others[name][1][key]) for key in weights)
    config = yaml.safe_load(next(tmp_path.glob("runs/digits/vit/*seed=1/config.yaml")).read_text())
    assert config["engine"]["threads"] == 1  # a setting, whatever the number of cores and of cells
    assert "engine.threads=1" in config["origin"]["command"]


def test_one_is_killed_and_ctrl_c_reaches_the_others_and_the_same_command_does_the_rest(tmp_path):
    words = ["schedule.epochs=6", "seed=0,1,2,3"]
    run = start(tmp_path, *words)
    cells = Path(tmp_path, "runs/digits/vit")
    begun = await_until(lambda: [path.parent for path in cells.glob("*/metrics.jsonl") if len(lines(path)) > 2])
    victim = begun[0]
    os.kill(lines(victim / "events.jsonl")[0]["processes"][0], signal.SIGKILL)
    await_until(lambda: [path for path in cells.glob("*/metrics.jsonl") if len(lines(path)) > 2
                         and path.parent != victim])
    run.send(signal.SIGINT)
    code, said = ended(run)
    assert code == STOPPED and "SIGKILL" in said and "Not started." in said, said
    told = [path.parent for path in cells.glob("*/events.jsonl") if lines(path)[-1]["event"] == "PREEMPTED"]
    assert told and victim not in told
    steps = {folder: lines(folder / "events.jsonl")[-1]["step"] for folder in told}

    code, said = ended(start(tmp_path, *words))
    assert code == DONE and "4 of 4 cells are done" in said, said
    assert len(list(cells.glob("*/metrics.json"))) == 4
    for folder, step in steps.items():
        assert any(line["event"] == "resume" and line["step"] == step for line in lines(folder / "events.jsonl"))


@pytest.mark.slow
def test_no_cell_outlives_a_sweep_that_is_killed(tmp_path):
    run = start(tmp_path, "schedule.epochs=500", "seed=0,1")
    cells = Path(tmp_path, "runs/digits/vit")
    await_until(lambda: sum(len(lines(path)) > 2 for path in cells.glob("*/metrics.jsonl")) == 2)
    run.send(signal.SIGKILL)
    await_until(lambda: all(lines(folder / "events.jsonl")[-1]["event"] == "PREEMPTED" for folder in cells.iterdir()))


@pytest.mark.slow
def test_cells_of_one_folder_run_one_after_the_other_and_a_dry_sweep_writes_nothing(tmp_path):
    code, said = ended(start(tmp_path, "schedule.epochs=1", "data.eval_batch_size=180,360"))
    assert code == DONE and "2 of 2 cells are done" in said, said
    assert len(list(tmp_path.glob("runs/digits/vit/*"))) == 1
    code, said = ended(start(tmp_path, "seed=0,1", "dry=true", "hydra.sweep.dir=dry"))
    assert code == DONE and said.count("Dry run:") == 2 and "device-hours" in said, said
    assert not (tmp_path / "dry").exists()


# Places

def engine(**given):
    return OmegaConf.create({"devices": None, "accelerator": "auto", "threads": None, **given})


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(parallel, "_visible_gpus", lambda: ["4", "5", "6", "7"])


def test_every_cell_has_gpus_of_its_own(four_gpus):
    machine, alone, pair = Machine(engine(), 1), engine(), engine(devices=2)
    assert (machine.at_once(alone), machine.at_once(pair)) == (4, 2)
    taken = []
    for asked in (pair, alone, alone):
        taken.append(machine.free(asked, taken))
    assert sorted(sum(taken, [])) == ["4", "5", "6", "7"] and not machine.free(alone, taken)
    assert not machine.free(pair, taken[:2]) and machine.free(alone, taken[:2]) == taken[2]


def test_cells_share_a_gpu_where_that_is_asked_for_but_none_has_one_twice(four_gpus):
    machine = Machine(engine(), 2)
    assert machine.at_once(engine()) == 8
    assert machine.free(engine(devices=2), [["4", "5"]]) == ["6", "7"]  # the emptiest first
    all_four = machine.free(engine(devices=4), [])
    assert all_four == machine.free(engine(devices=4), [all_four]) == ["4", "5", "6", "7"]
    assert not machine.free(engine(), [all_four, all_four])


def cell(*places: str, **asked) -> SimpleNamespace:
    return SimpleNamespace(places=[*places], config=OmegaConf.create({"engine": engine(**asked)}))


def test_a_cell_sees_its_gpus_alone_and_takes_its_part_of_their_memory(four_gpus):
    two = Machine(engine(), 2).environment(cell("4", "6", devices=2))
    assert two == {"CUDA_VISIBLE_DEVICES": "4,6", "DEEPVIT_SHARE": "1/2"}
    assert Machine(engine(), 1).environment(cell("7"))["DEEPVIT_SHARE"] == "1/1"


def test_cells_on_a_cpu_take_their_part_of_its_memory(monkeypatch):
    monkeypatch.setattr(parallel, "_visible_gpus", lambda: [])
    monkeypatch.setattr(parallel, "usable_cores", lambda: 8)
    assert Machine(engine(), 1).environment(cell("0", "1", threads=2)) == {"DEEPVIT_SHARE": "1/4"}


@pytest.mark.parametrize("threads, omp, at_once, used", [(None, None, 8, 1), (3, None, 2, 3), (3, "2", 2, 3),
                                                         (99, None, 1, 99)])
def test_cells_on_a_cpu_have_a_core_for_each_of_their_threads(monkeypatch, threads, omp, at_once, used):
    monkeypatch.setattr(parallel, "_visible_gpus", lambda: [])
    monkeypatch.setattr(parallel, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", omp) if omp else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine, asked = Machine(engine(), 1), engine(threads=threads)
    assert (machine.at_once(asked), machine.threads(asked)) == (at_once, used)


@pytest.mark.parametrize("wrong", [{"threads": -1}, {"threads": "abc"}, {"threads": 1.5}, {"devices": "abc"}])
def test_a_cell_of_mistaken_settings_gets_a_place_where_it_says_so(monkeypatch, wrong):
    monkeypatch.setattr(parallel, "_visible_gpus", lambda: [])
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    assert len(Machine(engine(), 1).free(engine(**wrong), [])) == 1 <= Machine(engine(), 1).at_once(engine(**wrong))


@pytest.mark.parametrize("own, inner, outer, cores", [
    ("pod/box", "200000 100000", "max 100000", [2]), ("pod/box", "max 100000", "350000 100000", [3]),
    ("pod/box", "50000 100000", "400000 100000", [0, 4]), ("", "200000 100000", "400000 100000", [4]),
    ("elsewhere/box", "200000 100000", "400000 100000", [4])])
def test_cores_are_those_that_the_container_is_given(tmp_path, monkeypatch, own, inner, outer, cores):
    """`elsewhere`: of a container that sees its own group alone, by its name outside."""
    (tmp_path / "pod" / "box").mkdir(parents=True)
    (tmp_path / "pod" / "box" / "cpu.max").write_text(inner)
    (tmp_path / "cpu.max").write_text(outer)
    (tmp_path / "cgroup").write_text(f"1:name=systemd:/\n0::/{own}\n")
    assert list(device._quotas(tmp_path, tmp_path / "cgroup")) == cores
    monkeypatch.setattr(device, "_quotas", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert device.usable_cores() == max(1, min(cores))


# Time left

def test_what_is_left_is_told_by_the_work_of_each_cell(tmp_path):
    """Two at once: one ended, one is half done, two wait: 40 s and, after the 10 s of the half, 20 s."""
    now = time.monotonic()
    rows = [Cell("a", tmp_path, 20.0, started=now - 20, ended=now, steps=10, step=10),
            Cell("b", tmp_path, 20.0, started=now - 10, steps=10, step=5),
            Cell("c", tmp_path, 40.0, steps=10), Cell("d", tmp_path, 20.0, steps=10)]
    table = SweepTable(rows, at_once=2)
    assert rows[1].left(None) == pytest.approx(10, abs=0.1)
    assert table._left() == pytest.approx(40, abs=0.2)  # c starts at once, d after b
