"""Configs: every choice composes and keeps its values; what is wrong is refused in one sentence, exit code 2."""

import re

import pytest
import torch
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from deepvit.commands import cli
from deepvit.config import CONF, provenance
from deepvit.config.compose import compose
from deepvit.data import source_of
from deepvit.engine.folder import RunFolder
from deepvit.errors import UserError
from deepvit.models import list_models, model_config
from deepvit.run import build, micro_batches
from deepvit.run.build import read_settings
from deepvit.run.resume import as_begun


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("word, meant", [
    ("num_heads=3", "++model.num_heads=3"), ("model.arch=vit16", "++model.arch=vit16"), ("weights=raw", "weights=raw"),
    ("+model.qk_scale=0.2", "++model.qk_scale=0.2"), ("model/attention=self", "++model.attention=self"),
    ("grid_size=[2,8]", "++model.grid_size=[2,8]"), ("data=digits", "data=digits"), ("-m", "-m")])
def test_a_setting_of_the_model_in_an_evaluation(word, meant):
    assert cli.of_the_model(word) == meant


@pytest.mark.parametrize("group", ["model", "model/attention", "augment", "optimizer", "schedule", "precision",
                                   "recipe"])
def test_every_choice_makes_settings(group):
    # digits counts in epochs, some schedules in steps, which take no cooldown
    recipe = ["init=weights.pt"] if group == "recipe" else ["recipe=imagenet", "schedule.cooldown_epochs=0"]
    for name in choices(group):
        read_settings(compose([*recipe, f"{group}={name}"]))


def test_fine_tuning_needs_weights():
    with pytest.raises(UserError, match="head=zero is for weights that are loaded: give init=CHECKPOINT"):
        read_settings(compose(["recipe=finetune_cifar10"]))


@pytest.mark.parametrize("name", list_models())
def test_hydra_and_the_plain_reader_agree(name):
    """`create_model` reads the YAML files without hydra: both must see the same model."""
    hydra = compose([f"model={name}", "recipe=imagenet"])["model"]
    assert {**hydra, "drop_path_rate": 0.0} == model_config(name)  # the recipe's stochastic depth apart


def test_a_recipe_is_not_overruled_by_the_defaults():
    """`_self_` above recipe, or this is silently lost."""
    config = compose(["recipe=imagenet_32b", "model=deepvit32"])
    assert (config["augment"]["mixup"], config["augment"]["cutmix"]) == (0.1, 0.0)
    assert config["loss"]["cosine_blocks"] == 12 and config["ema"]["decay"] == 0.99996
    assert config["model"]["drop_path_rate"] == 0.2 and config["data"]["source"] == "imagenet"


def test_the_command_line_overrules_a_recipe_and_a_model():
    config = compose(["model=deepvit32", "model/attention=self", "recipe=imagenet", "augment=none", "seed=7"])
    assert config["model"]["attention"]["name"] == "self" and config["model"]["depth"] == 32
    assert config["augment"]["mixup"] == 0.0 and config["seed"] == 7


@pytest.mark.parametrize(("override", "words"), [
    ("+model.dpeth=3", ["model.dpeth", "depth"]),
    ("model.depth=abc", ["model.depth", "abc", "whole number"]),
    ("model.depth=0", ["model.depth", "above 0"]),
    ("model.attention=self", ["model.attention=self", "model/attention=NAME"]),
    ("head=zero", ["init=", "or head=keep"]), ("freeze=2", ["init=", "or freeze=null"]),
    ("model.embed_dim=2.5", ["model.embed_dim", "whole number"]),
    ("+sede=3", ["sede", "seed"]),
    ("+data.fracton=0.1", ["data.fracton", "fraction"]),
    ("data.batch_size=0", ["data.batch_size", "above 0"]),
    ("schedule.steps=10", ["schedule.epochs", "schedule.steps", "null"]),
    ("optimizer.lr=fast", ["optimizer.lr", "fast", "number"]),
    ("+model.attention.mx=true", ["model.attention.mx", "mix"]),
    ("head=gone", ["head", "gone", "keep"]),
    ("ema.decay=1.5", ["ema.decay", "below 1"]),
    ("optimizer.lr=nan", ["optimizer.lr=nan", "finite"]),
    ("optimizer.betas=[1,2]", ["optimizer.betas=1"]),
    ("schedule.epochs=inf", ["schedule.epochs=inf", "finite"]),
    ("schedule.epochs=-3", ["schedule.epochs=-3", "above 0"]),
    ("schedule.min_lr=-1", ["schedule.min_lr=-1", "at least 0"]),
    ("model.drop_path_rate=2", ["model.drop_path_rate=2", "at most 1"]),
    ("model.mlp_ratio=0", ["model.mlp_ratio=0", "above 0"]),
    ("seed=123456789012345678901234567890", ["seed=", "from 0"]),
    ("data.interpolation=foo", ["data.interpolation", "foo", "bicubic"]),
])
def test_wrong_settings_are_named(override, words):
    with pytest.raises(UserError) as caught:
        read_settings(compose([override]))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("overrides", "words"), [
    (["model.dpeth=3"], ["model.dpeth", "Did you mean 'model.depth'"]),
    (["model=deepvit33"], ["deepvit33", "Did you mean 'deepvit32'"]),
    (["model/attention=reattn"], ["reattn", "reattention"]),
    (["recipe=imagnet"], ["imagnet", "imagenet"]),
])
def test_hydras_refusals_in_a_users_words(overrides, words):
    with pytest.raises((cli.HydraException, cli.OmegaConfBaseException)) as caught:
        compose(overrides)
    sentence = cli.hydra_error(caught.value)
    assert all(word in sentence for word in words) and "\n" not in sentence


def test_data_that_a_recipe_does_not_use_is_refused():
    with pytest.raises(UserError, match="recipe=imagenet"):
        source_of(read_settings(compose(["data.root=/images"])).data).splits()


def folder_of(*words: str) -> str:
    """The default run folder of a command line."""
    OmegaConf.register_new_resolver("run_folder", provenance.run_folder, replace=True)
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return OmegaConf.select(loader.load_configuration("train", list(words), RunMode.RUN), "hydra.run.dir")


@pytest.mark.parametrize(("words", "name"), [
    ([], "default"),
    (["seed=1", "model.depth=8"], "model.depth=8-seed=1"),
    (["model.depth=8", "seed=1", "engine.devices=2", "data.root=/x", "data.workers=3", "fresh=true", "dry=true",
      "hydra.job.chdir=false", "sweep=digits_depth", "probe.images=3", "data.eval_batch_size=7"],
     "model.depth=8-seed=1"),
    (["optimizer.lr=0.0020", "seed=0", "schedule.epochs=15.0", "augment=none"], "default"),  # the recipe's own
    (["schedule.epochs=3.0"], "schedule.epochs=3"),
    (["model.mlp_ratio=3"], "default"),
    (["model.img_size=16"], "model.img_size=16"),  # data.img_size follows
    (["data.img_size=8"], "default"),
    (["model.img_size=16", "data.img_size=8"], "data.img_size=8-model.img_size=16"),
    (["augment=light", "augment.hflip=0.0"], "augment=light"),  # ${data.hflip}, 0 for digits
    (["augment=light", "augment.hflip=0.1", "model/attention=self"],
     "augment.hflip=0.1-augment=light-model-attention=self"),
    (["optimizer.lr=1e-5"], "optimizer.lr=1e-05"),
    (["+model.attention.foo=null"], "model.attention.foo=null"),
])
def test_a_run_is_named_by_what_differs_from_its_default(words, name):
    assert folder_of(*words) == f"runs/digits/deepvit16/{name}" == folder_of(*reversed(words))


def test_a_recipe_and_a_model_stand_above_the_name():
    assert folder_of("recipe=imagenet", "model=deepvit32", "precision=bf16") == "runs/imagenet/deepvit32/default"
    assert folder_of("recipe=finetune_folder", "init=x.pt").startswith("runs/finetune_folder/vit_b16/init=x.pt")


def test_run_names_are_safe_short_and_distinct():
    many = [f"model.{key}={value}" for value in (0.25, 0.5) for key in (
        "drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate", "map_scale", "residual_scale", "norm_eps")]
    names = [folder_of(*words).removeprefix("runs/digits/deepvit16/") for words in (
        ["init=/a/b.pt"], ["init=/a-b.pt"], ["init=x-seed=1".replace("=1", "\\=1")], ["init=x", "seed=1"],
        ["model.reattention_blocks=[1,2]"], ["model.reattention_blocks='1-2'"], many[:7], many[7:])]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._=-]+", name) and len(name) <= provenance.LONGEST for name in names)


def test_a_run_of_the_old_name_is_continued(tmp_path, monkeypatch):
    """Earlier versions named a run by its overrides as typed."""
    monkeypatch.chdir(tmp_path)
    words = ["model=vit", "seed=1", "schedule.epochs=15"]
    old = tmp_path / "runs" / "digits" / "vit" / "model=vit-schedule.epochs=15-seed=1"
    new = tmp_path / "runs" / "digits" / "vit" / "seed=1"
    assert folder_of(*words) == str(new.relative_to(tmp_path))
    old.mkdir(parents=True)
    (old / "config.yaml").touch()
    assert folder_of(*words) == str(old.relative_to(tmp_path))
    new.mkdir()
    (new / "config.yaml").touch()
    assert folder_of(*words) == str(new.relative_to(tmp_path))


@pytest.mark.parametrize(("batch", "world", "most", "mixup", "sizes"), [
    (64, 1, None, 0.0, [64]), (64, 2, None, 0.0, [32]), (64, 1, 16, 0.0, [16, 8, 4, 2, 1]),
    (64, 2, 16, 0.8, [16, 8, 4, 2]),
    (60, 1, 16, 0.0, [15, 12, 10, 6, 5, 4, 3, 2, 1]), (12, 1, 5, 0.8, [4, 2]), (12, 1, "auto", 0.8, [12, 6, 4, 2])])
def test_a_share_is_cut_into_whole_units(batch, world, most, mixup, sizes):
    config = compose([f"data.batch_size={batch}", f"engine.device_batch={most or 'null'}",
                      f"augment.mixup={mixup}", "model/attention=self"])
    assert micro_batches.allowed(read_settings(config), set(), world) == sizes


@pytest.mark.parametrize(("batch", "world", "mixup"), [(63, 2, 0.0), (3, 3, 0.8), (10, 2, 0.8)])
def test_a_batch_that_does_not_divide_is_refused(batch, world, mixup):
    settings = read_settings(compose([f"data.batch_size={batch}", f"augment.mixup={mixup}", "model/attention=self"]))
    with pytest.raises(UserError, match=f"data.batch_size={batch}"):
        micro_batches.allowed(settings, set(), world)


def test_epochs_become_steps():
    config = ["data.batch_size=100", "schedule.epochs=3", "schedule.warmup_epochs=0.5", "schedule.cooldown_epochs=1"]
    schedule, plan = build.schedule_and_plan(read_settings(compose(config)), epoch_size=1000)
    assert (schedule.steps, schedule.warmup_steps, plan.total, plan.eval_every) == (30, 5, 40, 10)
    config = ["data.batch_size=96", "schedule.epochs=15"]
    assert build.schedule_and_plan(read_settings(compose(config)), epoch_size=800)[0].steps == 125  # 15 * 800 / 96
    config = ["schedule.epochs=1e-8", "schedule.warmup_epochs=0"]
    assert build.schedule_and_plan(read_settings(compose(config)), epoch_size=800)[0].steps == 1


def test_what_is_due_every_so_many_epochs_is_due_together():
    """Weights that are kept, and the attention, are those of the evaluation, also where an epoch is not whole steps."""
    config = ["data.batch_size=128", "schedule.eval_epochs=5", "engine.keep_epochs=5", "probe.every_epochs=5"]
    plan = build.schedule_and_plan(read_settings(compose(config)), epoch_size=50_000)[1]
    assert (plan.eval_every, plan.keep_every, plan.probe_every, plan.save_every) == (1954, 1954, 1954, 391)


@pytest.mark.parametrize(("word", "expected"), [
    ("init=runs/seed=1/last.pt", "init='runs/seed=1/last.pt'"),
    ("checkpoint=[runs/a=1/b.pt, c.pt]", "checkpoint=['runs/a=1/b.pt', c.pt]"),
    ("init=runs/a=1/b.pt,runs/a=2/b.pt", "init='runs/a=1/b.pt','runs/a=2/b.pt'"),
    ("seed=1,2", "seed=1,2"), ("model.depth=range(1,3)", "model.depth=range(1,3)"), ("-m", "-m"),
    ("init='a=b'", "init='a=b'"), ("--config-dir=a=b", "--config-dir=a=b")])
def test_paths_with_an_equals_sign_need_no_quotes(word, expected):
    assert cli.quoted(word) == expected


@pytest.mark.parametrize(("has", "name", "dtype"), [(True, "bf16", "bfloat16"), (False, "fp32", "float32")])
def test_automatic_precision_is_decided_once(tmp_path, monkeypatch, has, name, dtype):
    """By the device that the run begins on; another one later, and another default, change nothing."""
    asked = {**compose([]), "origin": {"choices": {"precision": "auto"}}}
    monkeypatch.setattr(build, "has_bf16", lambda device: has)
    begun = build.with_precision(asked, torch.device("cpu"))
    assert begun["precision"] == {"dtype": dtype, "tf32": has, "scale_gradients": False}
    assert begun["origin"]["choices"]["precision"] == name
    monkeypatch.setattr(build, "has_bf16", lambda device: not has)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(begun))
    assert build.with_precision(as_begun(asked, RunFolder(tmp_path)), torch.device("cpu")) == begun
    typed = {**asked, "precision": {**begun["precision"], "dtype": "float16"}}
    assert as_begun(typed, RunFolder(tmp_path))["precision"] == typed["precision"]


@pytest.mark.parametrize("recipe", ["digits", "cifar10", "folder", "finetune_folder"])
def test_recipes_that_name_no_precision_leave_it_to_the_device(recipe):
    assert compose([f"recipe={recipe}", "data.root=x", "init=x"])["precision"]["dtype"] == "auto"
