"""Every keyword of a model, of its stems and of each attention has its effect; complete by their signatures.

Three kinds of effect: SHAPES of the parameters; where they START; the OUTPUT of the same parameters in training mode.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deepvit
from deepvit.config.signature import parameters_of
from deepvit.errors import UserError
from deepvit.models import ATTENTIONS, AttnScale, ReAttention, SelfAttention, ViT
from deepvit.models.stem import STEMS

SHAPES, START, OUTPUT = "shapes", "start", "output"
SMALL = {"img_size": 16, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 4}
HYBRID = {"name": "hybrid", "layers": [1, 1], "width": 32}

# keyword -> what must change, the value, and what is given beside it
Effect = tuple[str, Any] | tuple[str, Any, dict[str, Any]]
MODEL: dict[str, Effect] = {
    "img_size": (SHAPES, 24), "patch_size": (SHAPES, 8), "in_chans": (SHAPES, 1), "num_classes": (SHAPES, 7),
    "embed_dim": (SHAPES, 32), "depth": (SHAPES, 2), "num_heads": (OUTPUT, 2), "head_dim": (SHAPES, 5),
    "mlp_ratio": (SHAPES, 2.0), "qkv_bias": (SHAPES, False), "qk_scale": (OUTPUT, 2.0), "stem": (SHAPES, "conv"),
    "attention": (SHAPES, "reattention"), "reattention_blocks": (SHAPES, [0], {"attention": "reattention"}),
    "map_scale": (OUTPUT, 0.5), "residual_scale": (OUTPUT, 0.5), "drop_rate": (OUTPUT, 0.5),
    "pos_drop_rate": (OUTPUT, 0.5), "attn_drop_rate": (OUTPUT, 0.5), "drop_path_rate": (OUTPUT, 0.5),
    "init_values": (START, 0.0, {"init_values": 0.1}), "pool": (OUTPUT, "mean"), "gelu": (OUTPUT, "tanh"),
    "norm_eps": (OUTPUT, 0.1), "patch_norm": (SHAPES, True), "final_norm": (OUTPUT, "after_pool", {"pool": "mean"}),
    "representation_size": (SHAPES, 9), "block": (OUTPUT, "deepnorm"), "feat_scale": (SHAPES, True),
    "init_std": (START, 0.05), "weight_init": (START, "mimetic"), "share_maps": (SHAPES, 2)}

STEM: dict[str, Effect] = {
    "layers": (SHAPES, [1, 2], HYBRID), "width": (SHAPES, 64, HYBRID), "arithmetic": (OUTPUT, "vit_pytorch", HYBRID),
    "norm_batch": (OUTPUT, 2, {"name": "conv"})}
OF_THE_MODEL = {"img_size", "patch_size", "in_chans", "embed_dim", "norm_eps"}  # what `ViT` gives a stem

EVERY: dict[str, Effect] = {  # attention
    "dim": (SHAPES, 32), "num_heads": (OUTPUT, 2), "head_dim": (SHAPES, 5), "qkv_bias": (SHAPES, False),
    "qk_scale": (OUTPUT, 2.0), "attn_drop": (OUTPUT, 0.5), "proj_drop": (OUTPUT, 0.5), "map_scale": (OUTPUT, 0.5),
    "proj_bias": (SHAPES, False), "qk_norm": (SHAPES, True), "dtype": (START, torch.float64), "device": (START, "meta")}
PER_HEAD: dict[str, Effect] = {"num_heads": (SHAPES, 2)}
THETA: dict[str, Effect] = {"theta_init": (START, "normal")}
NORM = {"norm": True}
ALGEBRA: dict[str, Effect] = {
    "gain": (OUTPUT, 3.0), "learn_gain": (SHAPES, True), "centre": (OUTPUT, 1.0), "mix": (SHAPES, True),
    "theta_init": (START, "identity", {"mix": True}), "norm": (SHAPES, True), "norm_eps": (OUTPUT, 1e-2, NORM),
    "norm_batch": (OUTPUT, 1, NORM)}
OWN: dict[str, dict[str, Effect]] = {
    "SelfAttention": ALGEBRA,
    "ReAttention": PER_HEAD | ALGEBRA | {
        "mix": (SHAPES, False), "norm": (SHAPES, False), "gain": (OUTPUT, 3.0, {"norm": False}),
        "learn_gain": (SHAPES, True, {"norm": False}), "centre": (OUTPUT, 1.0, {"norm": False})},
    "ReAttentionLN": PER_HEAD | {"norm_eps": (OUTPUT, 1e-2), "theta_init": (START, "identity")},
    "LearnedTemperature": PER_HEAD | ALGEBRA,
    "DecayedTemperature": ALGEBRA | {"first": (OUTPUT, 3.0), "last": (OUTPUT, 0.1, {"block_index": 1, "depth": 2}),
                           "block_index": (OUTPUT, 1, {"depth": 3}), "depth": (OUTPUT, 9, {"block_index": 1})},
    "TalkingHeads": PER_HEAD | THETA,
    "AttnScale": PER_HEAD | ALGEBRA | {"learn_gain": (SHAPES, False)} | {
        name: (effect[0], effect[1], {"learn_gain": False, **(effect[2] if len(effect) > 2 else {})})
        for name, effect in ALGEBRA.items() if name.startswith("norm")}}
OURS = {name: cls for name, cls in ATTENTIONS.items() if cls.__module__.startswith("deepvit.models")}


def test_every_keyword_has_an_entry():
    assert set(MODEL) == set(parameters_of(ViT)[0])
    assert set(STEM) == {name for stem in STEMS.values() for name in parameters_of(stem)[0]} - OF_THE_MODEL
    assert set(OWN) == set(OURS)
    for name, cls in OURS.items():
        assert set(EVERY) | set(OWN[name]) == set(parameters_of(cls)[0]) - {"scale_norm", "norm_layer"}  # timm's, name


def made(build, *arguments, **settings) -> nn.Module:
    torch.manual_seed(0)
    return build(*arguments, **settings)


def output(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In training mode, with no parameter where it started: there a variant may be plain attention."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    torch.manual_seed(1)
    return module.train()(x).detach()


def effect(before: nn.Module, after: nn.Module, x: torch.Tensor) -> str | None:
    """The first of the three that differs."""
    states = [module.state_dict() for module in (before, after)]
    shapes, starts = ([[see(tensor) for tensor in state.values()] for state in states] for see in (
        lambda tensor: tensor.shape, lambda tensor: (tensor.dtype, tensor.device, tensor.tolist()
                                                     if tensor.device.type == "cpu" else None)))
    if states[0].keys() != states[1].keys() or shapes[0] != shapes[1]:
        return SHAPES
    if starts[0] != starts[1]:
        return START
    return OUTPUT if not torch.equal(output(before, x), output(after, x)) else None


@pytest.mark.parametrize("name", MODEL)
def test_a_keyword_of_the_model(name):
    wanted, value, given = (*MODEL[name], {})[:3]
    before, after = (made(deepvit.create_model, "vit", **SMALL | given | change) for change in ({}, {name: value}))
    if name == "block":  # its weights start otherwise too
        after.load_state_dict(before.state_dict())
    assert effect(before, after, torch.randn(4, 3, 16, 16)) == wanted
    images = torch.zeros(2, after.config["in_chans"], *after.img_size)
    assert after(images).shape == (2, after.num_classes)


def test_one_keyword_for_several_layers():
    settings = {"norm_eps": 0.1, "drop_rate": 0.2, "patch_norm": True, "attention": "reattention_ln"}
    model = deepvit.create_model("vit", **SMALL, **settings)
    of_heads = {block.attn.norm for block in model.blocks}
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) and module not in of_heads]
    assert [norm.eps for norm in norms] == [0.1] * (2 + 2 * 3 + 1)
    drops = {name.split(".", 2)[2]: module.p for name, module in model.named_modules()
             if isinstance(module, nn.Dropout) and name.startswith("blocks.")}
    assert drops == {"attn.proj_drop": 0.2, "mlp.drop1": 0.2, "mlp.drop2": 0.2}
    assert [norm.eps for norm in model.patch_embed.modules() if isinstance(norm, nn.LayerNorm)] == [0.1] * 2
    branches = deepvit.create_model("vit", **SMALL, init_values=0.1, drop_path_rate=0.2).blocks
    assert {gamma.item() for block in branches for layer in (block.ls1, block.ls2) for gamma in layer.gamma} == {
        torch.tensor(0.1).item()}
    assert [block.drop_path2.drop_prob for block in branches[1:]] == [0.1, 0.2] == [
        block.drop_path1.drop_prob for block in branches[1:]]
    decay = deepvit.create_model("vit", **SMALL, attention="temperature_decay")
    assert [block.attn.temperature for block in decay.blocks] == pytest.approx([1, 0.5**0.5, 0.5])
    grouped = {**deepvit.models.attention_config("reattention"), "norm_batch": 2}
    stem = deepvit.create_model("vit", **SMALL | {"stem": "conv", "attention": grouped}).patch_embed
    assert (stem.bn1.norm_batch, stem.bn2.norm_batch) == (2, 2)
    heads = deepvit.models.TalkingHeads(24, num_heads=4, theta_init="normal")
    assert all(mix.weight.count_nonzero() == 16 for mix in (heads.mix, heads.mix_logits))  # the identity has 4
    thetas = [made(ReAttention, 24, num_heads=4, theta_init=start).mix for start in ("random", "normal", "identity")]
    assert [theta.bias.count_nonzero() for theta in thetas] == [4, 0, 0]


@pytest.mark.parametrize("name", STEM)
def test_a_keyword_of_a_stem(name):
    wanted, value, stem = STEM[name]
    before, after = (made(deepvit.create_model, "vit", **SMALL | {"patch_size": 8, "stem": stem | change})
                     for change in ({}, {name: value}))
    assert effect(before, after, torch.randn(4, 3, 16, 16)) == wanted


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in OURS for name in EVERY | OWN[cls]])
def test_a_keyword_of_an_attention(cls, name):
    wanted, value, given = (*(EVERY | OWN[cls])[name], {})[:3]
    before, after = (made(OURS[cls], **{"dim": 24, "num_heads": 4} | given | change) for change in ({}, {name: value}))
    assert effect(before, after, torch.randn(2, 9, 24)) == wanted


@torch.no_grad()
@pytest.mark.parametrize("cls", OURS)
def test_map_scale_is_a_factor_on_the_final_maps(cls):
    plain, scaled = (made(OURS[cls], 24, num_heads=4, map_scale=scale) for scale in (1.0, 0.5))
    x = torch.randn(2, 9, 24)
    for module in (plain, scaled):
        output(module, x)  # and nothing is where it started
        module.eval()
    assert_close(scaled.weights(x), 0.5 * plain.weights(x))
    assert_close(scaled.weights(x, "softmax"), plain.weights(x, "softmax"))
    assert_close(scaled(x), scaled.merge(0.5 * plain.weights(x) @ plain.split(x)[2]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in OURS for name in EVERY | OWN[cls] if name not in (
    "attn_drop", "proj_drop", "device", "dtype")])
def test_the_maps_heed_what_the_output_heeds(cls, name):
    """With batch statistics as well, which the regularisation of the maps takes."""
    _, value, given = (*(EVERY | OWN[cls])[name], {})[:3]
    attention, x = made(OURS[cls], **{"dim": 24, "num_heads": 4} | given | {name: value}), torch.randn(2, 9, 24)
    if name == "dim":
        x = torch.randn(2, 9, value)
    wanted = output(attention, x)
    assert_close(attention.merge(attention.weights(x) @ attention.split(x)[2]), wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_residual_scale_is_a_factor_before_and_a_divisor_behind():
    a, x = 0.5, torch.randn(2, 9, 24)
    block = deepvit.create_model("vit", **SMALL, residual_scale=a, norm_eps=1.0).blocks[0]
    y = x + block.attn(block.norm1(a * x)) / a
    assert_close(block(x), y + block.mlp(block.norm2(a * y)) / a)


@torch.no_grad()
def test_what_is_frozen_stays():
    attention, x = made(SelfAttention, 24, num_heads=4, mix="frozen", norm="frozen"), torch.randn(2, 9, 24)
    assert not any(parameter.requires_grad for parameter in attention.mix.parameters())
    attention(x)
    statistics = attention.norm.running_var.clone()
    attention(3 * x)
    assert torch.equal(attention.norm.running_var, statistics) and not torch.equal(statistics, torch.ones(4))


def test_what_is_refused():
    for cls, wrong, word in ((SelfAttention, {"scale_norm": True}, "scale_norm"),
                             (ReAttention, {"gain": 2.0}, "norm=false"), (ReAttention, {"centre": 1.0}, "norm=false"),
                             (AttnScale, {"norm": True}, "norm=false"),
                             (ReAttention, {"norm": "frozen", "attn_drop": 0.1}, "attn_drop")):
        with pytest.raises(UserError, match=word):
            cls(24, num_heads=4, **wrong)
