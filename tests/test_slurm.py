"""Ranks that srun starts without torchrun, and the batch script of docs/multi-node.md, by a fake srun and scontrol."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepvit.errors import UserError
from deepvit.run import launch
from deepvit.run.launch import first_host, take_place

ROOT = Path(__file__).parents[1]
STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "gpu[03-05]"}


def test_a_task_of_srun_knows_its_place():
    environ = dict(STEP)
    take_place(environ)
    told = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert told == {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03"}
    other = {**STEP, "SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}
    take_place(other)
    assert other["LOCAL_WORLD_SIZE"] == "1" and other["MASTER_PORT"] == environ["MASTER_PORT"]


def test_gpus_that_no_task_uses_are_named_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(launch.log, "warning", lambda text, *words: warnings.append(text % words))
    for local, gpus in (("0", "2"), ("1", "4"), ("0", "4")):
        take_place({**STEP, "SLURM_LOCALID": local, "SLURM_GPUS_ON_NODE": gpus})
    (warning,) = warnings
    assert "4 GPUs" in warning and "2 tasks" in warning and "--ntasks-per-node" in warning


@pytest.mark.parametrize("environ", [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script
    {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "2", **STEP}, {}])
def test_alone_and_below_torchrun_nothing_is_set(environ):
    before = dict(environ)
    take_place(environ)
    assert environ == before


@pytest.mark.parametrize("change", [{"SLURM_NODEID": "7"}, {"SLURM_STEP_TASKS_PER_NODE": "many"},
                                    {"SLURM_JOB_ID": "x"}])
def test_what_srun_did_not_set(change):
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS.*srun"):
        take_place({**STEP, **change})
    with pytest.raises(UserError, match="SLURM_PROCID"):
        take_place({name: value for name, value in STEP.items() if name != "SLURM_PROCID"})


@pytest.mark.parametrize("nodes, first", [("n1", "n1"), ("n1,n2", "n1"), ("gpu[03-05,7]", "gpu03"),
                                          ("a-[1,2]-ib,b3", "a-1-ib"), ("10.0.0.1", "10.0.0.1")])
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def batch_script() -> str:
    return next(block for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/multi-node.md").read_text(), re.S)
                if "#SBATCH" in block)


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False), (2, False), (137, False)])
def test_the_batch_script_requeues_what_was_asked_to_stop_alone(tmp_path, code, requeued):
    program(tmp_path, "srun", f'echo "$@" > called; exit {code}')
    program(tmp_path, "scontrol", 'echo "$@" > requeued')
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    done = subprocess.run(["bash", "-c", batch_script()], cwd=tmp_path, env=environ)
    assert "train.py" in (tmp_path / "called").read_text() or "deepvit train" in (tmp_path / "called").read_text()
    assert (tmp_path / "requeued").exists() == requeued and (requeued or done.returncode == code)


@pytest.mark.slow
def test_two_tasks_of_a_fake_srun_train_one_run(tmp_path):
    program(tmp_path, "srun", """for task in 0 1; do
        SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > $task.log 2>&1 & pids="$pids $!"
    done
    code=0; for pid in $pids; do wait $pid || code=$?; done; exit $code""")
    environ = {**os.environ, **STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
               "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    words = ["model=vit", "model.depth=2", "model.embed_dim=24", "model.num_heads=3", "schedule.epochs=1",
             "hydra.run.dir=run", "probe.images=0"]
    done = subprocess.run([tmp_path / "srun", sys.executable, ROOT / "train.py", *words], cwd=tmp_path, env=environ)
    assert done.returncode == 0, (tmp_path / "0.log").read_text()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["devices"] == 2
    done = subprocess.run([tmp_path / "srun", sys.executable, ROOT / "train.py", "model.dpeth=3"], cwd=tmp_path,
                          env=environ)
    assert done.returncode == 2
