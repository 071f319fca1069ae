"""What will be asked of a GPU runs here in miniature, whole; so do the ways in which a step can end."""

import json
import sys
import time
from pathlib import Path

import gpu_session
import pytest
import soak
from gpu_session import Step

from deepvit.bench import rows
from deepvit.commands.bench import BENCHES


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path, capsys):
    assert gpu_session.main(["--miniature", str(tmp_path / "out")]) == 0, capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rows.jsonl", "tests.log", "bench.log", "run.log"}
    found = gpu_session.read(tmp_path / "out" / "rows.jsonl")
    assert {"tests", "run", "session", "ceilings", "train-step", "imagenet", "small", "precision"} == found.keys()
    run, beside = found["run"]["rows"]
    assert beside["images_per_s"] == sum(beside["each"]) > 0 and len(beside["each"]) == 2
    assert run["largest_difference"] == 0 and run["same_checkpoint"] and 10 <= run["continued_from"][0] < 30
    assert {row["outcome"] for row in found["tests"]["rows"]} == {"passed"}
    assert [row["hours"] > 0 for row in found["imagenet"]["rows"]] == [True, True]
    told = capsys.readouterr().out.strip().splitlines()
    assert told[-1].startswith("| precision") and "passed" in told[-1]

    docs = tmp_path / "docs"
    docs.mkdir()
    page = (soak.ROOT / "docs" / "performance.md").read_text()
    (docs / "performance.md").write_text(page)
    kept = json.loads(gpu_session.publish(tmp_path / "out", docs).read_text())
    assert kept["train-step"]["rows"] == found["train-step"]["rows"] and kept["train-step"]["provenance"]["git"]
    after = (docs / "performance.md").read_text()
    assert after.startswith(page.split(gpu_session.BEGIN)[0]) and after.endswith(page.split(gpu_session.END)[1])
    assert "train step, 1 blocks, 224 px, batch 1" in after and "killed and continued" in after
    gpu_session.publish(tmp_path / "out", docs)
    assert (docs / "performance.md").read_text() == after


def test_rows_without_a_target_are_published_too(tmp_path):
    (tmp_path / "performance.md").write_text(f"before {gpu_session.BEGIN}\n{gpu_session.END} after")
    where = {"date": "2026-11-27 12:00", "device": "NVIDIA H100", "driver": None, "triton": "3.6.0", "git": "abc",
             "versions": {"torch": "2.11.0"}}
    rows.append(tmp_path / "rows.jsonl", "provenance", where)
    rows.append(tmp_path / "rows.jsonl", "run", {"case": "a case", "name": "known", "images_per_s": 1.0})
    assert gpu_session.publish(tmp_path, tmp_path).name == "gpu-nvidia-h100.json"
    assert "a case" in (tmp_path / "performance.md").read_text()


def fail(path: Path) -> int:
    rows.append(path, "eval", {"case": "a case", "name": "known", "ms": 1.0})
    raise RuntimeError("the device is gone")


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return 0


def test_what_fails_does_not_end_the_others_and_what_does_not_fit_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    steps = [Step("fails", "a", 60, fail, (path,)), Step("hangs", "a", 0.5, sleep, (60,)),
             Step("dies", "a", 60, sys.exit, (7,)), Step("ends before its kill", "a", 60, sleep, (0,), lambda: False),
             Step("is killed", "a", 60, sleep, (60,), lambda: True), Step("works", "a", 60, sleep, (0,)),
             Step("is too long", "a", 500, sleep, (0,))]
    went = {row["name"]: row["went"] for row in gpu_session.take(steps, tmp_path, budget=200)}
    assert went == {"fails": "failed: exit code 1", "hangs": "failed: over 0 s", "dies": "failed: exit code 7",
                    "ends before its kill": "failed: exit code 0", "is killed": "passed", "works": "passed",
                    "is too long": "skipped"}
    assert "the device is gone" in (tmp_path / "a.log").read_text()
    known = gpu_session.read(path)
    assert known["eval"]["rows"][0]["name"] == "known" and len(known["session"]["rows"]) == len(steps)


def test_losses_that_differ_are_a_failure(tmp_path):
    for name, loss in (("whole", 2.0), ("cut", 2.2)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(
            {"step": 5, "loss": loss, "lr": 1.0, "images_per_s": 1.0, "data_wait": 0.0}) + "\n")
        gpu_session.torch.save({"step": 5}, tmp_path / name / "checkpoints" / "last.pt")
    for bound, code in ((0.05, 1), (0.2, 0)):
        assert gpu_session.compare(tmp_path / "rows", tmp_path / "whole", tmp_path / "cut", bound) == code


@pytest.mark.parametrize("cifar10", [None, Path("/cifar10")])
def test_every_step_on_a_gpu_has_a_command_that_exists(tmp_path, cifar10):
    """What the miniature leaves out differs from it in these words alone."""
    steps = gpu_session.on_a_gpu(tmp_path, tmp_path, cifar10)
    benches = [step.arguments[1] for step in steps if step.arguments[0] == "bench"]
    assert set(benches) == BENCHES.keys() - {"loader", "listing", "startup", "forecast"} and len(steps) == 17
    assert len({step.log for step in steps}) <= 7
    assert [step.name for step in steps if "compiled" in step.name] == [step.name for step in steps][-2:]  # --only
    words = {word for step in steps for word in step.arguments if str(word).startswith("--")}
    assert words - {"--cifar10"} == {"--seconds", "--compile", "--json"}
    assert any("cifar10" in str(word) for step in steps for word in step.arguments if step.name == "training")


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_session.main([str(tmp_path)]) == 2
    assert "--miniature" in capsys.readouterr().err
