"""What a setting may not be, and what has no effect beside what: refused by name, before anything is made."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from deepvit import create_model
from deepvit.config.compare import changed
from deepvit.config.compose import compose
from deepvit.data import load
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.models.registry import without_effect
from deepvit.run import build, resume
from deepvit.run.measures import forecast
from deepvit.run.launch import launcher, refuse_other_count
from deepvit.run.train import train

ALONE = Ranks(0, 1, torch.device("cpu"))
STEPS = ["schedule.epochs=null", "schedule.steps=9", "schedule.warmup_epochs=null", "schedule.warmup_steps=2"]


def check(*overrides: str) -> None:
    build.check(build.read_settings(compose(["model=vit", "model.depth=2", *overrides])), ALONE)


@pytest.mark.parametrize(("overrides", "words"), [
    ([*STEPS, "schedule.cooldown_epochs=3"], ["schedule.cooldown_epochs=3", "schedule.steps=9", "=0"]),
    (["optimizer=sgd", "optimizer.betas=[0.9,0.9]"], ["optimizer.betas", "momentum", "null"]),
    (["optimizer=sgd", "optimizer.eps=1e-3"], ["optimizer.eps", "null"]),
    (["optimizer.momentum=0.8"], ["optimizer.momentum=0.8", "adamw", "null"]),
    (["optimizer.betas=[0.9]"], ["optimizer.betas", "list of 2"]),
    (["optimizer.opt=adan", "optimizer.betas=[0.9,0.9]"], ["optimizer.betas", "list of 3"]),
    (["optimizer=sgd", "optimizer.kwargs={nestrov: true}"], ["optimizer.kwargs.nestrov", "nesterov"]),
    (["optimizer=sgd", "optimizer.kwargs={nesterov: sometimes}"], ["optimizer.kwargs.nesterov", "true or false"]),
    *((["optimizer.kwargs={" + name + ": 0.1}"], [f"optimizer.{name}."]) for name in (
        "lr", "weight_decay", "momentum", "betas", "eps")),
    (["optimizer.kwargs={foreach: true}"], ["optimizer.opt=adamw", "foreach"]),
    (["optimizer.opt=adahessian"], ["optimizer.opt=adahessian", "grad_fn"]),  # only its first step says so
    (["ema.warmup=true"], ["ema.warmup", "ema.decay"]),
    (["dialect=timm"], ["dialect=timm", "init="]),
    (["augment.repeats=3"], ["augment.repeats=3", "data.batch_size=32"]),
    (["augment.gaussian_blur_prob=0.1"], ["augment.gaussian_blur_prob=0.1", "model.img_size"]),
    (["model.in_chans=1"], ["model.in_chans=1", "3 channels"]),
    (["data.img_size=16"], ["data.img_size=16", "model.img_size=8"]),
    (["model.img_size=[8]"], ["img_size", "list of 2"]),
    (["model.patch_size=[2,2,9]"], ["model.patch_size", "list of 2"]),
    (["augment.crop_scale=[0.1,0.2,0.3]"], ["augment.crop_scale", "list of 2"]),
    (["augment.color_jitter=[0.1,0.2]"], ["augment.color_jitter", "list of 3"]),
    (["augment.color_jitter=[0.1,0.1,0.1,0.9]"], ["augment.color_jitter", "hue"]),
    (["engine.timeout_s=1e300"], ["engine.timeout_s", "at most"]),
    (["engine.log_every=123456789012345678901"], ["engine.log_every", "finite"]),
    (["data.batch_size=2.5"], ["data.batch_size", "whole number"]),
    (["probe=3"], ["probe=3", "probe.images"]),
    (["model.residual_scale=0"], ["model.residual_scale=0", "above 0"]),
    (["model.embed_dim=60000", "model.num_heads=1", "model.depth=999"], ["GiB", "model.embed_dim"]),
    (["+model.attention.depth=3", "model/attention=temperature_decay"], ["model.attention.depth", "the model"]),
    (["model/attention=temperature_decay", "model.attention.first=0"], ["model.attention.first=0", "above 0"]),
    (["+model.attention.attn_drop=2"], ["model.attention.attn_drop=2", "at most 1"]),
    (["model.stem={name: conv, norm: true}"], ["model.stem.norm"]),
    (["model.stem={name: [patch]}"], ["stem=['patch']", "conv"]),
    (["~model.in_chans"], ["model.in_chans", "missing"]),
    (["optimizer.layer_decay=1e38"], ["optimizer.layer_decay", "at most 1"]),
    *(([f"{name}={value}"], [f"{name}={value}"]) for name, value in (
        ("data.fraction", 0), ("augment.mixup", -1), ("augment.mix_prob", 1.5), ("augment.label_smoothing", 1.0))),
    (["data.fraction=" + "x" * 999], ["data.fraction is 'xx", "xx...", "a number"]),
], ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_sentence_names_it(overrides, words):
    with pytest.raises(UserError) as refused:
        check(*overrides)
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


NORM_ONLY, DROPOUT = "model/attention=norm_only", "model/attention=attention_dropout"


@pytest.mark.parametrize(("overrides", "words"), [
    (["model/attention=reattention_fc", "+model.attention.norm_eps=0.1"], ["attention.norm_eps", ".norm=false"]),
    ([NORM_ONLY, "+model.attention.theta_init=identity"], ["attention.theta_init", ".mix=false"]),
    ([DROPOUT, "model.attn_drop_rate=0.2"], ["model.attn_drop_rate", "attention.attn_drop=0.1"]),
    (["model/attention=self_sharp", "model.qk_scale=0.5"], ["model.qk_scale", "attention.qk_scale=2.0"]),
    (["+model.attention.map_scale=1", "model.map_scale=0.5"], ["model.map_scale", "attention.map_scale=1"]),
    (["model/attention=self_sharp"], []),
    (["model.reattention_blocks=[0]"], ["model.reattention_blocks", "model/attention=self"]),
    (["model/attention=reattention", "model.attention.norm=false"], []), ([NORM_ONLY], []), ([DROPOUT], []),
    ([DROPOUT, "model.attn_drop_rate=0.2", "model.reattention_blocks=[0]"], []),
], ids=lambda value: value[-1] if value and "=" in value[0] else "")
def test_what_a_model_does_not_heed_is_said(overrides, words):
    found = " ".join(without_effect(compose(["model=vit", *overrides])["model"]))
    assert bool(found) == bool(words) and all(word in found for word in words)


@pytest.mark.parametrize(("overrides", "idle"), [
    (["data.hflip=0.5"], ["data.hflip"]), (["augment=light", "data.hflip=0.5"], []),
    (["augment=deepvit", "augment.color_jitter=0.8", "augment.switch_prob=0.1"], ["augment.color_jitter"]),
    (["augment=three", "augment.color_jitter=0.8"], []),
    (["augment.mixup=0.8", "augment.switch_prob=0.1", "augment.mix_prob=0.5"], ["augment.switch_prob"]),
    (["augment.erasing_count=2", "augment.crop_ratio=[1,1]"], ["augment.crop_ratio", "augment.erasing_count"]),
    (["augment.interpolation=random", "probe.every_epochs=1", "probe.images=0"],
     ["augment.interpolation", "probe.every_epochs"]),
    (["optimizer=sgd"], ["lr=0.03 of optimizer=sgd"]), (["optimizer=sgd", "optimizer.lr=0.002"], []),
    (["optimizer=lamb", "recipe=imagenet", "data.root=x"], []),
    (["loss.cosine_weight=1", "schedule.min_lr=1e-5"], ["loss.cosine_weight"]),
    (["schedule=constant", "schedule.min_lr=1e-5"], ["schedule.min_lr"]),
], ids=lambda value: value[-1] if value and "=" in value[0] else "")
def test_what_has_no_effect_beside_others_is_said(overrides, idle, caplog):
    config = {**compose(["model=vit", *overrides]), "origin": {"overrides": overrides}}
    with caplog.at_level("WARNING", "deepvit"):
        build.check(build.read_settings(config), ALONE)
    assert [line.partition(" has no effect beside ")[0] for line in caplog.messages] == idle


@pytest.mark.parametrize("overrides", [
    ["optimizer=sgd", "optimizer.kwargs={nesterov: true}"], ["optimizer=sgd", "+optimizer.kwargs.dampening=0"],
    ["optimizer.opt=adan", "optimizer.betas=[0.9,0.9,0.9]"], ["model.init_values=0"], ["augment.color_jitter=[0,0,0]"],
    ["optimizer.opt=rmsprop", "optimizer.momentum=0.5", "optimizer.eps=1e-3"]], ids=lambda overrides: overrides[-1])
def test_what_goes_together_is_taken(overrides):
    check(*overrides)


def test_a_run_keeps_its_average():
    begun, splits = {"run": compose(), "classes": ["cat"]}, SimpleNamespace(class_ids=["cat"])
    assert resume.with_changes(compose(), begun, splits, {"pictures": {}}) == compose()
    with pytest.raises(UserError, match="ema.decay"):
        resume.with_changes(compose(["ema.decay=0.99"]), begun, splits, {"pictures": {}})


def test_a_run_that_is_continued_at_other_rates_tells_them_all():
    splits, content = SimpleNamespace(class_ids=["cat"]), {"classes": ["cat"], "step": 0, "run": compose()}
    for step, rate in ((7, 0.5), (9, 0.25)):
        content["step"], asked = step, compose([f"optimizer.lr={rate}"])
        content["run"] = now = resume.with_changes(asked, content, splits, {"pictures": {}})
    first, second = now["origin"]["changes"]
    assert first.startswith("optimizer.lr=0.5 ") and "step 7" in first
    assert second.startswith("optimizer.lr=0.25 instead of 0.5 ") and "step 9" in second
    assert resume.with_changes(compose(["optimizer.lr=0.25"]), content, splits, {"pictures": {}}) == now


def test_a_run_that_is_continued_with_other_batch_statistics_tells_it():
    splits, content = SimpleNamespace(class_ids=["cat"]), {"classes": ["cat"], "step": 7, "run": compose()}
    for before, ungrouped, told in ((32, 16, 1), (32, 32, 0), (32, None, 0), (None, 16, 0)):
        known = {"micro_batch": before} if before else {}
        config = resume.with_changes(compose(), content | known, splits, {"pictures": {}, "micro_batch": ungrouped})
        changes = (config.get("origin") or {}).get("changes", [])
        assert changes == ["engine.device_batch=16 instead of 32 from step 7 on"] * told


def test_the_engine_is_checked_before_a_rank_is_started():
    for value in ("many", 0, 2.5, True):
        config = compose()
        config["engine"]["devices"] = value
        with pytest.raises(UserError, match="engine.devices"):
            launcher(config, None)


@pytest.mark.parametrize("job", [forecast, lambda config, *rest: train(config, "run", *rest)])
def test_nothing_is_made_by_what_is_refused(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model.in_chans=1"):
        job(compose(["model.in_chans=1"]), ALONE, StopRequest())
    assert not list(tmp_path.iterdir())


def test_one_class_is_nothing_to_learn(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "images" / "cat").mkdir(parents=True)
        (tmp_path / split / "images" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="data.root=.* one class only, 'images'.* level"):
        load("folder", root=str(tmp_path))


def test_settings_of_other_data_are_refused():
    for given in ({"name": "wds"}, {"train_split": "all"}, {"val_split": "test"}):
        with pytest.raises(UserError, match="data=timm"):
            load("digits", **given)


def test_images_of_the_set_itself_are_not_held_out(tmp_path):
    with pytest.raises(UserError, match="data.val_fraction=0.1.*own test images"):
        load("cifar10", root=str(tmp_path), val_fraction=0.1)


def test_another_number_of_devices_than_the_launcher_started(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "here"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    config = compose(["engine.devices=3"])
    with pytest.raises(UserError, match="engine.devices=3.*torchrun"):
        launcher(config, tmp_path)
    for devices in (None, 2, 4):
        refuse_other_count({"devices": devices})


def test_more_repeats_than_images():
    settings = build.read_settings(compose(["augment.repeats=32"]))
    with pytest.raises(UserError, match="augment.repeats=32"):
        build.schedule_and_plan(settings, 31)


def test_a_run_that_began_before_optimizer_kwargs_goes_on(tmp_path):
    """Its momentum beside AdamW was accepted, and did nothing."""
    now = compose()
    before = yaml.safe_load(yaml.safe_dump(now))
    del before["optimizer"]["kwargs"]
    before["optimizer"]["momentum"] = 0.9
    assert changed(resume.upgraded(before), now) == {}
    assert build.read_settings(resume.upgraded(before)) == build.read_settings(now)


def test_a_scale_of_queries_and_keys_is_never_taken_for_none():
    with pytest.raises(UserError, match="qk_scale=0"):
        create_model("vit", qk_scale=0.0)
