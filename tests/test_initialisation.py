"""How models start: arms of one seed share what they have in common, in the published distributions; and the regime."""

import math

import pytest
import torch
from torch.testing import assert_close

import deepvit
from deepvit import analysis
from deepvit.errors import UserError
from deepvit.models import list_attentions

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}


def model(seed=0, **settings):
    torch.manual_seed(seed)
    return deepvit.create_model("vit", **{**TINY, **settings})


def test_arms_of_a_seed_share_all_that_they_have_in_common():
    """Whatever an attention, a stem or a block draws beside it; and the draws that follow are the same as well."""
    arms = {name: (model(attention=name).state_dict(), torch.rand(2)) for name in list_attentions()}
    arms["last block"] = model(attention="reattention", reattention_blocks="-1:").state_dict(), torch.rand(2)
    arms["layer scale"] = model(init_values=0.1, feat_scale=True).state_dict(), torch.rand(2)
    arms["conv stem"] = model(stem="conv", attention="talking_heads").state_dict(), torch.rand(2)
    arms["hybrid"] = model(stem={"name": "hybrid", "layers": [1], "width": 32}).state_dict(), torch.rand(2)
    first, follows = arms["self"]
    for name, (state, after) in arms.items():
        stem = "patch_embed." if name in ("conv stem", "hybrid") else " "  # another fan-in
        common = [key for key in first.keys() & state.keys() if not key.startswith(stem)]
        assert len(common) > 3 * 12
        assert all(torch.equal(first[key], state[key]) for key in common), name
        assert torch.equal(follows, after), name
    theta = "blocks.2.attn.mix.weight"
    assert torch.equal(arms["last block"][0][theta], arms["reattention"][0][theta])
    assert torch.equal(arms["reattention_fc"][0][theta], arms["reattention"][0][theta])


def test_every_parameter_has_a_stream_of_its_own():
    a, b = model(attention="reattention"), model(1, attention="reattention")
    drawn = {name: p for name, p in a.named_parameters() if p.std() > 0}
    assert all(not torch.equal(p, b.get_parameter(name)) for name, p in drawn.items())
    starts = [p.flatten()[:4].tolist() for p in drawn.values()]
    assert len({tuple(value / start[0] for value in start) for start in starts}) == len(starts) > 15
    assert not torch.equal(a.head.weight, deepvit.create_model("vit", **TINY).head.weight)  # not seeded anew: another
    deeper = model(attention="reattention", depth=5).state_dict()
    assert all(torch.equal(value, deeper[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_distributions_as_published(stem):
    big = model(embed_dim=384, num_heads=12, stem=stem, attention="reattention")
    for name, p in big.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "head.weight", "pos_embed")) and (
                p.ndim != 4):
            assert p.std().item() == pytest.approx(0.02, rel=0.05) and abs(p.mean()) < 0.02 * 5 / math.sqrt(p.numel())
            assert p.abs().max() < 0.02 * 7, name
        elif p.ndim == 4 or name == "patch_embed.proj.bias":  # uniform, +-1/sqrt(fan-in)
            weight = big.get_parameter(name.replace("bias", "weight"))
            bound = 1 / math.sqrt(weight[0].numel())
            assert 0.9 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        elif ".mix." in name:
            assert p.abs().max() <= 1 / math.sqrt(12) and p.std() > 0.1
        elif name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name or ".bn" in name:
            assert (p == 1).all(), name


def test_initial_std_scales_the_same_draws():
    a, b = model(), model(init_std=0.05)
    for name in ("blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.weight", "head.weight"):
        assert_close(b.get_parameter(name), a.get_parameter(name) * 2.5)
    assert torch.equal(a.pos_embed, b.pos_embed)


@torch.no_grad()
def test_mimetic_initialisation():
    """The products are what the paper says; nothing but the attention differs."""
    vit, plain = model(weight_init="mimetic", embed_dim=192, num_heads=2), model(embed_dim=192, num_heads=2)
    attention = vit.blocks[1].attn
    q, k, v = attention.qkv.weight.view(3, 2, 96, 192)
    values = attention.proj.weight @ v.flatten(0, 1)  # [D, D]
    assert values.diagonal().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert (values + 0.4 * torch.eye(192)).std().item() == pytest.approx(0.4 / math.sqrt(192), rel=0.05)
    products = q.mT @ k  # [H, D, D], of rank d: the better half of 0.7 Z + 0.7
    singular = torch.linalg.svdvals(products)
    assert (singular[:, 96:] < 1e-4).all() and singular[0, 0] > 1.4
    assert (products.diagonal(dim1=1, dim2=2).mean(1) > 0.35).all() and not torch.equal(*products)
    same = {name for name, p in plain.named_parameters() if torch.equal(p, vit.get_parameter(name))}
    assert {name for name, _ in plain.named_parameters()} - same == {
        f"blocks.{i}.attn.{part}.weight" for i in range(3) for part in ("qkv", "proj")}
    for wrong, word in (({"head_dim": 7}, "head_dim"), ({"block": "deepnorm"}, "deepnorm")):
        with pytest.raises(UserError, match=word):
            model(weight_init="mimetic", **wrong)


@torch.no_grad()
@pytest.mark.parametrize(("name", "gain"), [("self", 1.0), ("contrast", 316.2), ("norm_only", None)])
def test_regime(name, gain):
    """Against hand-made maps and branches of the first block; near initialisation the norm is a constant gain."""
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    vit = model(attention=name, init_std=0.05)
    rng, state = torch.get_rng_state(), {key: value.clone() for key, value in vit.state_dict().items()}
    found = analysis.regime(vit, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
    stream = vit._embed(x)
    block = vit.blocks[0].train()  # as in the first step: batch statistics
    softmax = block.attn.weights(block.norm1(stream), "softmax")
    spread = (softmax - 1 / 17).square().mean().sqrt()
    rms = lambda tokens: tokens.square().mean((1, 2)).sqrt()  # noqa: E731
    assert found["spread"][0] == pytest.approx(17 * spread.item(), rel=1e-4)
    wanted = gain or ((softmax - 1 / 17).square().mean((0, 2, 3)) + 1e-5).rsqrt().mean().item()
    assert found["gain"][0] == pytest.approx(wanted, rel=0.02)
    branch = block.attn(block.norm1(stream))
    assert found["attention"][0] == pytest.approx((rms(branch) / rms(stream)).mean().item(), rel=0.01)
    mlp = block.mlp(block.norm2(stream + branch))
    assert found["mlp"][0] == pytest.approx((rms(mlp) / rms(stream)).mean().item(), rel=0.01)
    assert {len(values) for values in found.values()} == {3} and [*found] == ["spread", "gain", "attention", "mlp"]
