"""`init=` makes the model, `freeze=` keeps parts of it, and every command takes what a file does not tell."""

import pytest
import timm
import torch
import yaml

import deepvit
from deepvit.config.compose import compose
from deepvit.engine.ranks import Ranks
from deepvit.errors import BAD_INPUT, DONE, UserError
from deepvit.run import build
from deepvit.run.resume import with_model_of_init

SHORT = ("train", "schedule.epochs=1", "probe.images=0", "hydra.run.dir=run")
SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=10)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ours.safetensors"
    deepvit.save_model(deepvit.create_model("deepvit16", **SMALL, gelu="tanh", drop_rate=0.3), path)
    return path


def config_of(*words):
    choices = {"model": next((word[6:] for word in words if word.startswith("model=")), "deepvit16")}
    return {**compose(words), "origin": {"overrides": words, "choices": choices}}


def test_a_checkpoint_makes_the_model_and_the_run_goes_on_without_it(run, file):
    assert run(*SHORT, f"init={file}", "model.drop_rate=0.1")[0] == DONE
    made = yaml.safe_load(open("run/config.yaml"))
    for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"):
        assert made["model"][name] == SMALL[name]
    assert made["data"]["img_size"] == 16 and made["model"]["gelu"] == "tanh" and made["model"]["drop_rate"] == 0.1
    assert made["model"]["attention"]["name"] == "reattention" and made["model"]["num_classes"] is None
    file.unlink()
    code, out, _ = run(*SHORT, f"init={file}", "model.drop_rate=0.1")
    assert code == DONE and "is finished" in out
    code, _, sentence = run(*SHORT, f"init={file}", "model.drop_rate=0.1", "model.depth=3")
    assert code == BAD_INPUT and "model.depth was 2 and is now 3" in sentence


def test_what_is_typed_wins_and_all_that_disagrees_is_told_at_once(run, file):
    code, _, sentence = run(*SHORT, f"init={file}", "model.depth=3", "model.mlp_ratio=4", "model.num_heads=4",
                            "model/attention=self")
    assert code == BAD_INPUT
    for told in ("model.depth=2 (now 3)", "model.mlp_ratio=2 (now 4)", "model.num_heads=3 (now 4)",
                 "model/attention=reattention (now self)"):
        assert told in sentence


def test_what_is_typed_and_what_is_the_runs(file):
    made = with_model_of_init(config_of(f"init={file}", "model.gelu=erf", "model.attention.norm_batch=8"))["model"]
    assert made["gelu"] == "erf" and made["attention"]["norm_batch"] == 8 and made["drop_rate"] == 0
    whole = config_of("model=vit16", f"init={file}")
    assert with_model_of_init(whole) == whole  # a model that is named is the model
    assert with_model_of_init(config_of(f"init={file}", "model.img_size=32"))["data"]["img_size"] == 32
    other = build.read_settings(with_model_of_init(config_of(f"init={file}", "data.img_size=32")))
    with pytest.raises(UserError, match="data.img_size=32 is not model.img_size=16"):
        build.check(other, Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("recipe, size", [("digits", 16), ("cifar10", 32), ("finetune_imagenet_384", 384),
                                          ("folder", 16), ("finetune_folder", 16)])
def test_a_recipe_may_enlarge_the_images_that_a_file_was_made_for(file, recipe, size):
    words = (f"recipe={recipe}", f"init={file}")
    config = config_of(*words)
    config["origin"]["choices"]["model"] = {"finetune_imagenet_384": "deepvit_l", "finetune_folder": "vit_b16"}.get(
        recipe, "deepvit16")
    assert with_model_of_init(config)["model"]["img_size"] == size


def test_a_folder_of_the_hub_tells_heads_norm_and_preprocessing(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_heads=4, num_classes=5)
    theirs.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True, model_args={"num_heads": 4})
    made = with_model_of_init(config_of(f"init=local-dir:{tmp_path}"))
    assert made["model"]["num_heads"] == 4 and made["data"]["norm"] == "imagenet"
    assert with_model_of_init(config_of(f"init=local-dir:{tmp_path}", "data.norm=half"))["data"]["norm"] == "half"
    assert with_model_of_init(config_of(f"init=local-dir:{tmp_path}", "model=vit"))["data"]["norm"] == "imagenet"


def test_a_file_that_does_not_tell_its_model(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"tiny has 3.*model\.num_heads=.*deepvit export"):
        with_model_of_init(config_of(f"init={tmp_path}/bare.pth"))
    made = with_model_of_init(config_of(f"init={tmp_path}/bare.pth", "model.num_heads=3"))
    assert made["model"]["embed_dim"] == 192 and made["model"]["attention"]["name"] == "self"


def test_timms_names_tell_what_tensors_do_not():
    from deepvit.importers.timm import named_model
    clip = named_model("vit_base_patch16_clip_224.openai")
    assert clip.blocks[0].norm1.eps == 1e-5 and clip.blocks[0].attn.num_heads == 12
    assert named_model("resnet50") is named_model("hf-hub:a/b") is named_model("vit_nothing_patch16") is None


# What stays as it is

SGD = ("optimizer=sgd", "optimizer.weight_decay=0")
FREEZE = ("model.drop_path_rate=0.5", "model.drop_rate=0.5", "schedule.steps=4", "schedule.epochs=null",
          "schedule.warmup_epochs=null", "schedule.warmup_steps=1")


@pytest.mark.parametrize("freeze, more", [("backbone", ()), ("1", SGD), ("1", ("optimizer.layer_decay=0.7",)),
                                          ("1", ("ema.decay=0.9", "engine.grad_checkpointing=true"))])
def test_what_is_frozen_keeps_every_bit(run, file, freeze, more):
    code, out, _ = run(*SHORT, f"init={file}", *FREEZE, f"freeze={freeze}", "head=reset", *more)
    assert code == DONE and "trained)" in out
    before, saved = deepvit.load_model(file).state_dict(), torch.load("run/checkpoints/last.pt")
    after = saved["model"]
    moves = ("blocks.1.", "norm.", "head.") if freeze == "1" else ("head.",)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert all(name.startswith(moves) for name in changed)
    assert {"head.weight", *(["norm.weight", "blocks.1.mlp.fc1.weight", "blocks.1.attn.norm.running_var"]
                             if freeze == "1" else [])} <= changed
    trained = sum(name.startswith(moves) for name, _ in deepvit.load_model(file).named_parameters())
    assert len(saved["optimizer"]["state"]) == trained
    if "ema" in saved:
        assert all(torch.equal(saved["ema"][name], before[name]) for name in before if not name.startswith(moves))


def test_a_frozen_run_goes_on_with_what_was_frozen(run, file):
    words = (*SHORT, f"init={file}", *FREEZE, "head=reset")
    assert run(*words, "freeze=1")[0] == DONE
    assert run(*words, "freeze=1", "schedule.steps=6")[0] == BAD_INPUT  # finished
    code, _, sentence = run(*words, "freeze=2")
    assert code == BAD_INPUT and "freeze was 1 and is now 2" in sentence


@pytest.mark.parametrize("freeze", ["3", "-1", "head", "1.5", "true"])
def test_wrong_values_are_refused(run, file, freeze):
    code, _, sentence = run(*SHORT, f"init={file}", f"freeze={freeze}")
    assert code == BAD_INPUT and "freeze" in sentence and "backbone" in sentence


def test_freezing_random_weights_is_refused(run):
    code, _, sentence = run(*SHORT, "freeze=backbone")
    assert code == BAD_INPUT and "init=" in sentence
