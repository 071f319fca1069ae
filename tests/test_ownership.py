"""A run folder is ours only if it says so: whatever is commanded, no file of the user's is changed."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from deepvit.commands.main import main
from deepvit.engine.folder import MARK, RunFolder
from deepvit.errors import UserError
from deepvit.run.resume import as_begun, settings_of

TINY = ["model=vit", "model.depth=1", "model.embed_dim=8", "model.num_heads=1", "data.batch_size=512",
        "data.fraction=0.05", "schedule.epochs=1", "schedule.warmup_epochs=0", "probe.images=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ownership") / "run"
    GlobalHydra.instance().clear()
    assert main(["train", *TINY, f"hydra.run.dir={folder}"]) == 0
    return folder


# Random folders of a user's, random commands

NAMES = ["config.yaml", "metrics.json", "metrics.jsonl", "events.jsonl", "train.log", "lock", "notes.txt", "draft.tmp",
         "checkpoints/last.pt", "checkpoints/pretrained.pt", "checkpoints/last.pt.tmp", "checkpoints/step-3.pt",
         "checkpoints/mine.tmp", "events.out.tfevents.1.mine", "multirun.yaml", "sweeps/mine.txt", "report/report.csv",
         "report/report.md", "digits/vit/default/notes.tmp", "runs/notes.tmp", "eval/notes.txt", "deep/er/note.tmp",
         ".replaced/checkpoints/last.pt", "config.yaml.tmp"]
TEXTS = [b"mine: true\n", b"", b'{"event": "start"}\n', b"model: {}\ndata: {}\n", b"\x00\xff", b'{"finished": true}\n',
         b"[1]\n", b"2020-13-99\n", b"model: {}\ndata: {}\naugment: {}\noptimizer: {}\nschedule: {}\nengine: {}\n"]
PLACES = [".", "mine", "mine/new", "run", "run/mine", "elsewhere"]
WISHES = [[], [], ["fresh=true"], ["dry=true"], ["seed=1"], ["seed=1", "fresh=true"]]
MISTAKES = [[], [], ["data.root=typo"], ["model.img_size=33"], ["model.depth=abc"], ["model.dpeth=2"],
            ["init=run/checkpoints/gone.pt"], ["recipe=folder", "data.root=mine"], ["optimizer.opt=adamm"]]
OURS = re.compile(r"run/(config\.yaml|metrics\.jsonl?|events\.jsonl|train\.log|\.deepvit-run|"
                  r"events\.out\.tfevents\..*|checkpoints/(last|previous|best)\.pt(\.sha256)?)")


def command(chance: random.Random) -> list[str]:
    place, kind = chance.choice(PLACES), chance.random()
    if kind < 0.08:
        return ["report", place, *chance.choice([[], ["--out", chance.choice(PLACES)]])]
    if kind < 0.16:
        return ["eval", chance.choice(["checkpoint=run/checkpoints/best.pt", "checkpoint=mine/checkpoints/last.pt"]),
                *chance.choice([[], [f"out={place}"]])]
    words = [*TINY, *chance.choice(WISHES), *chance.choice(MISTAKES)]
    if kind < 0.4:
        return ["train", "-m", *words, f"hydra.sweep.dir={place}", chance.choice(["seed=0", "model.num_heads=1,3"])]
    return ["train", *words, f"hydra.run.dir={place}"]


def files(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def fill(top: Path, chance: random.Random, finished: Path) -> None:
    """The user's own files, here and in `mine`, and a run of ours with some of the user's in it."""
    shutil.copytree(finished, top / "run")
    for base in (top, top / "mine", top / "run"):
        for name in chance.sample(NAMES, chance.randint(0, 5)):
            path = base / name
            if base.name == "run" and (OURS.fullmatch(f"run/{name}") or name in (
                    "lock", "checkpoints/last.pt.tmp", "checkpoints/step-3.pt", ".replaced/checkpoints/last.pt")):
                continue  # names of ours in a folder of ours
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.choice(TEXTS))


@pytest.mark.parametrize(("first", "count"), [
    (0, 12), *(pytest.param(first, 500, marks=pytest.mark.slow) for first in range(12, 2012, 500))])
def test_no_command_changes_what_is_not_of_its_run(first, count, finished, tmp_path, monkeypatch, capfd):
    codes = set()
    for case in range(first, first + count):
        chance, top = random.Random(case), tmp_path / str(case)
        fill(top, chance, finished)
        before, words = files(top), command(chance)
        monkeypatch.chdir(top)
        GlobalHydra.instance().clear()
        try:
            code = main(words)
        except SystemExit as stop:  # argparse
            code = stop.code
        torch.set_num_threads(1)
        codes.add(code)
        assert code in (0, 2), (case, words, capfd.readouterr().err[-2000:])
        capfd.readouterr()
        after = files(top)
        for name, content in before.items():
            if name != "run/lock" and not (code == 0 and OURS.fullmatch(name)):
                assert after.get(name) == content, (case, words, name)
        shutil.rmtree(top)
    assert codes == {0, 2}


@pytest.mark.parametrize(("name", "text"), [
    ("config.yaml", "mine: true\n"), ("notes.txt", ""), ("checkpoints/last.pt", "weights"),
    ("events.jsonl", '{"event": "start"}\n'), ("lock", "process 1 on here"), ("config.yaml", "2020-13-99")])
def test_a_folder_of_somebody_else_is_refused(tmp_path, name, text):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match="hydra.run.dir"):
        RunFolder(tmp_path / "mine").claim()
    assert [*files(tmp_path / "mine")] == [name]


def test_a_folder_begun_by_a_version_without_a_mark_is_ours(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / MARK).unlink()
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.release()
    assert folder.is_ours() and folder.is_finished()


@pytest.mark.parametrize("text", ["", "torn: [", "mine", "2020-13-99", "[1]", "model: 1", "\udcff"])
def test_a_config_may_be_anything(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.config.write_text(text, errors="surrogateescape")
    asked = {"model": {"attention": {}}, "calibrate": "auto"}
    assert as_begun(asked, folder) is asked
    with pytest.raises(UserError, match="config.yaml is torn"):
        settings_of(folder)


def test_a_refused_run_leaves_an_empty_folder_as_it_was(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    folder.release()
    assert not files(tmp_path)


# fresh=true

class Crash(Exception):
    pass


def start_over(folder: RunFolder, steps: list[int], monkeypatch) -> None:
    """`fresh=true` up to its first checkpoint, cut before the file operation that `steps` counts down to."""
    def counted(function):
        def call(*arguments, **options):
            if steps[0] == 0:
                raise Crash
            steps[0] -= 1
            return function(*arguments, **options)
        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir"), (Path, "mkdir"), (Path, "write_text")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        assert folder.claim(fresh=True)
        folder.set_aside()
        folder.config.write_text("new")
        folder.metrics.write_text("")
        partial = folder.last.with_name("last.pt.tmp")
        partial.write_text("new")
        os.replace(partial, folder.last)
        folder.drop_replaced()


def test_a_replaced_run_comes_back_until_the_first_checkpoint_of_the_new_one(finished, tmp_path, monkeypatch):
    """Cut before each file operation: either the whole earlier run stands again, or the new one has a checkpoint."""
    seen = set()
    for cut in range(999):
        path = tmp_path / str(cut)
        shutil.copytree(finished, path)
        (path / "checkpoints" / "pretrained.pt").write_text("mine")
        before, folder = files(path), RunFolder(path)
        try:
            start_over(folder, [cut], monkeypatch)
            break
        except Crash:
            pass
        RunFolder._claimed.discard(path.resolve())  # as if the process had died
        if folder._lock:
            folder._lock.close()
        again = RunFolder(path)
        assert not again.claim()
        again.release()
        after = files(path)
        is_new = after["checkpoints/last.pt"] == b"new"
        seen.add(is_new)
        assert after["checkpoints/pretrained.pt"] == b"mine" and not (path / ".replaced").exists()
        if not is_new:
            assert {**after, "lock": b""} == {**before, "lock": b""}, cut
    assert seen == {True, False} and cut > 20
