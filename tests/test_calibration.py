"""`calibrate=N`: the statistics of torch's `update_bn`, whatever the ranks and batches, and both numbers kept."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.optim.swa_utils import update_bn

import deepvit
from deepvit.commands import main
from deepvit.config.compare import changed
from deepvit.config.compose import compose
from deepvit.engine.evaluate import calibrate
from deepvit.engine.folder import RunFolder
from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Precision
from deepvit.models import build_model, model_config
from deepvit.run.build import build, read_settings, shared_splits
from deepvit.run.measures import attention_metrics, calibration, images_to_calibrate
from deepvit.run.resume import as_begun, settings_of, upgraded

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@dataclass
class Batch:
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


def prepare(batch, step, device, training):
    assert not training
    return batch.images, None


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    config = model_config("deepvit_s") | {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2,
                                          "num_classes": 3, "reattention_blocks": None, **options}
    return build_model(config)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        0.2, 3, count)[:, None, None, None]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def run(model: nn.Module, x: torch.Tensor, size: int, ranks: Ranks = ALONE) -> dict[str, torch.Tensor]:
    assert calibrate(model, [Batch(part) for part in x.split(size)], prepare, ranks, Precision())
    return statistics(model)


def close(first: dict, second: dict) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-9) for name in first)


def test_statistics_are_those_of_update_bn():
    """The norms of both the stem and the heads; groups of 8 images in batches of 8, as update_bn knows no groups."""
    x, ours, theirs = images(24), network(), network()
    update_bn(x.split(8), theirs)
    assert len(statistics(ours)) == 8 and close(run(ours, x, 8), statistics(theirs))
    assert not close(statistics(ours), statistics(network()))


def test_batches_of_whole_groups_make_no_difference():
    grouped = {**model_config("deepvit_s")["attention"], "norm_batch": 4}
    assert close(run(network(attention=grouped), images(24), 4), run(network(attention=grouped), images(24), 12))


def test_dropout_and_stochastic_depth_are_off_and_all_else_is_as_before():
    model = network(drop_path_rate=0.9, drop_rate=0.5, attn_drop_rate=0.5)
    model.train()
    model.blocks[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" not in name}
    modes = [module.training for module in model.modules()]
    assert close(run(model, images(24), 8), run(network(), images(24), 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_asked_to_stop_it_leaves_the_statistics():
    model = network()
    answers = iter([False, True])
    before = statistics(model)
    assert not calibrate(model, [Batch(images(8))] * 3, prepare, ALONE, Precision(), lambda: next(answers))
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())


class Share(Ranks):
    """One of two ranks whose sums and agreements are made with what the other has."""

    def gather(self, value):
        if not isinstance(value, torch.Tensor):
            return [value]
        self.other.append(value)
        return list(self.other)


def test_ranks_with_shares_of_any_size_agree():
    """The exchange is one sum of what each has seen: 3 of 4 groups, and 1; and all of 4, and none."""
    whole = run(network(), images(32), 8)
    for first in (24, 32):
        box: list = []
        for part in (images(32)[:first], images(32)[first:]):
            rank = Share(0, 1, CPU)
            object.__setattr__(rank, "other", box)
            model = network()
            calibrate(model, [Batch(one) for one in part.split(8) if len(one)], prepare, rank, Precision())
        assert close(statistics(model), whole)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve steps on the digits, after which a running variance that began at 1 is far from the maps' own."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    code = main.main(["train", "model=deepvit16", "model.depth=2", "model.embed_dim=16", "model.num_heads=2",
                      "schedule.epochs=null", "schedule.steps=12", "schedule.warmup_epochs=null",
                      "schedule.warmup_steps=2", "schedule.eval_epochs=null", "schedule.eval_steps=6", "ema.decay=0.9",
                      "calibrate=96", "probe.images=4", "engine.accelerator=cpu", f"hydra.run.dir={folder}"])
    assert code == 0
    return folder


def test_a_run_keeps_both_numbers_and_the_checkpoint_has_what_was_evaluated(trained, tmp_path):
    result = json.loads((trained / "metrics.json").read_text())
    assert result["uncalibrated_loss"] != result["loss"] and "uncalibrated_top1" in result
    code = main.main(["eval", f"checkpoint={trained}/checkpoints/last.pt", "calibrate=96", f"out={tmp_path}",
                      "engine.accelerator=cpu"])
    again = json.loads(next(tmp_path.glob("*/metrics.json")).read_text())
    assert code == 0 and again["loss"] == again["uncalibrated_loss"] == result["loss"] and again["calibrate"] == 96


@pytest.mark.parametrize(("attention", "decay", "count"), [("reattention", "0.9", 512), ("reattention", "null", 0),
                                                           ("self", "0.9", 0)])
def test_left_open_it_is_for_averages_of_models_with_batch_statistics(attention, decay, count):
    settings = read_settings(compose([f"model/attention={attention}", f"ema.decay={decay}"]))
    model = network(attention=settings.model["attention"]["name"], stem="patch")
    assert images_to_calibrate(settings, model, 1437) == count
    assert images_to_calibrate(settings, model, 100) == (96 if count else 0)  # whole groups of 32
    assert images_to_calibrate(settings, model, 20) == 0


def test_fewer_images_than_a_group_are_taken_together():
    """As training takes them, where its whole batch is smaller."""
    settings = read_settings(compose(["data.fraction=0.017", "data.workers=0"]))
    train = shared_splits(settings.data, ALONE).train
    for norm_batch in (32, None):
        (batch,) = calibration(512, settings.data, train, {norm_batch}, ALONE)()
        assert len(batch) == len(train) < 32


def test_an_older_run_is_evaluated_as_it_was(tmp_path):
    folder, now = RunFolder(tmp_path), compose([])
    before = {name: value for name, value in now.items() if name != "calibrate"}
    folder.config.write_text(yaml.safe_dump(before))
    assert now["calibrate"] == "auto" and read_settings(as_begun(now, folder)).calibrate == 0
    assert read_settings(as_begun({**now, "calibrate": 96}, folder)).calibrate == 96


@pytest.mark.parametrize("other", ["self", "reattention_fc"])
def test_a_run_of_another_attention_is_not_taken_for_an_older_one(tmp_path, other):
    """Its attention has no norm_batch either, so the command for another one does not do without."""
    folder = RunFolder(tmp_path)
    folder.config.write_text(yaml.safe_dump(compose([f"model/attention={other}"])))
    assert as_begun(compose([]), folder) == compose([])


@pytest.mark.parametrize("attention", ["self", "reattention"])
def test_an_older_run_keeps_the_statistics_of_its_stem(tmp_path, attention):
    """Those of all images that a device takes at once; what it was is what it is now."""
    folder, now = RunFolder(tmp_path), compose(["model.stem=conv", f"model/attention={attention}"])
    before = {name: value for name, value in now.items() if name != "calibrate"}
    before["model"] = {**now["model"], "attention": {**now["model"]["attention"]}}
    before["model"]["attention"].pop("norm_batch", None)
    folder.config.write_text(yaml.safe_dump(before))
    settings = read_settings(as_begun(now, folder))
    assert network(attention=settings.model["attention"], stem=settings.model["stem"]).norm_batches == {None}
    assert changed(upgraded(before), as_begun(now, folder)) == {}
    folder.config.write_text(yaml.safe_dump(now))
    assert as_begun(now, folder) == now


@pytest.mark.parametrize("dry", ["false", "true"])
@pytest.mark.parametrize("wrong", ["calibrate=20", "logger=abc"])
def test_a_run_that_cannot_be_calibrated_or_logged_leaves_nothing_behind(tmp_path, capsys, wrong, dry):
    code = main.main(["train", "model=deepvit16", wrong, "data.batch_size=32", "engine.accelerator=cpu",
                      f"hydra.run.dir={tmp_path}/run", f"dry={dry}"])
    assert code == 2 and wrong in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


def test_attention_is_measured_with_the_statistics_of_the_evaluation(trained):
    built = build(settings_of(RunFolder(trained)), ALONE)
    found, _ = attention_metrics(built)(deepvit.load_model(trained / "checkpoints" / "last.pt", ema=True).eval(), 12)
    noted = json.loads((trained / "metrics.json").read_text())["probe_final"]
    assert noted["gain"] == pytest.approx(found["gain"], rel=1e-4)


@pytest.mark.parametrize(("setting", "words"), [("calibrate=20", ["calibrate=20", "norm_batch=32"]),
                                                ("calibrate=-1", ["calibrate=-1"]),
                                                ("calibrate=many", ["calibrate", "many"])])
def test_what_cannot_be_calibrated_is_refused(trained, tmp_path, capsys, setting, words):
    code = main.main(["eval", f"checkpoint={trained}/checkpoints/last.pt", setting, f"out={tmp_path}"])
    said = capsys.readouterr().err
    assert code == 2 and all(word in said for word in words) and not list(tmp_path.glob("*/metrics.json"))


def test_what_cannot_be_calibrated_does_not_keep_others_from_it(trained, tmp_path, capsys):
    """`calibrate=20` is less than a group of the one model; the other has no norm that sees several images."""
    plain = deepvit.create_model("vit", img_size=8, patch_size=2, embed_dim=8, depth=1, num_heads=1, num_classes=10)
    deepvit.save_model(plain, tmp_path / "plain.pt")
    code = main.main(["eval", f"checkpoint=[{trained}/checkpoints/last.pt,{tmp_path}/plain.pt]", "data=digits",
                      "calibrate=20", f"out={tmp_path}", "engine.accelerator=cpu"])
    said = "".join(capsys.readouterr())
    assert code == 2 and "norm_batch=32" in said and "calibrate=20 has no effect" in said
    [result] = map(json.loads, map(Path.read_text, tmp_path.glob("*/metrics.json")))
    assert result["calibrate"] == 0 and "uncalibrated_top1" not in result
