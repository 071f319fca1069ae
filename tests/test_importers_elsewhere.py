"""Models trained elsewhere come back, and nothing is guessed where the file or the caller tells."""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from oracles import oracle, part
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch.testing import assert_close

import deepvit
from deepvit.analysis.images import read_images, told_preparation
from deepvit.commands.export import export
from deepvit.commands.main import main
from deepvit.config.compose import compose
from deepvit.config.settings import read_evaluation
from deepvit.errors import UserError
from deepvit.importers import open_model, open_weights
from deepvit.importers.ours import described
from deepvit.importers.settings import as_keywords
from deepvit.run import build, evaluate

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 3}
WIDE = SMALL | {"img_size": [8, 32]}  # 2x8 patches


def trained(name: str = "deepvit16", **changes) -> deepvit.ViT:
    """A model that has taken a step, so that no buffer is at its start."""
    torch.manual_seed(0)
    model = deepvit.create_model(name, **SMALL | changes)
    model.train()(torch.randn(4, model.config["in_chans"], *model.img_size))
    return model.eval()


@torch.no_grad()
def assert_same(again, model) -> None:
    x = torch.randn(2, model.config["in_chans"], *model.img_size)
    assert torch.equal(again.eval()(x), model(x))


def prefixed(prefix: str, model) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


# How others save

def timm_checkpoint(model, path):
    arguments = argparse.Namespace(model="deepvit16", gp=None, model_kwargs={
        key: value for key, value in SMALL.items() if key != "num_classes"})
    other = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "deepvit16", "state_dict": model.state_dict(), "optimizer": {}, "version": 2,
                "args": arguments, "state_dict_ema": other, "metric": 12.5}, path)


WRITERS = {  # name -> (write, keywords that load_model needs then)
    "timm's train.py": (timm_checkpoint, {}),
    "arch beside the weights": (lambda m, p: torch.save({"arch": "deepvit16", "state_dict": m.state_dict()}, p), {}),
    "arch, and keywords that are none": (lambda m, p: torch.save(
        {"arch": "deepvit16", "model_args": [1], "state_dict": m.state_dict()}, p), {}),
    "bare, as avg_checkpoints.py": (lambda m, p: torch.save(m.state_dict(), p), {"arch": "deepvit16"}),
    "bare, by settings": (lambda m, p: torch.save(m.state_dict(), p),
                          {"attention": "reattention", "depth": 2, "num_heads": 4}),
    "safetensors": (lambda m, p: save_file(m.state_dict(), p, metadata={"format": "pt"}), {"arch": "deepvit16"}),
    "Lightning, net.": (lambda m, p: torch.save({"state_dict": prefixed("net.", m), "loops": {"fit_loop": {}},
                                                 "hyper_parameters": {"lr": 0.1}}, p), {"arch": "deepvit16"}),
    "Lightning, compiled": (lambda m, p: torch.save({"state_dict": prefixed("model._orig_mod.", m)}, p),
                            {"arch": "deepvit16"}),
    "DDP of a compiled model": (lambda m, p: torch.save(prefixed("module._orig_mod.", m), p), {"arch": "deepvit16"}),
    "model_state_dict": (lambda m, p: torch.save({"model_state_dict": m.state_dict(), "epoch": 1}, p),
                         {"arch": "deepvit16"}),
    "config by hand": (lambda m, p: torch.save({"state_dict": m.state_dict(), "config": m.config}, p), {}),
}


@pytest.mark.parametrize("how", WRITERS)
def test_checkpoints_of_other_trainers(tmp_path, how):
    model, path = trained(), tmp_path / "weights.bin"
    write, keywords = WRITERS[how]
    write(model, path)
    again = deepvit.load_model(path, **keywords)
    assert_same(again, model)
    assert again.load_report.dialect == "ours" and again.config["attention"]["name"] == "reattention"
    fresh = deepvit.create_model("deepvit16", **SMALL)
    deepvit.load_weights(fresh, path)
    assert_same(fresh, model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folders_of_accelerate(tmp_path, name):
    model = trained()
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    assert_same(deepvit.load_model(tmp_path, arch="deepvit16"), model)
    with pytest.raises(UserError, match="arch="):
        deepvit.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({
        "architecture": "deepvit16", "model_args": SMALL, "label_names": ["ant", "bee", "cat"],
        "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 1.0,
                           "interpolation": "nearest"}}))
    again = deepvit.load_model(tmp_path)
    assert_same(again, model)
    assert again.load_report.said["classes"] == ["ant", "bee", "cat"]
    assert told_preparation(again) == {"norm": "imagenet", "crop_pct": 1.0}  # there is no `nearest` here
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        deepvit.load_model(tmp_path)


TIMMS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}


def timm_folder(folder: Path, pretrained_cfg: dict | None = None, **keywords) -> timm.models.VisionTransformer:
    """A ViT of timm's in a folder as on its hub."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**TIMMS | keywords).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "model_args": TIMMS | keywords, "pretrained_cfg": pretrained_cfg}))
    return model


@pytest.mark.parametrize("keywords", [{"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False},
                                      {"global_pool": "token", "fc_norm": True}, {"act_layer": "gelu_tanh"},
                                      {"img_size": [8, 32]}], ids=str)
def test_what_no_tensor_of_timms_tells_is_taken_from_its_keywords(tmp_path, keywords):
    """[8, 32]: as many positions as a square has."""
    x = torch.ones(1, 3, *keywords.get("img_size", (16, 16)))
    assert_close(*(model.eval()(x) for model in (timm_folder(tmp_path, **keywords), deepvit.load_model(tmp_path))),
                 atol=1e-6, rtol=0)


def test_what_timms_keywords_tell_is_compared_with_the_model_that_is_filled(tmp_path):
    model = deepvit.create_model("vit", **SMALL | {"embed_dim": TIMMS["embed_dim"], "depth": TIMMS["depth"],
                                                   "num_heads": TIMMS["num_heads"], "mlp_ratio": 4.0})
    for act_layer, gelu in ("gelu_tanh", "tanh"), ("quick_gelu", "quick_gelu"):
        timm_folder(tmp_path, global_pool="avg", fc_norm=False, act_layer=act_layer)
        assert deepvit.load_weights(model, tmp_path).notes == [
            f"the model has gelu=erf, these weights were made with {gelu}",
            "the model has pool=cls, these weights were made with avg"]


def test_a_pooling_that_no_model_has_here_is_refused(tmp_path):
    timm_folder(tmp_path, global_pool="avgmax")
    with pytest.raises(UserError, match="global_pool=avgmax.* give pool="):
        deepvit.load_model(tmp_path)
    assert deepvit.load_model(tmp_path, pool="avg").pool == "avg"


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_names_of_other_classes_are_left_out(tmp_path, names):
    timm_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "label_names": [*names]}))
    report = deepvit.load_model(tmp_path).load_report
    assert "classes" not in report.said and "left out" in str(report)


def test_a_normalisation_that_no_file_tells_is_said_to_be_a_guess(tmp_path, caplog):
    state = timm.create_model("deit_tiny_patch16_224", depth=1).state_dict()
    for told, words in (({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, 0), ({}, 1)):
        torch.save({"state_dict": state, **told}, tmp_path / "m.pth")
        read_images(deepvit.load_model(tmp_path / "m.pth", num_heads=3), [])
        assert caplog.text.count("m.pth does not say how its images were normalised") == words


def test_images_are_prepared_as_timm_says(tmp_path):
    """By the folder's config, by the arguments of timm's train.py, by the model's name; an export keeps it."""
    timms = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 1, "interpolation": "bilinear"}
    timm_folder(tmp_path, timms)
    told = {"norm": "imagenet", "crop_pct": 1.0, "interpolation": "bilinear"}
    for name, keywords in ("a.safetensors", {}), ("b.timm", {"num_heads": 3}), ("c.deepvit", {"num_heads": 3}):
        done = export(tmp_path, name.partition(".")[2], tmp_path / "out" / name)
        assert told_preparation(deepvit.load_model(done.path, **keywords)) == told
    state = {"arch": "deit_tiny_patch16_224", "state_dict": timm.create_model("deit_tiny_patch16_224").state_dict()}
    for arguments, crop in ({}, 0.9), (timms, 1.0):
        torch.save({**state, "args": argparse.Namespace(model=state["arch"], **arguments)}, tmp_path / "deit.pth.tar")
        found = told_preparation(deepvit.load_model(tmp_path / "deit.pth.tar"))
        assert (found["norm"], found["crop_pct"]) == ("imagenet", crop)
    torch.save({**state, "mean": 0.5, "crop_pct": "all"}, tmp_path / "odd.pth")
    assert told_preparation(deepvit.load_model(tmp_path / "odd.pth"))["norm"] == "imagenet"
    odd = {**timms, "mean": [0.1, 0.2, 0.3]}  # which no data.norm has
    timm_folder(tmp_path, odd)
    done = export(tmp_path, "hub-folder", tmp_path / "out" / "again")
    for folder in tmp_path, done.path:
        told = told_preparation(deepvit.load_model(folder))
        assert "norm" not in told and (told["mean"], told["std"]) == (odd["mean"], odd["std"])
    images = read_images(deepvit.load_model(tmp_path), [])
    mean, std = (torch.tensor(odd[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert_close(images.x, (images.pixels / 255 - mean) / std)


@pytest.mark.parametrize("name, changes", [
    ("deepvit_s", {"embed_dim": 396, "num_heads": 12, "depth": 6}), ("vit16", {}), ("vit", {"pool": "avg"}),
    ("vit", {"attention": "talking_heads"}), ("vit", {"attention": "temperature", "reattention_blocks": [1]}),
    ("vit", {"attention": "attn_scale"}), ("vit", {"attention": "norm_only"}), ("vit", {"feat_scale": True})], ids=str)
def test_a_bare_state_dict_with_its_settings(tmp_path, name, changes):
    """deepvit_s: its scales are told by no tensor."""
    model = trained(name, **changes)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    heads = {"num_heads": model.config["num_heads"]}
    assert_same(deepvit.load_model(tmp_path / "bare.pth", arch=name, **heads | changes), model)


def test_other_heads_than_the_named_models_are_known_by_their_tensors(tmp_path):
    torch.save({"state_dict": trained().state_dict(), "arch": "deepvit16"}, tmp_path / "w.pth")
    assert deepvit.load_model(tmp_path / "w.pth").config["num_heads"] == 4  # deepvit16 has 12
    with pytest.raises(UserError, match="num_heads=6"):
        deepvit.load_model(tmp_path / "w.pth", num_heads=6)


def test_timms_pooling_keyword(tmp_path):
    model = trained(pool="avg")
    arguments = argparse.Namespace(model="deepvit16", gp="avg", model_kwargs=SMALL)
    torch.save({"state_dict": model.state_dict(), "arch": "deepvit16", "args": arguments}, tmp_path / "w.pth")
    assert_same(deepvit.load_model(tmp_path / "w.pth"), model)


@pytest.mark.parametrize("arch, message", [("deepvit61", "Did you mean"), ("resnet50", "arch=resnet50")])
def test_an_unknown_arch(tmp_path, arch, message):
    torch.save(trained().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        deepvit.load_model(tmp_path / "w.pth", arch=arch)


def test_an_arch_where_the_file_tells_all(tmp_path):
    deepvit.save_model(trained(), tmp_path / "m.pt")
    with pytest.raises(UserError, match="leave arch=deepvit16 out"):
        deepvit.load_model(tmp_path / "m.pt", arch="deepvit16")


# save_model

@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_a_saved_model_is_read_back(tmp_path, suffix):
    model, path = trained(pool="avg", map_scale=0.3, stem="conv"), tmp_path / f"model.{suffix}"
    before = os.umask(0o027)
    try:
        deepvit.save_model(model, path, classes=["ant", "bee", "cat"])
    finally:
        os.umask(before)
    again = deepvit.load_model(path)
    assert_same(again, model)
    assert again.config == model.config and again.load_report.said["classes"] == ["ant", "bee", "cat"]
    assert path.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [path]
    deepvit.save_model(again, path)
    assert deepvit.load_model(path).load_report.said["classes"] == ["ant", "bee", "cat"]
    again.reset_classifier(3)  # as many, but nobody knows which
    deepvit.save_model(again, path)
    assert "classes" not in deepvit.load_model(path).load_report.said


def test_a_reset_head_is_in_the_settings(tmp_path):
    model = timm.create_model("deepvit16", **SMALL)
    model.reset_classifier(7, "avg")
    deepvit.save_model(model, tmp_path / "m.safetensors")
    again = deepvit.load_model(tmp_path / "m.safetensors")
    assert again.pool == "avg" and again.num_classes == 7
    assert_same(again, model.eval())


def test_what_cannot_be_saved(tmp_path):
    model = trained()
    for bad, path, named in ((torch.nn.Linear(2, 2), "m.pt", "Linear"), (model, "m.bin", "m.bin"),
                             (model, "no/m.pt", "no/m.pt"), (model, "no/m.safetensors", "no/m.safetensors")):
        with pytest.raises(UserError, match=named):
            deepvit.save_model(bad, tmp_path / path)
    with pytest.raises(UserError, match="2 classes"):
        deepvit.save_model(model, tmp_path / "m.pt", classes=["a", "b"])
    model.head = torch.nn.Linear(24, 9)
    with pytest.raises(UserError, match="head.weight.*reset_classifier"):
        deepvit.save_model(model, tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


# Positions

def columns(model) -> torch.Tensor:
    """The first channel of the positions, `[rows, columns]`."""
    return model.pos_embed[0, 1:, 0].detach().reshape(model.grid_size)


@pytest.mark.parametrize("size", [[16, 16], [8, 64], [32, 8], [8, 32]])
def test_positions_of_a_rectangle_are_resized_as_one(tmp_path, size):
    """2x8 positions that tell their column: as a resized rectangle every row is alike, and rises to the right."""
    wide = deepvit.create_model("vit", **WIDE)
    with torch.no_grad():
        wide.pos_embed[:, 1:] = torch.arange(8.0).repeat(2)[None, :, None]
    deepvit.save_model(wide, tmp_path / "wide.pt")
    other = deepvit.create_model("vit", **SMALL | {"img_size": size})
    deepvit.load_weights(other, tmp_path / "wide.pt")
    for model in (other, deepvit.load_model(tmp_path / "wide.pt", img_size=size)):
        found = columns(model)
        assert_close(found, found[:1].expand_as(found), atol=1e-4, rtol=0)
        assert (found[0].diff() > 0).all()


def test_positions_that_may_be_two_grids(tmp_path):
    """16 positions without a size: a square's 4x4, or the 2x8 that is asked for."""
    wide = trained("vit", **WIDE)
    torch.save(wide.state_dict(), tmp_path / "bare.pth")
    for load in (lambda **how: deepvit.load_model(tmp_path / "bare.pth", num_heads=4, img_size=[8, 32], **how),
                 lambda **how: deepvit.load_weights(wide, tmp_path / "bare.pth", **how)):
        with pytest.raises(UserError, match="4x4 or 2x8.*grid_size"):
            load()
        load(grid_size=[2, 8])
        with pytest.raises(UserError, match="grid_size"):
            load(grid_size=[2, 7])
    again = deepvit.load_model(tmp_path / "bare.pth", num_heads=4, img_size=[8, 32], grid_size=(2, 8))
    assert_same(again, wide)
    square = deepvit.load_model(tmp_path / "bare.pth", num_heads=4, img_size=[8, 32], grid_size=(4, 4))
    assert "4x4 -> 2x8" in str(square.load_report)
    assert deepvit.load_model(tmp_path / "bare.pth", num_heads=4).grid_size == (4, 4)


def test_positions_of_any_count_with_their_grid(tmp_path):
    model = trained("vit", img_size=[8, 20])  # 2x5
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="grid_size"):
        deepvit.load_model(tmp_path / "bare.pth", num_heads=4, img_size=16)
    assert "2x5 -> 4x4" in str(deepvit.load_model(tmp_path / "bare.pth", num_heads=4, img_size=16,
                                                  grid_size=[2, 5]).load_report)


def test_google_s_positions_are_a_square(tmp_path):
    path = tmp_path / "vit.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in part(oracle("other/vit_plain")[0], "file").items()})
    assert "4x4 -> 2x8" in str(deepvit.load_model(path, img_size=[16, 64]).load_report)


# Channels of flattened patches

def flattened(tmp_path, channels: int, side: int):
    """A vit-pytorch file for patches of `side` pixels and any channels, 4x4 of them."""
    state = dict(part(oracle("other/deepvit_lucidrains_legacy")[0], "file"))
    width = state["pos_embedding"].shape[-1]
    state["to_patch_embedding.1.weight"] = torch.randn(width, side * side * channels)
    torch.save(state, tmp_path / "vit_pytorch.pt")
    return tmp_path / "vit_pytorch.pt"


@pytest.mark.parametrize("channels, side", [(1, 8), (3, 8), (4, 8), (12, 4), (2, 8), (5, 3), (12, 8)])
@pytest.mark.parametrize("how", ["img_size", "in_chans", "patch_size"])
def test_channels_are_what_is_given(tmp_path, channels, side, how):
    given = {"img_size": 4 * side, "in_chans": channels, "patch_size": side}[how]
    model = deepvit.load_model(flattened(tmp_path, channels, side), **{how: given})
    assert (model.config["in_chans"], model.patch_size) == (channels, (side, side))
    x = torch.randn(1, channels, 4 * side, 4 * side)
    patches = x.unfold(2, side, side).unfold(3, side, side)  # [1, C, 4, 4, rows, columns]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(1, 16, -1)  # each as (row, column, channel)
    state = torch.load(tmp_path / "vit_pytorch.pt", weights_only=True)
    expected = patches @ state["to_patch_embedding.1.weight"].t() + state["to_patch_embedding.1.bias"]
    assert_close(model.patch_embed(x), expected, atol=1e-4, rtol=1e-4)


def test_channels_that_nothing_tells(tmp_path):
    colour = deepvit.load_model(flattened(tmp_path, 3, 8))
    assert colour.config["in_chans"] == 3 and "in_chans=12" in str(colour.load_report)
    assert "in_chans" not in str(deepvit.load_model(flattened(tmp_path, 3, 8), img_size=32).load_report)
    assert deepvit.load_model(flattened(tmp_path, 3, 7)).config["in_chans"] == 3
    assert deepvit.load_model(flattened(tmp_path, 1, 7)).config["in_chans"] == 1
    with pytest.raises(UserError, match="in_chans=4 .*in_chans=1 |in_chans=1 .*in_chans=4 "):
        deepvit.load_model(flattened(tmp_path, 4, 8))
    with pytest.raises(UserError, match="in_chans"):
        deepvit.load_model(flattened(tmp_path, 5, 3))


# Heads

def test_heads_of_our_names_and_hints_of_both(tmp_path):
    model = trained("vit16", embed_dim=384, num_heads=12)
    torch.save({"arch": "vit16", "state_dict": model.state_dict()}, tmp_path / "named.pth")
    assert_same(deepvit.load_model(tmp_path / "named.pth"), model)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="num_heads=.* arch=.*small has 6.*vit16 has 12"):
        deepvit.load_model(tmp_path / "bare.pth")
    assert_same(deepvit.load_model(tmp_path / "bare.pth", arch="vit16"), model)
    with pytest.raises(UserError, match="12 heads, the model 6"):
        deepvit.load_weights(deepvit.create_model("vit", **SMALL | {"embed_dim": 384, "num_heads": 6}),
                             tmp_path / "named.pth")


def test_timms_names_by_hand(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    torch.save(theirs.state_dict(), tmp_path / "tiny.pth")
    model = deepvit.load_model(tmp_path / "tiny.pth", arch="vit_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 32, 32)
    assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


# Which weights, which classes, which settings

def test_which_weights_are_taken(tmp_path):
    model = trained()
    timm_checkpoint(model, tmp_path / "w.pth")
    deepvit.save_model(model, tmp_path / "raw.pt")
    assert [open_weights(tmp_path / name, ema=None).is_average for name in ("w.pth", "raw.pt")] == [True, False]
    content = torch.load(tmp_path / "raw.pt")
    torch.save(content | {"ema": {**content["model"], "decay": 0.9}}, tmp_path / "odd.pt")
    assert open_weights(tmp_path / "odd.pt").shapes
    for name, weights, sentence in (("none", "auto", "none"), ("raw.pt", "ema", "weights=raw"),
                                    ("odd.pt", "auto", "holds a float at 'decay'"),
                                    ("w.pth", "mean", "auto, ema, raw")):
        with pytest.raises(UserError, match=sentence):
            open_model(tmp_path / name, weights)
    assert open_model(tmp_path / "w.pth", "raw").load_report.weights == "raw"
    assert "averaged (EMA) weights" in str(deepvit.load_model(tmp_path / "w.pth", ema=True).load_report)
    assert "raw weights" in str(deepvit.load_model(tmp_path / "w.pth").load_report)


def test_a_kept_head_goes_by_the_names_of_its_classes(tmp_path):
    model = trained()
    deepvit.save_model(model, tmp_path / "m.pt", classes=["ant", "bee", "cat"])
    other = deepvit.create_model("deepvit16", **SMALL)
    report = deepvit.load_weights(other, tmp_path / "m.pt", classes=["cat", "ant", "bee"])
    assert torch.equal(other.head.weight, model.head.weight[[2, 0, 1]]) and "order" in str(report)
    assert torch.equal(other.head.bias, model.head.bias[[2, 0, 1]])
    before = other.norm.weight.clone()
    for strange in ("cow", 7):
        with pytest.raises(UserError, match=f"'ant'.*{strange!r}.*head=reset"):
            deepvit.load_weights(other, tmp_path / "m.pt", classes=["bee", "cat", strange])
    for wrong in ({"head": "new"}, {"head": ["keep"]}, {"dialect": "timn"}, {"dialect": ""}):
        with pytest.raises(UserError, match="=.*choose from"):
            deepvit.load_weights(other, tmp_path / "m.pt", **wrong)
    assert torch.equal(other.norm.weight, before)
    deepvit.load_weights(other, tmp_path / "m.pt", classes=["bee", "cat", "cow"], head="reset")


def test_a_model_that_is_filled_is_saved_with_what_its_new_file_tells(tmp_path):
    """Not with the classes and the normalisation of the file that it was built from."""
    for name, classes, mean in (("one.pt", ["ant", "bee", "cat"], 0.5), ("other.pt", ["dog", "elk", "fox"], 0.25)):
        content = described(trained("vit"), classes)
        torch.save(content | {"class_names": [*map(str.upper, classes)], "mean": [mean] * 3, "std": [mean] * 3},
                   tmp_path / name)
    model, order = deepvit.load_model(tmp_path / "one.pt"), ["fox", "dog", "elk"]
    for how, classes in ({}, ["dog", "elk", "fox"]), ({"classes": order}, order), ({"head": "reset"}, None):
        deepvit.load_weights(model, tmp_path / "other.pt", **how)
        deepvit.save_model(model, tmp_path / "again.pt")
        said = deepvit.load_model(tmp_path / "again.pt").load_report.said
        assert (said.get("classes"), said["mean"]) == (classes, [0.25] * 3)
        assert said.get("class_names") in ([*map(str.upper, classes or [])], None)


def test_a_run_starts_from_the_average_and_from_its_own_classes(tmp_path):
    """As evaluation, which chose the checkpoint; a kept head of other classes is refused before training."""
    model = trained("vit")
    torch.save({"format": "deepvit", "version": 1, "model": model.state_dict(), "config": model.config,
                "ema": {name: tensor * 0.5 for name, tensor in model.state_dict().items()},
                "classes": ["ant", "bee", "cat"]}, tmp_path / "best.pt")
    sizes = [f"model.{key}={value}" for key, value in SMALL.items() if key != "num_classes"]
    settings = build.read_settings(compose(["model=vit", *sizes, f"init={tmp_path}/best.pt"]))
    assert torch.equal(build.model(settings, 3).head.weight, model.head.weight * 0.5)
    with pytest.raises(UserError, match="head=reset"):
        build.model(settings, 3, classes=["ant", "bee", "cow"])


@pytest.mark.parametrize("keywords", [{"depth": 10**9}, {"embed_dim": "wide"}, {"surprise": 1}, {"attention": [1]},
                                      {"global_pool": [1]}, {3: 4}])
def test_forged_keywords_of_timm(tmp_path, keywords):
    arguments = argparse.Namespace(model_kwargs=SMALL | keywords)
    torch.save({"state_dict": trained().state_dict(), "arch": "deepvit16", "args": arguments}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth") as refusal:
        deepvit.load_model(tmp_path / "w.pth")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("theirs, ours, note", [
    ({"block": "deepnorm"}, {}, "block=pre_norm.* deepnorm"), ({"qk_scale": 3.0}, {}, "qk_scale=None.* 3.0"),
    ({}, {"attention": "contrast"}, "attention.gain=316.2.* 1.0"),
    ({"attention": "temperature_decay"}, {}, "attention.class=SelfAttention.* DecayedTemperature"),
    ({"patch_size": 8, "stem": {"name": "hybrid", "layers": [1, 1], "width": 32, "arithmetic": "vit_pytorch"}},
     {"patch_size": 8, "stem": {"name": "hybrid", "layers": [1, 1], "width": 32}},
     "stem.arithmetic=google.* vit_pytorch"),
    ({"attention": "reattention"}, {"attention": "reattention_identity"}, None),
    ({}, {"attention": "attention_dropout"}, None), ({}, {"attention": None}, None),
    ({"attention": "contrast"}, {"attention": None}, "attention.gain=1.0.* 316.2.*"),
    ({"final_norm": "after_pool"}, {}, None)], ids=str)
def test_weights_of_other_arithmetic_are_said_to_be(tmp_path, theirs, ours, note):
    """The shapes are the same, and the logits are not."""
    deepvit.save_model(deepvit.create_model("vit", **SMALL | theirs), tmp_path / "m.pt")
    notes = deepvit.load_weights(deepvit.create_model("vit", **SMALL | ours), tmp_path / "m.pt").notes
    assert any(re.search(f"has {note}$", one) for one in notes) if note else not notes


def test_every_setting_that_disagrees_is_named_at_once(tmp_path):
    deepvit.save_model(trained(), tmp_path / "m.pt")
    other = deepvit.create_model("vit", **SMALL | {"depth": 3, "mlp_ratio": 4.0})
    with pytest.raises(UserError) as refusal:
        deepvit.load_weights(other, tmp_path / "m.pt")
    for told in ("model.depth=2 (now 3)", "model.mlp_ratio=3 (now 4)", "model/attention=reattention (now self)"):
        assert told in str(refusal.value)
    with pytest.raises(UserError, match="depth=3, embed_dim=8 is asked for"):
        deepvit.load_model(tmp_path / "m.pt", depth=3, embed_dim=8)


# What a command line gives

@pytest.mark.parametrize("words, message", [
    (["weights=raw"], "weights is not a setting"), (["dpeth=2"], "Did you mean 'depth'"), (["num_heads"], "KEY=VALUE"),
    (["img_size=[1"], "KEY=VALUE"), (["img_size=[16]"], "img_size"), (["img_size=-4"], "img_size"),
    (["grid_size=4"], "grid_size"), (["arch=7"], "arch=7"), (["num_heads=0"], "num_heads"), (["depth=many"], "depth")])
def test_settings_typed_wrong(tmp_path, words, message):
    torch.save({"state_dict": trained().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        deepvit.load_model(tmp_path / "w.pth", **{"attention": "reattention", **as_keywords(words)})


def test_commands_take_the_same_settings(tmp_path, capsys):
    """Weights that tell nothing: export, predict and evaluation build the model from what is typed."""
    model, path = trained(), tmp_path / "bare.pth"
    torch.save(model.state_dict(), path)
    assert main(["export", str(path), "--to", "safetensors", "arch=deepvit16"]) == 0
    assert_same(deepvit.load_model(tmp_path / "bare.safetensors"), model)
    image = Path(load_sample_images().filenames[0])
    assert main(["predict", str(path), str(image), "arch=deepvit16", "--top", "2"]) == 0
    assert "%  class " in capsys.readouterr().out
    assert main(["predict", str(path), str(image)]) == 2
    assert "arch=" in capsys.readouterr().err
    asked = read_evaluation(compose(["model.arch=deepvit16"], "eval"))
    assert_same(evaluate.load(path, asked), model)
    with pytest.raises(UserError, match="ema is not a setting"):
        evaluate.load(path, replace(asked, model={"ema": True}))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_whose_name_is_not_utf8(tmp_path, suffix):
    model, path = trained(), tmp_path / f"M\udcf6we{suffix}"
    deepvit.save_model(model, path)
    assert_same(deepvit.load_model(path), model)
