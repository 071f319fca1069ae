"""Where a number comes from: what a run and a sweep write down, and what tells one run from another."""

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from PIL import Image

from deepvit.commands.main import expanded
from deepvit.config.provenance import preregistration
from deepvit.config.records import missing_cells, read_json_lines
from deepvit.errors import BAD_INPUT, DONE, FAILED, UserError
from deepvit.report import runs
from deepvit.run.launch import joined

OLD = Path(__file__).parent / "data" / "run_d1218dd"
OLD_NAME = ("data.batch_size=64-model.depth=2-model.drop_path_rate=0.2-model.embed_dim=16-model.num_heads=2-"
            "model-attention=-9208cdbb")
TINY = ["model=vit", "model.depth=1", "model.embed_dim=8", "model.num_heads=1", "data.batch_size=512",
        "data.fraction=0.05", "schedule.epochs=1", "schedule.warmup_epochs=0", "probe.images=0"]
IMAGES = [*(word for word in TINY if "fraction" not in word), "recipe=folder", "augment=none", "model.img_size=8",
          "model.patch_size=4", "data.batch_size=4", "data.root=images", "hydra.run.dir=run"]


def config_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


def draw_images(root: Path, seed: int = 0, size: int = 8) -> None:
    random = np.random.default_rng(seed)
    for at in range(8):
        path = root / ("train", "val")[at // 4] / "ab"[at % 2] / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


# Written down

def test_a_run_tells_what_was_chosen_and_the_command_that_repeats_it(run, tmp_path, monkeypatch):
    typed = [*TINY, "augment=light", "seed=3", "fresh=true", "engine.log_every=7"]
    assert run("train", *typed)[0] == DONE
    folder, = tmp_path.glob("runs/digits/vit/*")
    origin = config_of(folder)["origin"]
    assert origin == json.loads((folder / "metrics.json").read_text())["origin"]
    assert (origin["recipe"], origin["sweep"], origin["overrides"]) == ("digits", None, typed)
    assert origin["choices"].items() >= {"model": "vit", "model/attention": "self", "data": "digits",
                                         "augment": "light", "optimizer": "adamw", "precision": "fp32"}.items()
    content = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert content["run"]["origin"] == origin
    program, *words = shlex.split(origin["command"])
    assert program == "deepvit" and "fresh=true" not in words
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    assert run(*words)[0] == DONE
    again, = (tmp_path / "again").glob("runs/digits/vit/*")
    assert again.name == folder.name
    assert json.loads((again / "metrics.json").read_text())["loss"] == json.loads(
        (folder / "metrics.json").read_text())["loss"]


def test_a_cell_of_a_sweep_has_the_name_that_it_has_alone(run, tmp_path):
    assert run("train", "-m", *TINY, "seed=0,1")[0] == DONE
    folders = sorted(path.name for path in tmp_path.glob("runs/digits/vit/*"))
    code, said, _ = run("train", *TINY, "seed=1", "model.mlp_ratio=3", "optimizer.lr=2e-3")
    assert code == DONE and "is finished" in said
    assert sorted(path.name for path in tmp_path.glob("runs/digits/vit/*")) == folders
    assert run("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=elsewhere")[0] == DONE
    for folder in tmp_path.glob("elsewhere/digits/vit/*"):
        program, *words = shlex.split(config_of(folder)["origin"]["command"])
        assert "is finished" in run(*words)[1]


def test_a_run_of_revision_d1218dd_is_continued_and_reported(run, tmp_path):
    """It tells no origin, has no mark, and its folder is named by the overrides as typed. It took re-attention's
    statistics over the whole micro-batch and drew the masks of stochastic depth on each rank: cut at step 20 it goes on
    along the curve that the same revision logged without a cut."""
    typed = ["model=vit", "model/attention=reattention", "model.depth=2", "model.embed_dim=16", "model.num_heads=2",
             "model.drop_path_rate=0.2", "data.batch_size=64", "schedule.epochs=2", "engine.log_every=1",
             "engine.save_every=20", "probe.images=0"]
    folder = tmp_path / "runs/digits/vit" / OLD_NAME
    typed += ["optimizer.lr=1e-3", f"hydra.run.dir={folder}"]  # the recipe has another rate now
    shutil.copytree(OLD, folder)
    code, said, _ = run("report", "runs", "--out", "report")
    assert code == DONE and "recipe not recorded" in said and "step 21/45" in said
    code, said, why = run("train", *typed)
    assert code == DONE and "Continuing from step 20 in" in said, why
    losses = [line["loss"] for line in read_json_lines(folder / "metrics.jsonl") if "lr" in line]
    assert losses == pytest.approx(json.loads((OLD / "uncut_losses.json").read_text()), rel=1e-5)
    config = config_of(folder)
    assert config["origin"]["overrides"] == typed[:-1] and "norm_batch" not in config["model"]["attention"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    code, said, why = run("train", *typed)
    assert "is finished" in said, why


# One run is not taken for another

def test_a_run_knows_its_images(run, tmp_path):
    """Moved they are the same, re-encoded they are not, finished or not; an identity without sizes is accepted."""
    draw_images(tmp_path / "images")
    assert run("train", *IMAGES)[0] == DONE
    (tmp_path / "images").rename(tmp_path / "moved")
    code, said, _ = run("train", *IMAGES, "data.root=moved")
    assert code == DONE and "is finished" in said
    shutil.copytree(tmp_path / "moved", tmp_path / "images")
    draw_images(tmp_path / "images", size=9)
    code, _, sentence = run("train", *IMAGES)
    assert code == BAD_INPUT and "the train set" in sentence
    result = tmp_path / "run" / "metrics.json"
    metrics = json.loads(result.read_text())
    result.unlink()  # as if it had been cut before its last words
    code, _, sentence = run("train", *IMAGES)
    assert code == BAD_INPUT and "the train set" in sentence
    for marks in metrics["made_of"]["pictures"].values():
        del marks[2:]  # as earlier versions wrote it
    result.write_text(json.dumps(metrics))
    assert "is finished" in run("train", *IMAGES)[1]


def test_the_weights_that_a_run_starts_from_are_known_by_content(run, tmp_path):
    for seed in (1, 2):
        assert run("train", *TINY, f"seed={seed}", f"hydra.run.dir=from{seed}")[0] == DONE
        shutil.copy(tmp_path / f"from{seed}" / "checkpoints" / "best.pt", tmp_path / f"{seed}.pt")
    shutil.copy("1.pt", "init.pt")
    words = [*TINY, "hydra.run.dir=run"]
    assert run("train", *words, "init=init.pt")[0] == DONE
    assert "is finished" in run("train", *words, "init=1.pt")[1]
    shutil.copy("2.pt", "init.pt")
    code, _, sentence = run("train", *words, "init=init.pt")
    assert code == BAD_INPUT and "init" in sentence
    (tmp_path / "run" / "metrics.json").unlink()
    assert run("train", *words, "init=init.pt")[0] == BAD_INPUT
    assert run("train", *words, "init=1.pt")[0] == DONE
    (tmp_path / "init.pt").unlink()
    (tmp_path / "1.pt").unlink()
    assert run("train", *words, "init=1.pt")[0] == DONE  # what is not there is not read again


@pytest.mark.parametrize("words", [["data.root=one,two"], ["data.root=choice(one,two)"]])
def test_a_sweep_over_roots_trains_on_each(run, tmp_path, words):
    for seed, name in enumerate(("one", "two")):
        draw_images(tmp_path / name, seed)
    images = [word for word in IMAGES if not word.startswith(("data.root", "hydra"))]
    assert run("train", "-m", *images, *words)[0] == DONE
    roots = {config_of(path)["data"]["root"] for path in tmp_path.glob("runs/folder/vit/*")}
    assert roots == {"one", "two"}


# A sweep's record

@pytest.fixture
def launcher():
    """The class that Hydra's scan for plugins made: not the one that can be imported."""
    return Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]


def record_of(top: Path) -> Path:
    found, = top.glob("sweeps/*.jsonl")
    return found


def test_a_sweep_writes_down_what_it_was_to_run_and_what_became_of_it(run, tmp_path):
    sweep = ["-m", *TINY, "model.num_heads=1,3", "seed=0,1"]
    assert run("train", *sweep)[0] == BAD_INPUT
    start, *cells = read_json_lines(record_of(tmp_path / "runs"))
    assert start["command"] == shlex.join(["deepvit", "train", *sweep]) and len(start["cells"]) == 4
    assert [cell["overrides"] for cell in start["cells"]] == [cell["overrides"] for cell in cells]
    assert [cell["code"] for cell in cells] == [DONE, DONE, BAD_INPUT, BAD_INPUT]
    assert "3 heads" in cells[2]["sentence"] and (tmp_path / "runs" / cells[0]["folder"] / "config.yaml").exists()
    assert run("train", *sweep, "dry=true")[0] == BAD_INPUT  # leaves no trace
    assert read_json_lines(record_of(tmp_path / "runs"))[1:] == cells
    missing = list(missing_cells(record_of(tmp_path / "runs")))
    assert [config["model"]["num_heads"] for _, config, _ in missing] == [3, 3]
    found = {run.state for run in runs.read_runs([tmp_path / "runs"])[0]}
    assert found == {"finished", f"missing ({cells[2]['sentence'].rstrip('.')})"}


@pytest.mark.parametrize("dies", [False, True])
def test_cells_in_other_processes_are_summed_up(run, launcher, monkeypatch, dies):
    """As joblib's and submitit's launchers run them; one may die without a word."""
    launch = launcher.launch

    def forked(self, jobs, initial_job_idx):
        for number, overrides in enumerate(jobs, initial_job_idx):
            process = os.fork()
            if process == 0:
                if not (dies and number):
                    launch(self, [overrides], number)
                os._exit(0)
            os.waitpid(process, 0)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]

    monkeypatch.setattr(launcher, "launch", forked)
    code, said, _ = run("train", "-m", *TINY, "model.num_heads=1,3")
    assert "1 of 2 cells are done" in said
    assert code == (FAILED if dies else BAD_INPUT) and ("1 reported nothing" if dies else "3 heads") in said


def test_a_job_returns_its_top1(run, launcher, monkeypatch, tmp_path):
    """What Optuna's sweeper asks for."""
    launch, returned = launcher.launch, []

    def noted(self, jobs, initial_job_idx):
        returned.extend(launch(self, jobs, initial_job_idx))
        return returned

    monkeypatch.setattr(launcher, "launch", noted)
    run("train", "-m", *TINY, "model.num_heads=1,3")
    result, = tmp_path.glob("runs/digits/vit/*/metrics.json")
    assert [one.return_value for one in returned] == [json.loads(result.read_text())["top1"], None]


@pytest.mark.parametrize("name", ["multirun.yaml", "notes.txt", "sweeps/mine.txt"])
def test_a_sweep_folder_of_somebody_else_is_refused(run, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine: true\n")
    code, _, sentence = run("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=mine")
    assert code == BAD_INPUT and "hydra.sweep.dir" in sentence
    assert [one for one in (tmp_path / "mine").rglob("*") if one.is_file()] == [path] and "mine" in path.read_text()


def test_runs_holds_the_folders_of_sweeps_too(run, tmp_path):
    """`sweep=depth_scaling` makes runs/depth_scaling/<recipe>/<model>/<name>, perhaps the first in runs/."""
    assert run("train", *TINY, "hydra.run.dir=runs/depth_scaling/digits/vit/default")[0] == DONE
    assert run("train", "-m", *TINY, "seed=1,2", "dry=true")[0] == DONE


def test_a_preregistration_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "docs/results/dose/preregistration.md"
    hydra = OmegaConf.create({"callbacks": {"sweep": {"statistics": {"preregistered": name}}}})
    assert len(preregistration(hydra)["preregistered"]["sha256"]) == 64
    Path("docs/results/dose").mkdir(parents=True), Path(name).touch()  # one's own goes before it
    assert preregistration(hydra)["preregistered"]["sha256"] == hashlib.sha256().hexdigest()


# The surroundings

@pytest.mark.parametrize(("variables", "words"), [
    ({"RANK": "0"}, "WORLD_SIZE"), ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK=2"),
    ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "RANK=zero"),
    ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, "WORLD_SIZE=two"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}, True),
    ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, False), ({}, False)])
def test_a_launchers_variables_are_whole_or_refused(monkeypatch, variables, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(words, bool):
        assert joined() is words and os.environ.get("LOCAL_RANK") is None
    else:
        with pytest.raises(UserError, match=words):
            joined()


@pytest.mark.parametrize(("word", "expected"), [
    ("data.root=~/x", "data.root=/home/me/x"), ("init='~/run'", "init='/home/me/run'"), ("out=~", "out=/home/me"),
    ("checkpoint=[~/a.pt,~/b.pt]", "checkpoint=[/home/me/a.pt,/home/me/b.pt]"), ("~sweep", "~sweep"),
    ("data.root=~/a,~/b", "data.root=/home/me/a,/home/me/b"), ("data.root=a~/b", "data.root=a~/b")])
def test_the_home_folder_is_meant_by_its_sign(monkeypatch, word, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded(word) == expected
