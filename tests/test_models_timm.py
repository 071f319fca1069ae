"""What timm, and what is built on it, asks of a model: timm's own ViT with the same weights is the oracle."""

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import group_parameters, save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import deepvit
from deepvit.errors import UserError
from deepvit.models import build_model
from deepvit.models.registry import count_flops
from deepvit.ops import reattention, reference

SMALL = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4, "num_classes": 5}
STEMS = {"patch": "patch", "conv": "conv", "hybrid": {"name": "hybrid", "layers": [1, 1], "width": 32}}
X = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))


def ours(stem="patch", name="deepvit16", **settings):
    return timm.create_model(name, stem=STEMS[stem], **SMALL | settings).eval()


@pytest.fixture
def twins():
    """Our plain ViT and timm's, with the same weights; `settings` are timm's."""
    def make(**settings):
        theirs = VisionTransformer(**SMALL, mlp_ratio=3, **settings).eval()
        model = ours(name="vit", **{key: settings[key] for key in settings if key == "global_pool"})
        model.load_state_dict(theirs.state_dict())
        return model, theirs
    return make


@pytest.mark.parametrize("name", deepvit.list_models())
def test_registered_metadata(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = timm.get_pretrained_cfg(name)
    assert name in timm.list_models(name_matches_cfg=True) and cfg.architecture == name
    assert model.default_cfg == model.pretrained_cfg == cfg.to_dict()
    assert model.get_submodule(cfg.first_conv).in_channels == cfg.input_size[0] == model.in_chans == 3
    assert model.get_submodule(cfg.classifier) is model.get_classifier() and cfg.num_classes == 1000
    config = deepvit.models.model_config(name)
    side, patch = config["img_size"], config["patch_size"]
    assert cfg.input_size[1:] == (side, side) == resolve_data_config(model=model)["input_size"][1:]
    assert model.patch_embed.grid_size == (side // patch, side // patch) and model.patch_embed.feat_ratio() == patch
    assert model.patch_embed.num_patches + model.num_prefix_tokens == model.pos_embed.shape[1]
    assert model.num_features == model.head_hidden_size == config["embed_dim"]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [
        (config["embed_dim"], patch)] * config["depth"]


@pytest.mark.parametrize("arguments", [
    {}, {"indices": 2}, {"indices": [0, -1], "output_fmt": "NLC"}, {"norm": True, "return_prefix_tokens": True},
    {"indices": [1], "stop_early": True}, {"output_dict": True, "return_prefix_tokens": True, "norm": True},
    {"output_dict": True, "intermediates_only": True}, {"intermediates_only": True, "indices": [-2, 3]}], ids=str)
def test_intermediates_are_timms(twins, arguments):
    model, theirs = twins()
    assert_close(model.forward_intermediates(X, **arguments), theirs.forward_intermediates(X, **arguments))


def test_features_are_timms(twins):
    model, theirs = twins()
    for arguments in ({}, {"n": [0, 2], "reshape": True}, {"n": 3, "return_prefix_tokens": True, "norm": True}):
        assert_close(model.get_intermediate_layers(X, **arguments), theirs.get_intermediate_layers(X, **arguments))
    assert group_parameters(model, model.group_matcher()) == group_parameters(theirs, theirs.group_matcher())
    assert model.no_weight_decay() == theirs.no_weight_decay() & {name for name, _ in model.named_parameters()}
    for twin in (model, theirs):
        assert twin.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert_close(model(X), theirs(X))  # tokens, without norm or head


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_pooling_is_timms(twins, pool):
    model, theirs = twins(global_pool=pool, fc_norm=False)
    assert model.global_pool == pool
    assert_close(model(X), theirs(X))
    assert_close(model.forward_head(model.forward_features(X), pre_logits=True),
                 theirs.forward_head(theirs.forward_features(X), pre_logits=True))
    for twin in (model, theirs):
        twin.reset_classifier(0, "")
    assert_close(model(X), theirs(X))
    assert model(X).shape == (2, 9, 24) and model.num_classes == 0


@pytest.mark.parametrize("sizes", [{"img_size": (32, 16)}, {"img_size": (24, 32)}, {"patch_size": (4, 8)},
                                   {"img_size": (12, 36), "patch_size": (6, 12)}], ids=str)
def test_resizing_is_timms(twins, sizes):
    model, theirs = twins()
    for twin in (model, theirs):
        twin.set_input_size(**sizes)
    x = torch.randn(2, 3, *model.img_size)
    assert_close(model(x), theirs(x))
    assert model.patch_embed.grid_size == theirs.patch_embed.grid_size and model.img_size == theirs.patch_embed.img_size


@pytest.mark.parametrize("stem", STEMS)
def test_features_of_every_stem(stem):
    torch.manual_seed(1)
    model = ours(stem)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out))
    last, features = model.forward_intermediates(X)
    rows, columns = model.patch_embed.grid_size
    for tokens, feature in zip(seen, features, strict=True):
        for row in range(rows):
            for column in range(columns):
                assert torch.equal(feature[:, :, row, column], tokens[:, 1 + row * columns + column])
    assert torch.equal(last, model.forward_features(X))
    model.set_grad_checkpointing()
    assert_close(model.forward_intermediates(X, norm=True)[1][-1].flatten(2).mT, last[:, 1:])
    getter = ours(stem, features_only=True, out_indices=(0, 2))
    getter.model.load_state_dict(model.state_dict(), strict=False)
    assert_close(getter(X), [features[0], features[2]])
    assert all(resolve_data_config(model=made)["input_size"] == (3, 16, 32) for made in (model, getter))
    assert getter.feature_info.channels() == [24, 24] and getter.feature_info.reduction() == [8, 8]


def test_norm_behind_the_pool_and_representation():
    """With the norm behind the pooling, tokens are never normed; what the classifier sees has its own width."""
    model = ours(name="vit", final_norm="after_pool", pool="mean", representation_size=7)
    last, features = model.forward_intermediates(X, norm=True, output_fmt="NLC")
    assert torch.equal(features[-1], last[:, 1:])
    pre_logits = model.forward_head(last, pre_logits=True)
    assert_close(pre_logits, model.pre_logits(model.norm(last.mean(1))))
    assert pre_logits.shape == (2, model.head_hidden_size) == (2, 7) and last.shape[2] == model.num_features == 24
    assert model.prune_intermediate_layers(1) == [3] and torch.equal(model(X), last)


def test_device_and_dtype_are_timms():
    """As timm's train.py makes the teacher of a distillation."""
    for settings in ({}, {"features_only": True, "out_indices": [1]}):
        made = timm.create_model("deepvit16", **SMALL | settings, device="meta", dtype=torch.bfloat16)
        assert {(weight.device.type, weight.dtype) for weight in made.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("stem", STEMS)
def test_config_stays_true(stem):
    model = ours(stem, global_pool="avg")
    assert model.config["pool"] == "avg"
    for change in (lambda: model.reset_classifier(7, "token"), lambda: model.set_input_size((32, 48), 16),
                   lambda: model.reset_classifier(0, ""), lambda: model.set_input_size(64),
                   lambda: model.reset_classifier(3, "mean")):
        change()
        again = build_model(json.loads(json.dumps(model.config))).eval()
        again.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, *model.img_size)
        assert torch.equal(again(x), model(x)) and again.config == model.config
        assert resolve_data_config(model=model)["input_size"] == (3, *model.img_size)
    assert count_flops(model) == count_flops(again)
    assert model.config["img_size"] == 64 and model.config["patch_size"] == 16
    assert {info["reduction"] for info in model.feature_info} == {16}


@pytest.mark.parametrize("stem", STEMS)
def test_hugging_face_layout_both_ways(tmp_path, stem):
    torch.manual_seed(2)
    model = ours(stem, attention="reattention_fc")
    model.reset_classifier(6, "avg")
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=model.config)  # timm notes them since 1.0.31
    source = f"local-dir:{tmp_path}"
    again = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(again(X), model(X)) and again.config == model.config
    other = timm.create_model(source, pretrained=True, img_size=(32, 32), num_classes=2, in_chans=1).eval()
    grey = torch.randn(2, 1, 32, 32)
    model.set_input_size((32, 32))
    assert_close(other.forward_features(grey), model.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert other(grey).shape == (2, 2)
    file = timm.create_model("deepvit16", pretrained=True, **model.config | {"img_size": SMALL["img_size"]},
                             pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors"), "num_classes": 6})
    assert torch.equal(file.eval()(X), again(X))


def test_hugging_face_layout_of_a_model_made_without_timm(tmp_path):
    model = deepvit.create_model("deepvit_s", **SMALL | {"depth": 2, "patch_size": 16}).eval()
    save_for_hf(model, tmp_path, model_args=model.config)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(X), model(X)) and again.config == model.config


def flops(function, *tensors, backward=False):
    with FlopCounterMode(display=False) as counter:
        out = function(*(tensor.clone().requires_grad_() for tensor in tensors))
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def test_flops_are_counted():
    B, H, N, d = 2, 3, 5, 4
    tensors = (*torch.randn(3, B, H, N, d).unbind(), torch.randn(H, H))
    assert flops(reattention, *tensors) == flops(reference.reattention, *tensors) == 2 * B * H * N * N * (2 * d + H)
    anew = 2 * B * H * N * N * (d + H)  # maps and mix are computed again in the backward
    assert flops(reattention, *tensors, backward=True) == flops(reference.reattention, *tensors, backward=True) + anew
    model = ours()
    assert flops(model, X[:1]) == count_flops(model)


def test_second_derivatives():
    q, k, v = torch.randn(3, 1, 2, 3, 2)
    mix, x = torch.randn(2, 2), q.clone().requires_grad_()
    gradient, = torch.autograd.grad(reattention(x, k, v, mix).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="once.*torch.func"):
        gradient.sum().backward()
    hessians = [torch.func.hessian(lambda q, how=how: how(q, k, v, mix).square().sum())(q)
                for how in (reattention, reference.reattention)]
    assert_close(*hessians, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refused, named", [
    (lambda: ours(global_pool="max"), "global_pool.*token"), (lambda: ours().reset_classifier(3, "map"), "global_pool"),
    (lambda: ours().set_input_size(30), "img_size"),
    (lambda: ours("conv").set_input_size(21, 7), "patch_size.*multiple"),
    (lambda: ours(name="vit", patch_norm=True).set_input_size(patch_size=4), "patch_norm"),
    (lambda: ours("conv", patch_norm=True), "patch_norm"), (lambda: ours()(X.mT), "img_size"),
    (lambda: ours().forward_features(X[..., :8]), "img_size"),
    (lambda: ours()(X[:, :1]), "1, 16, 32.*3, 16, 32.*in_chans"),
    (lambda: ours().forward_intermediates(X, output_fmt="NHWC"), "output_fmt"),
    (lambda: deepvit.create_model("vit", stem={"name": "conv", "in_chans": 3}), r"^stem\.in_chans"),
    (lambda: deepvit.models.ViT(stem={"name": "hybrid", "arithmetic": "torch"}), r"^stem\.arithmetic.*vit_pytorch"),
    (lambda: deepvit.create_model("vit", stem={"name": "hybrid", "layers": [1], "arithmetic": "vit_pytorch"}), "stage"),
    (lambda: deepvit.create_model("vit", attention={"class": "SelfAttention", "dim": 3}), r"^attention\.dim"),
    (lambda: deepvit.create_model("vit", dpeth=3), "^dpeth.*depth"),
    (lambda: deepvit.create_model("vit", depth=0), "^depth")])
def test_refusals_name_the_argument(refused, named):
    with pytest.raises(UserError, match=named):
        refused()


@pytest.mark.slow
@pytest.mark.parametrize("name", deepvit.list_models())
def test_every_model_whole(name):
    model = timm.create_model(name, num_classes=42)
    x = torch.randn(2, *model.default_cfg["input_size"])
    model.eval().set_grad_checkpointing()
    with torch.no_grad():
        last, features = model.forward_intermediates(x)
        assert len(features) == model.depth and torch.equal(last, model.forward_features(x))
        assert features[-1].shape == (2, model.num_features, *model.patch_embed.grid_size)
        del last, features
    logits = model.train()(x)
    logits.mean().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())
