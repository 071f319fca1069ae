"""Configs: every choice composes and keeps its values; what is wrong is refused in one sentence, exit code 2."""

import re
from pathlib import Path

import pytest

from deepvit.commands import cli
from deepvit.config.compose import compose
from deepvit.config.run_name import LONGEST, run_folder, run_name
from deepvit.errors import UserError
from deepvit.models import list_models, model_config
from deepvit.run import build, micro_batches
from deepvit.run.build import read_settings

CONF = Path(build.__file__).parent / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


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
        build.splits(read_settings(compose(["data.root=/pictures"])).data)


def test_a_run_folder_is_a_function_of_what_changes_results():
    choice = {"recipe": "digits", "model": "vit16"}
    same = [["seed=1", "model.depth=8"], ["model.depth=8", "seed=1"],
            ["model.depth=8", "seed=1", "engine.devices=2", "data.root=/x", "data.workers=3", "fresh=true", "dry=true",
             "hydra.job.chdir=false", "sweep=null"]]
    assert {run_folder("runs", choice, overrides) for overrides in same} == {"runs/digits/vit16/model.depth=8-seed=1"}
    assert run_folder("runs", choice, []) == "runs/digits/vit16/default"


def test_run_names_are_safe_short_and_distinct():
    names = [run_name(overrides) for overrides in (
        ["init=/a/b.pt"], ["init=/a-b.pt"], ["model.reattention_blocks=[1,2]"], ["model.reattention_blocks=[1-2]"],
        [f"model.depth={depth}" for depth in range(40)], [f"model.depth={depth}" for depth in range(41)])]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._=-]+", name) and len(name) <= LONGEST for name in names)


@pytest.mark.parametrize(("batch", "world", "most", "mixup", "sizes"), [
    (64, 1, None, 0.0, [64]), (64, 2, None, 0.0, [32]), (64, 1, 16, 0.0, [16, 8, 4, 2, 1]),
    (64, 2, 16, 0.8, [16, 8, 4, 2]),
    (60, 1, 16, 0.0, [15, 12, 10, 6, 5, 4, 3, 2, 1]), (12, 1, 5, 0.8, [4, 2]), (12, 1, "auto", 0.8, [12, 6, 4, 2])])
def test_a_share_is_cut_into_whole_units(batch, world, most, mixup, sizes):
    config = compose([f"data.batch_size={batch}", f"engine.device_batch={most or 'null'}",
                      f"augment.mixup={mixup}", "model/attention=self"])
    assert micro_batches.allowed(read_settings(config), world) == sizes


@pytest.mark.parametrize(("batch", "world", "mixup"), [(63, 2, 0.0), (3, 3, 0.8), (10, 2, 0.8)])
def test_a_batch_that_does_not_divide_is_refused(batch, world, mixup):
    settings = read_settings(compose([f"data.batch_size={batch}", f"augment.mixup={mixup}", "model/attention=self"]))
    with pytest.raises(UserError, match=f"data.batch_size={batch}"):
        micro_batches.allowed(settings, world)


def test_epochs_become_steps():
    config = ["data.batch_size=100", "schedule.epochs=3", "schedule.warmup_epochs=0.5", "schedule.cooldown_epochs=1"]
    schedule, plan = build.schedule_and_plan(read_settings(compose(config)), epoch_size=1000)
    assert (schedule.steps, schedule.warmup_steps, plan.total, plan.eval_every) == (30, 5, 40, 10)


@pytest.mark.parametrize(("word", "expected"), [
    ("init=runs/seed=1/last.pt", "init='runs/seed=1/last.pt'"),
    ("checkpoint=[runs/a=1/b.pt, c.pt]", "checkpoint=['runs/a=1/b.pt', c.pt]"),
    ("init=runs/a=1/b.pt,runs/a=2/b.pt", "init='runs/a=1/b.pt','runs/a=2/b.pt'"),
    ("seed=1,2", "seed=1,2"), ("model.depth=range(1,3)", "model.depth=range(1,3)"), ("-m", "-m"),
    ("init='a=b'", "init='a=b'"), ("--config-dir=a=b", "--config-dir=a=b")])
def test_paths_with_an_equals_sign_need_no_quotes(word, expected):
    assert cli.quoted(word) == expected
