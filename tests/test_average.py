"""`deepvit average`: the mean of weights, as a checkpoint that tells where it came from."""

from pathlib import Path

import pytest
import torch

import deepvit
from deepvit.commands.cli import quoted
from deepvit.commands.main import main
from deepvit.config.compose import compose
from deepvit.engine import checkpoint
from deepvit.errors import BAD_INPUT, DONE
from deepvit.importers.ours import described

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 2, "num_classes": 3}


def written(path: Path, seed: int, depth: int = 2, **said) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights, as a run writes it; returns the weights."""
    torch.manual_seed(seed)
    model = deepvit.create_model("deepvit16", depth=depth, **SMALL)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.full_like(tensor, seed) if not tensor.is_floating_point() else torch.randn_like(tensor))
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, {**described(model, ["a", "b", "c"]), "step": 10 * seed, **said})
    return model.state_dict()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_last_weights_of_a_run_are_averaged_and_named(tmp_path, suffix):
    names = {1: "step-10.pt", 2: "step-20.pt", 3: "previous.pt", 4: "last.pt"}
    weights = [written(tmp_path / "run" / "checkpoints" / name, seed) for seed, name in names.items()]
    out = tmp_path / f"out.{suffix}"
    assert main(["average", str(tmp_path / "run"), "--last", "3", "--out", str(out)]) == DONE
    model = deepvit.load_model(out)
    for name, tensor in model.state_dict().items():
        parts = [one[name] for one in weights[1:]]
        expected = sum(parts[1:], parts[0]) / 3 if tensor.is_floating_point() else parts[-1]
        torch.testing.assert_close(tensor, expected)
    said = model.load_report.said
    assert said["classes"] == ["a", "b", "c"] and [one["step"] for one in said["averaged"]] == [20, 30, 40]
    assert "calibrate=512" in model.load_report.notes[-1]
    assert main(["average", str(tmp_path / "run"), "--last", "3", "--out", str(out)]) == BAD_INPUT  # it is there


@pytest.mark.parametrize(("ema", "said", "is_noted"), [
    (True, {"evaluated": 10}, False), (True, {"evaluated": 0}, True), (False, {"evaluated": 0}, False),
    (True, {"metrics": {"top1": 50.0}}, False)])  # the last: a best checkpoint of an earlier version
def test_averages_from_between_evaluations_are_noted(tmp_path, ema, said, is_noted):
    """Their norms have the statistics of the raw weights."""
    state = written(tmp_path / "best.pt", 1)
    written(tmp_path / "last.pt", 1, ema=state, **said)
    report = deepvit.load_model(tmp_path / "last.pt", ema=ema).load_report
    assert any("calibrate=512" in note for note in report.notes) == is_noted
    begun = deepvit.create_model("deepvit16", depth=2, **SMALL)  # as with init=
    notes = deepvit.load_weights(begun, tmp_path / "last.pt", ema=ema).notes
    assert any("calibrate=512" in note for note in notes) == is_noted


@pytest.mark.parametrize(("words", "expected"), [
    (["run"], "engine.keep_epochs=1"),
    (["gone", "--last", "2"], "0 checkpoints"),
    (["run", "--last", "0"], "--last"),
    (["run", "--last", "-1"], "--last"),
    (["mixed", "--last", "2"], "different models"),
    (["run", "--last", "2", "--out", "x.txt"], "x.txt"),
    (["run", "--last", "2", "--out", "a.pt/x.pt"], "a.pt/x.pt cannot be written (NotADirectoryError"),
    (["run", "--last", "2", "--weights", "ema"], "no EMA"),
])
def test_what_has_no_average_is_one_sentence(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    for name, depth in (("run", 2), ("mixed", 3)):
        written(Path(name, "checkpoints/previous.pt"), 1)
        written(Path(name, "checkpoints/last.pt"), 2, depth=depth)
    assert main(["average", *words]) == BAD_INPUT
    sentence = capsys.readouterr().err
    assert expected in sentence and sentence.count("\n") == 1


def test_the_average_and_the_last_are_evaluated_with_statistics_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("previous", 1), ("last", 2)):
        written(Path("a run (1), copy", "checkpoints", f"{name}.pt"), seed)
    asked = []
    monkeypatch.setattr("deepvit.commands.cli._start", lambda job, words: asked.extend(map(quoted, words)) or DONE)
    assert main(["average", "a run (1), copy", "--last", "2", "--eval"]) == DONE
    config = compose(asked, "eval")
    assert config["checkpoint"] == [f"a run (1), copy/checkpoints/{name}.pt" for name in ("last", "average")]
    assert config["calibrate"] == 512
