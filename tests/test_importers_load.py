"""Loading by name: strictness, heads, image sizes, timm's and our own files, and what is said about it all."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from oracles import DATA, oracle, part
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import deepvit
from deepvit.errors import UserError

FULL = DATA / "official/ckpt_full.pth.tar"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 3}


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(FULL, weights_only=True)["state_dict"]


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "vit.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in part(oracle("other/vit_plain")[0], "file").items()})
    return path


def save(path, content):
    torch.save(content, path)
    return path


# Every form of the published checkpoints

@pytest.mark.parametrize("form", ["checkpoint", "module prefix", "bare", "module prefix, bare", "before torch 1.6",
                                  "no batch counts", "half precision"])
def test_published_forms(tmp_path, published, form):
    content = {
        "checkpoint": lambda: {"state_dict": published, "epoch": 3},
        "module prefix": lambda: {"state_dict": {f"module.{name}": tensor for name, tensor in published.items()}},
        "bare": lambda: published,
        "module prefix, bare": lambda: {f"module.{name}": tensor for name, tensor in published.items()},
        "before torch 1.6": lambda: published,
        "no batch counts": lambda: {k: v for k, v in published.items() if not k.endswith("num_batches_tracked")},
        "half precision": lambda: {k: v.half() if v.is_floating_point() else v for k, v in published.items()},
    }[form]()
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=form != "before torch 1.6")
    expected = oracle("official/ckpt_expected")[0]
    with torch.no_grad():
        logits = deepvit.load_model(path).eval()(expected["input"])
    assert_close(logits, expected["logits"], atol=0.05 if form == "half precision" else 1e-5, rtol=0)


@torch.no_grad()
def test_published_saver_raw_and_averaged():
    expected = oracle("official/ckpt_expected")[0]
    assert_close(deepvit.load_model(FULL).eval()(expected["input"]), expected["logits"], atol=1e-5, rtol=0)
    averaged = deepvit.load_model(FULL, ema=True)
    assert_close(averaged.eval()(expected["input"]), expected["logits_ema"], atol=1e-5, rtol=0)
    assert "32" in str(averaged.load_report) and "depth 3" in str(averaged.load_report)  # its arch disagrees
    assert averaged.load_report.said["metric"] == 80.9


def test_loading_draws_no_random_numbers():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    deepvit.load_model(FULL)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_averaged_weights(tmp_path, published):
    with pytest.raises(UserError, match="no EMA"):
        deepvit.load_model(save(tmp_path / "bare.pth", published), ema=True)
    with pytest.raises(UserError, match="ema=True"):
        deepvit.load_model(save(tmp_path / "ema.pth", {"state_dict_ema": published}))


def test_what_a_conv_stem_does_not_tell_is_asked_for(tmp_path):
    tensors = part(oracle("official/reattn_cnn_S")[0], "state")
    path = save(tmp_path / "s.pth", tensors)
    with pytest.raises(UserError, match="residual_scale and map_scale"):
        deepvit.load_model(path)
    arch = deepvit.load_model(save(tmp_path / "arch.pth", {"state_dict": tensors, "arch": "deepvit_S"}))
    assert arch.config["residual_scale"] == 0.5 and arch.config["map_scale"] == pytest.approx(12**-0.5)


def test_a_plain_vit_of_that_code_is_known_by_its_arch(tmp_path):
    """Without re-attention its names are timm's; the number of heads is the published model's."""
    model = deepvit.create_model("vit16", depth=1, embed_dim=48)
    path = save(tmp_path / "plain.pth", {"state_dict": model.state_dict(), "arch": "deepvit_patch16_224_re_attn_16b"})
    again = deepvit.load_model(path)
    assert again.load_report.dialect == "deepvit" and again.config["num_heads"] == 12


def test_another_number_of_heads_is_refused(npz):
    model = deepvit.create_model("vit", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=6, num_classes=11,
                                 mlp_ratio=2.0)
    with pytest.raises(UserError, match="4 heads, the model 6"):
        deepvit.load_weights(model, npz)


def test_a_model_of_others_is_refused(npz):
    with pytest.raises(UserError, match="fills models of deepvit.create_model, not a Linear"):
        deepvit.load_weights(nn.Linear(2, 2), npz)


# Heads

def test_other_head_is_refused_with_both_counts(npz):
    model = deepvit.load_model(npz, head="reset", num_classes=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="11 classes.*5"):
        deepvit.load_weights(model, npz)
    with pytest.raises(UserError, match="11 classes.*7"):
        deepvit.load_model(npz, num_classes=7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_head_reset_and_zero(npz):
    model = deepvit.load_model(npz, head="reset", num_classes=5)
    assert model.head.weight.std() > 0.005 and not model.head.bias.any()
    assert model.load_report.fresh == ["head.weight", "head.bias"]
    wide = deepvit.load_model(npz, head="reset", num_classes=50, init_std=0.5)
    assert 0.4 < wide.head.weight.std() < 0.6
    wide.reset_classifier(40)
    assert 0.4 < wide.head.weight.std() < 0.6
    report = deepvit.load_weights(model, npz, head="zero")
    assert not model.head.weight.any() and model.blocks[0].attn.qkv.weight.any()
    assert "head/kernel" in report.dropped and "head=zero" in str(report)
    same = deepvit.load_model(npz, head="reset")
    assert same.num_classes == 11 and not torch.equal(same.head.weight, deepvit.load_model(npz).head.weight)


def test_new_head_leaves_pre_logits_out(tmp_path):
    path = tmp_path / "21k.npz"
    np.savez(path, **{k: v.numpy() for k, v in part(oracle("other/vit_prelogits")[0], "file").items()})
    model = deepvit.create_model("vit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=11,
                                 mlp_ratio=3.0)
    with pytest.raises(UserError, match="pre_logits"):
        deepvit.load_weights(model, path)
    report = deepvit.load_weights(model, path, head="zero")
    assert "pre_logits/kernel" in report.dropped and "gelu=erf" in str(report)
    assert "pre_logits/kernel" in deepvit.load_weights(model, path, dialect="vit_pytorch").dropped


# AnyImage sizes

def test_positions_are_resized_as_timm_does(tmp_path):
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)
    with torch.no_grad():
        theirs.pos_embed.normal_()
    larger = timm.models.vision_transformer.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)
    state = timm.models.vision_transformer.checkpoint_filter_fn(dict(theirs.state_dict()), larger)
    larger.load_state_dict(state)
    model = deepvit.load_model(save(tmp_path / "timm.pth", theirs.state_dict()), num_heads=4, img_size=48).eval()
    assert "4x4 -> 6x6" in str(model.load_report)
    x = torch.randn(2, 3, 48, 48)
    assert_close(model(x), larger.eval()(x), atol=1e-5, rtol=0)


def test_an_image_that_is_not_square(tmp_path):
    model = deepvit.create_model("vit", **SMALL | {"img_size": [8, 20]})
    path = save(tmp_path / "wide.pth", model.state_dict())
    with pytest.raises(UserError, match="no square"):
        deepvit.load_model(path, num_heads=4)
    again = deepvit.load_model(path, num_heads=4, img_size=(8, 20)).eval()
    x = torch.randn(2, 3, 8, 20)
    assert torch.equal(again(x), model.eval()(x))


def test_flax_and_vit_pytorch_take_the_first_rows_and_have_none_beyond():
    path = DATA / "other/deepvit_flax_cls.msgpack"
    with pytest.raises(UserError, match="smaller img_size"):
        deepvit.load_model(path, img_size=40)
    smaller, native = deepvit.load_model(path, img_size=24), deepvit.load_model(path)
    assert torch.equal(smaller.pos_embed, native.pos_embed[:, :10])


# timm

@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg"}, {"init_values": 0.1}, {"qkv_bias": False}],
                         ids=["class token", "average pool", "LayerScale", "no qkv bias"])
def test_timm_models(tmp_path, settings):
    torch.manual_seed(2)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=6, num_classes=5, **settings).eval()
    path = tmp_path / "timm.safetensors"
    save_file(theirs.state_dict(), path)
    model = deepvit.load_model(path, num_heads=6).eval()
    assert model.load_report.dialect == "timm"
    x = torch.randn(2, 3, 16, 16)
    assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


def test_a_parameter_by_two_names_is_refused(tmp_path):
    theirs = timm.models.vision_transformer.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=1,
                                                              num_heads=6, num_classes=5)
    state = theirs.state_dict()
    path = save(tmp_path / "both.pth", {**state, "fc_norm.weight": state["norm.weight"]})
    with pytest.raises(UserError, match="fc_norm.weight"):
        deepvit.load_model(path, num_heads=6)


def test_timm_heads_by_arch_or_keyword(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with pytest.raises(UserError, match="num_heads"):
        deepvit.load_model(save(tmp_path / "a.pth", theirs.state_dict()))
    with pytest.raises(UserError, match="num_heads"):
        deepvit.load_model(tmp_path / "a.pth", num_heads="many")
    model = deepvit.load_model(save(tmp_path / "b.pth", {"state_dict": theirs.state_dict(),
                                                         "arch": "vit_tiny_patch16_224"})).eval()
    x = torch.randn(1, 3, 32, 32)
    assert_close(model(x), theirs.eval()(x), atol=1e-5, rtol=0)


def test_a_timm_model_of_another_kind_is_named(tmp_path):
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=6, qk_norm=True)
    with pytest.raises(UserError, match="q_norm"):
        deepvit.load_model(save(tmp_path / "a.pth", theirs.state_dict()), num_heads=6)


# Our own

@pytest.mark.parametrize("settings", [
    *({"attention": name, "reattention_blocks": [1], "init_values": 0.1} for name in deepvit.models.list_attentions()),
    {"block": "deepnorm"}, {"feat_scale": True}, {"patch_norm": True, "representation_size": 5},
    {"stem": {"name": "hybrid", "layers": [1, 2], "width": 32}, "img_size": 32, "patch_size": 16}], ids=str)
def test_our_checkpoints_and_their_safetensors(tmp_path, settings):
    torch.manual_seed(0)
    model = deepvit.create_model("vit", **SMALL | settings)
    model.train()(torch.randn(3, 3, *model.img_size))
    said = {"format": "deepvit", "version": 1, "config": model.config, "classes": ["a", "b", "c"]}
    path = save(tmp_path / "best.pt", {**said, "model": model.state_dict(), "step": 5,
                                       "ema": {k: v * 2 for k, v in model.state_dict().items()}})
    save_file(model.state_dict(), tmp_path / "best.safetensors", metadata={"deepvit": json.dumps(said)})
    x = torch.randn(2, 3, *model.img_size)
    with torch.no_grad():
        for file in (path, tmp_path / "best.safetensors"):
            again = deepvit.load_model(file).eval()
            assert again.load_report.dialect == "ours" and again.load_report.said["classes"] == ["a", "b", "c"]
            assert torch.equal(again(x), model.eval()(x))
    assert torch.equal(deepvit.load_model(path, ema=True).head.weight, model.head.weight * 2)


def test_our_bare_state_dict_goes_into_a_model_one_has(tmp_path):
    model, other = (deepvit.create_model("vit", **SMALL, attention="reattention") for _ in range(2))
    path = save(tmp_path / "bare.pth", model.state_dict())
    assert deepvit.load_weights(other, path).dialect == "ours"
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="load_weights"):
        deepvit.load_model(path)


@pytest.mark.parametrize("change, message", [
    ({"config": {"depth": 9000}}, "depth.* torn or forged"),
    ({"config": {"embed_dim": 65536}}, "embed_dim.* torn or forged"),
    ({"config": {"num_heads": 10**9}}, "num_heads|heads"), ({"config": {"surprise": 1}}, "surprise"),
    ({"config": {"attention": {"class": "os.system"}}}, "attention"), ({"config": None}, "config"),
    ({"version": 2}, "version"), ({"config": {"mlp_ratio": float("nan")}}, "settings"),
    ({"config": {"img_size": 10**9}}, "img_size|positions|settings"), ({"config": {"patch_size": 0}}, "[Pp]atch")])
def test_forged_settings_are_refused(tmp_path, change, message):
    model = deepvit.create_model("vit", **SMALL)
    content = {"format": "deepvit", "version": 1, "config": model.config, "model": model.state_dict()}
    if change.get("config"):
        change = {"config": {**model.config, **change["config"]}}
    with pytest.raises(UserError, match=message):
        deepvit.load_model(save(tmp_path / "forged.pt", content | change))


# Strictness

@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("blocks.1.norm2.bias"), r"lacks 'blocks.1.norm2.bias'"),
    (lambda s: s.pop("blocks.1.attn.reatten_matrix.weight"), r"blocks.1.attn.reatten_matrix.weight|mix"),
    (lambda s: s.update({"extra.weight": torch.zeros(1)}), "'extra.weight'"),
    (lambda s: s.update({"blocks.1.norm1.weight": torch.zeros(5)}), "blocks.1.norm1.weight"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1.")], "lacks block 1"),
    (lambda s: s.update({"blocks.99999.norm1.weight": torch.zeros(24)}), "lacks block 3"),
    (lambda s: s.update({"blocks.0.norm1.weight": s["blocks.0.norm1.weight"] * float("nan")}), "NaN"),
    (lambda s: s.update({"norm.weight": s["norm.weight"].int()}), "int32"),
    (lambda s: s.update({"norm.weight": s["norm.weight"].to(torch.complex64)}), "complex"),
    (lambda s: s.update({"norm.weight": s["norm.weight"].to_sparse()}), "sparse"),
    (lambda s: s.update({"norm.weight": torch.zeros(1).expand(10**12)}), "more than the file holds"),
    (lambda s: s.update({"norm.weight": torch.zeros(24, device="meta")}), "norm.weight"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 17, 5)}), "position"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 0, 24)}), "position"),
    (lambda s: s.update({"cls_token": torch.zeros(())}), "shapes|cls_token"),
])
def test_what_does_not_fit_is_named(tmp_path, published, change, message):
    change(published)
    path = save(tmp_path / "changed.pth", published)
    with pytest.raises(UserError, match=message) as refusal:
        deepvit.load_model(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("keywords, message", [
    ({"depth": 5}, "depth=5"), ({"num_heads": 6}, "num_heads=6"), ({"patch_size": 4}, "patch_size=4"),
    ({"img_size": 20}, "img_size"), ({"dpeth": 3}, "dpeth"), ({"embed_dim": "wide"}, "embed_dim"),
    ({"dialect": "deepvitt"}, "Did you mean 'deepvit'"), ({"dialect": "google"}, "no place"),
    ({"attention": "self"}, "mix|reatten"), ({"head": "fresh"}, "head"), ({"qk_scale": "big"}, "qk_scale")])
def test_keywords_that_contradict_the_file(keywords, message):
    with pytest.raises(UserError, match=message):
        deepvit.load_model(FULL, **keywords)


def test_weights_into_another_model_are_refused_before_any_is_changed(npz):
    model = deepvit.create_model("vit", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=11,
                                 mlp_ratio=3.0)  # the file's is 2.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="MlpBlock_3/Dense_0"):
        deepvit.load_weights(model, npz)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_that_a_file_tells_are_not_others(tmp_path, npz):
    """No tensor of plain attention shows them in our layout: the model would be another one without a word."""
    for dialect in ("google", "vit_pytorch"):  # [D, H, d]
        with pytest.raises(UserError, match="num_heads=6 is asked for, but .*vit.npz says 4"):
            deepvit.load_model(npz, dialect=dialect, num_heads=6)
        with pytest.raises(UserError, match="num_heads=6 is asked for, but .*vit.npz says 4"):
            deepvit.load_model(npz, dialect=dialect, attention={"class": "SelfAttention", "num_heads": 6})
    plain = deepvit.create_model("vit", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=3)
    deepvit.save_model(plain, tmp_path / "plain.pt")
    with pytest.raises(UserError, match="num_heads=3 is asked for, but .*plain.pt says 2"):
        deepvit.load_model(tmp_path / "plain.pt", num_heads=3)
    with pytest.raises(UserError, match="num_heads=3 is asked for, but .*plain.pt says 2"):
        deepvit.load_model(tmp_path / "plain.pt", attention={"class": "SelfAttention", "num_heads": 3})
    assert deepvit.load_model(tmp_path / "plain.pt", num_heads=2).config["num_heads"] == 2
    own = deepvit.create_model("vit", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=3,
                               attention={"class": "SelfAttention", "num_heads": 6}, reattention_blocks=[1])
    deepvit.save_model(own, tmp_path / "own.pt")
    assert deepvit.load_model(tmp_path / "own.pt", **own.config).config == own.config
