"""Settings beyond the oracles, against a plain re-implementation written from the published specification."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import uniform
from torch.testing import assert_close

import deepvit
from deepvit.errors import UserError
from deepvit.models.blocks import BranchMasks

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
SETTINGS = {
    "qk scale": {"attention": "reattention", "qk_scale": 0.7},
    "residual scale": {"attention": "reattention", "residual_scale": 0.25},
    "residual scale, plain": {"residual_scale": 2.0},
    "map scale": {"attention": "reattention", "map_scale": 0.3},
    "one head": {"attention": "reattention", "num_heads": 1},
    "twelve heads": {"attention": "reattention", "num_heads": 12},
    "head width": {"attention": "reattention", "num_heads": 3, "head_dim": 5},
    "not square": {"attention": "reattention", "img_size": [16, 48], "patch_size": [8, 4]},
    "grey": {"attention": "reattention", "in_chans": 1},
    "no qkv bias": {"attention": "reattention", "qkv_bias": False},
    "some blocks": {"attention": "reattention", "reattention_blocks": [0, -1]},
    "a slice of blocks": {"attention": "reattention_fc", "reattention_blocks": "-1:"},
    "norm only": {"attention": "norm_only", "map_scale": 0.5},
    "conv stem": {"attention": "reattention", "stem": "conv", "residual_scale": 0.5, "reattention_blocks": "-2:"},
    "conv stem, not square": {"stem": "conv", "img_size": [32, 16]},
    "layer norm of heads": {"attention": "reattention_ln", "pool": "mean", "final_norm": "after_pool",
                            "gelu": "tanh", "norm_eps": 1e-5},
    "mlp and pre_logits": {"mlp_ratio": 100 / 24, "representation_size": 7, "pool": "avg"},
}


@pytest.mark.parametrize("chosen", ["3:", ":-3", "2:1", "1:x", "a", [3], [-4], []], ids=str)
def test_blocks_that_the_model_does_not_have(chosen):
    """A slice or list of none would leave plain attention under the name of another."""
    with pytest.raises(UserError, match="reattention_blocks=.* does not fit a model of 3 blocks"):
        deepvit.create_model("vit", **SMALL, attention="reattention", reattention_blocks=chosen)


def test_stochastic_depth_keeps_the_mean():
    """A kept branch is scaled by 1 / (1 - rate)."""
    model = deepvit.create_model("vit", **SMALL, drop_path_rate=0.5)
    masks = BranchMasks(model, 0, torch.device("cpu"))
    masks.draw(0, 4000)
    masks.place(0, 4000)
    for block, rate in zip(model.blocks[1:], (0.25, 0.5), strict=True):
        for keep in (block.drop_path1.keep, block.drop_path2.keep):
            assert_close(keep.unique(), torch.tensor([0, 1 / (1 - rate)]))
            assert abs(keep.mean() - 1) < 0.1


@pytest.fixture(params=SETTINGS)
def model(request):
    model = deepvit.create_model("vit", **{**SMALL, **SETTINGS[request.param]})
    with torch.no_grad():  # nothing at its starting value
        for i, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                noise = torch.from_numpy(uniform(i, tensor.numel())).view(tensor.shape).float()
                positive = (tensor == 1).all()
                tensor.copy_(0.5 + noise if positive else (noise - 0.5) * 2 / math.sqrt(max(tensor.shape[-1:] or [1])))
    return model


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_logits(model, training):
    height, width = model.img_size
    x = torch.from_numpy(uniform(99, 3 * height * width * 3)).float().view(3, 3, height, width)[
        :, :model.config.get("in_chans", 3)] - 0.5
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = plain_forward(state, model.config, x, training)
    with torch.no_grad():
        logits = model.train(training)(x)
    assert wanted.std() > 1e-3
    assert_close(logits, wanted, atol=2e-5 if not training else 1e-4, rtol=1e-5)


def plain_forward(p: dict, config: dict, x: torch.Tensor, training: bool) -> torch.Tensor:
    """The specification, step by step: p is a state dict, x `[B, channels, height, width]`."""
    eps = config["norm_eps"]
    x = stem(p, config, x, training)
    x = torch.cat([p["cls_token"].repeat(len(x), 1, 1), x], 1) + p["pos_embed"]
    a = config["residual_scale"]
    for i in range(config["depth"]):
        b = f"blocks.{i}."
        x = x + attention(p, b + "attn.", config, layer_norm(p, b + "norm1", a * x, eps), training) / a
        hidden = linear(p, b + "mlp.fc1", layer_norm(p, b + "norm2", a * x, eps))
        x = x + linear(p, b + "mlp.fc2", gelu(hidden, config["gelu"])) / a
    first = config["final_norm"] == "before_pool"
    x = layer_norm(p, "norm", x, eps) if first else x
    x = {"cls": x[:, 0], "mean": x.mean(1), "avg": x[:, 1:].mean(1)}[config["pool"]]
    x = x if first else layer_norm(p, "norm", x, eps)
    if "pre_logits.0.weight" in p:
        x = linear(p, "pre_logits.0", x).tanh()
    return linear(p, "head", x)


def attention(p: dict, at: str, config: dict, x: torch.Tensor, training: bool) -> torch.Tensor:
    B, N, _ = x.shape
    H = config["num_heads"]
    qkv = linear(p, at + "qkv", x)
    d = qkv.shape[-1] // 3 // H
    q, k, v = (qkv[..., i * H * d:(i + 1) * H * d].reshape(B, N, H, d).transpose(1, 2) for i in range(3))
    maps = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * (config["qk_scale"] or d**-0.5), -1)
    if at + "mix.weight" in p:
        maps = torch.einsum("oh,bhij->boij", p[at + "mix.weight"], maps)
        if at + "mix.bias" in p:
            maps = maps + p[at + "mix.bias"].view(1, H, 1, 1)
    if at + "norm.running_mean" in p:
        maps = batch_norm(p, at + "norm", maps, training)
    elif at + "norm.weight" in p:  # LayerNorm over heads; its eps is the attention's own
        mean, var = maps.mean(1, keepdim=True), maps.var(1, keepdim=True, correction=0)
        maps = (maps - mean) / (var + config["attention"]["norm_eps"]).sqrt()
        maps = maps * p[at + "norm.weight"].view(1, H, 1, 1) + p[at + "norm.bias"].view(1, H, 1, 1)
    if at + "mix.weight" in p or at + "norm.weight" in p:
        maps = maps * config["map_scale"]
    return linear(p, at + "proj", torch.einsum("bhij,bhjd->bihd", maps, v).reshape(B, N, H * d))


def stem(p: dict, config: dict, x: torch.Tensor, training: bool) -> torch.Tensor:
    if config["stem"] == "conv":
        x = batch_norm(p, "patch_embed.bn1", F.conv2d(x, p["patch_embed.conv1.weight"], None, 2, 3), training).relu()
        x = batch_norm(p, "patch_embed.bn2", F.conv2d(x, p["patch_embed.conv2.weight"], None, 1, 1), training).relu()
    weight = p["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, p["patch_embed.proj.bias"], weight.shape[2:])
    return x.flatten(2).transpose(1, 2)


def batch_norm(p: dict, at: str, x: torch.Tensor, training: bool) -> torch.Tensor:
    mean, var = p[at + ".running_mean"], p[at + ".running_var"]
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return x * p[at + ".weight"].view(1, -1, 1, 1) + p[at + ".bias"].view(1, -1, 1, 1)


def layer_norm(p: dict, at: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
    return x * p[at + ".weight"] + p[at + ".bias"]


def linear(p: dict, at: str, x: torch.Tensor) -> torch.Tensor:
    return x @ p[at + ".weight"].t() + p.get(at + ".bias", 0)


def gelu(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "erf":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
