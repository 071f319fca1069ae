"""Every attention of conf/model/attention holds the law, and each variant is what its paper says."""

import math
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import deepvit
from deepvit import analysis
from deepvit.errors import UserError
from deepvit.models import ATTENTIONS, SelfAttention, attention_config, list_attentions
from deepvit.models.attention import Attention
from deepvit.models.blocks import FeatScale

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}


def tiny(attention="self", **settings):
    torch.manual_seed(0)
    return deepvit.create_model("vit", **{**TINY, "attention": attention, **settings})


def stirred(module):
    """Nothing left at its initial value, where a variant may be plain attention."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in module.named_buffers():
            if "running_mean" in name:
                buffer.add_(0.02)
            elif "running_var" in name:
                buffer.fill_(3e-4)
    return module


@pytest.fixture
def tokens():
    return torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head_dim", [None, 5])
@pytest.mark.parametrize("name", list_attentions())
def test_the_law(name, head_dim, tokens):
    """merge(weights(x) @ v) == forward(x) in eval mode, with every parameter away from its start."""
    attention = stirred(tiny(name, head_dim=head_dim, attn_drop_rate=0.2, map_scale=0.3).blocks[1].attn).eval()
    with torch.no_grad():
        weights = attention.weights(tokens)
        assert weights.shape == (2, 4, 17, 17)
        out = attention(tokens)
        largest = out.abs().max().item()  # the norm enlarges rounding by 1 / sqrt(3e-4)
        assert_close(attention.merge(weights @ attention.split(tokens)[2]), out, atol=1e-5 * largest, rtol=0)
        assert_close(attention.weights(tokens, "softmax").sum(-1), torch.ones(2, 4, 17), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list_attentions())
def test_the_law_of_gradients(name, tokens):
    """The fast path and the definition have the same gradients, so a variant trains as it is described."""
    fast, slow = (stirred(tiny(name, map_scale=0.3).blocks[1].attn).eval() for _ in range(2))
    fast(tokens).square().sum().backward()
    slow.merge(slow.weights(tokens) @ slow.split(tokens)[2]).square().sum().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in slow.parameters())
    for (label, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        atol = max(1e-4 * b.grad.abs().max().item(), 1e-7 * largest)  # that of k_norm.bias is 0: it moves whole rows
        assert_close(a.grad, b.grad, atol=atol, rtol=1e-3, msg=f"gradient of {label}")


@pytest.mark.parametrize("name", list_attentions())
def test_every_variant_trains_and_says_its_name(name, images):
    model = tiny(name, attn_drop_rate=0.1)
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())
    assert attention_config(name)["name"] == name
    own = {key: value for key, value in attention_config(name).items() if key not in ("name", "class")}
    assert isinstance(ATTENTIONS[attention_config(name)["class"]](24, num_heads=4, **own), torch.nn.Module)


@pytest.mark.parametrize("name", ["temperature", "talking_heads", "attn_scale"])
def test_starts_as_plain_attention(name, images):
    plain, variant = tiny("self").eval(), tiny(name).eval()
    variant.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert_close(variant(images), plain(images), atol=1e-6, rtol=1e-5)


def reference(attention, tokens):
    """The scaled products of q and k `[B, H, N, d]`, before a variant changes them, by nothing but einsum."""
    q, k, _ = Attention.split(attention, tokens)
    return torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])


@torch.no_grad()
def test_learned_temperature(tokens):
    attention = stirred(tiny("temperature").blocks[0].attn)
    temperature = torch.exp(-attention.log_sharpness)[:, None, None]
    assert_close(attention.weights(tokens), (reference(attention, tokens) / temperature).softmax(-1))


@torch.no_grad()
def test_decayed_temperature(tokens):
    model = tiny("temperature_decay", depth=5)
    temperatures = [block.attn.temperature for block in model.blocks]
    assert temperatures[0] == 1 and temperatures[-1] == 0.5
    assert temperatures[2] == pytest.approx(math.sqrt(0.5))  # geometric
    attention = stirred(model.blocks[-1].attn)
    assert_close(attention.weights(tokens), (reference(attention, tokens) / 0.5).softmax(-1))
    assert tiny("temperature_decay", depth=1).blocks[0].attn.temperature == 1


@torch.no_grad()
def test_talking_heads(tokens):
    attention = stirred(tiny("talking_heads").blocks[0].attn)
    logits = torch.einsum("gh,bhij->bgij", attention.mix_logits.weight, reference(attention, tokens))
    assert_close(attention.weights(tokens, "softmax"), logits.softmax(-1))
    assert_close(attention.weights(tokens), torch.einsum("gh,bhij->bgij", attention.mix.weight, logits.softmax(-1)))


@torch.no_grad()
def test_attn_scale(tokens):
    attention = stirred(tiny("attn_scale").blocks[0].attn)
    low = torch.full((17, 17), 1 / 17)
    high = reference(attention, tokens).softmax(-1) - low
    assert_close(attention.weights(tokens), low + high * (1 + attention.contrast.view(1, 4, 1, 1)))


@torch.no_grad()
def test_the_algebra(tokens):
    """norm(Theta ((1 - c)/N + g (A - 1/N)) + b) from plain products, each setting away from its default."""
    attention = stirred(SelfAttention(24, 4, gain=5.0, learn_gain=True, centre=0.3, mix=True)).eval()
    maps = reference(attention, tokens).softmax(-1)
    gain = 5.0 * (1 + attention.contrast.view(1, 4, 1, 1))
    inner = 0.7 / 17 + gain * (maps - 1 / 17)
    wanted = torch.einsum("gh,bhij->bgij", attention.mix.weight, inner) + attention.mix.bias.view(1, 4, 1, 1)
    assert_close(attention.weights(tokens), wanted)
    assert_close(attention(tokens), attention.merge(wanted @ attention.split(tokens)[2]), atol=1e-4, rtol=1e-4)


def tokens_through(name, tokens, **settings):
    attention = tiny(name).blocks[0].attn if not settings else tiny(attention_config(name) | settings).blocks[0].attn
    return attention.train()(tokens)


@torch.no_grad()
def test_neighbours_on_the_ladder_meet(tokens):
    """Each rung is the one before it where the one thing that differs is taken away."""
    plain = tokens_through("self", tokens)
    assert torch.equal(tokens_through("contrast", tokens, gain=1.0), plain)
    value = tiny("self").blocks[0].attn
    uniform = value.merge(value.split(tokens)[2].mean(2, keepdim=True).expand(-1, -1, 17, -1))
    close = partial(assert_close, atol=1e-4, rtol=1e-4)
    close(tokens_through("centred", tokens) + uniform, tokens_through("contrast", tokens))
    close(tokens_through("centred", tokens, gain=1.0), plain - uniform)
    assert torch.equal(tokens_through("centred", tokens, learn_gain=True), tokens_through("centred", tokens))
    norm = tokens_through("norm_only", tokens, norm_eps=1.0)  # so large that the norm is a constant gain of 1
    close(norm, tokens_through("centred", tokens, gain=1.0))
    assert torch.equal(tokens_through("norm_only", tokens, norm="frozen"), tokens_through("norm_only", tokens))
    close(tokens_through("reattention_identity", tokens), tokens_through("norm_only", tokens))


def test_frozen_norm_keeps_the_statistics_of_the_first_batch(tokens):
    """Then it is an evaluated norm whose weight and bias learn; a recomputed block sees what its forward saw."""
    frozen = tiny(attention_config("norm_only") | {"norm": "frozen"}).blocks[0].attn.train()
    plain = tiny("norm_only").blocks[0].attn.train()
    assert torch.equal(frozen(tokens), plain(tokens))
    first = plain.weights(tokens, "softmax").var((0, 2, 3))
    assert_close(frozen.norm.running_var, first)
    state = {name: value.clone() for name, value in frozen.state_dict().items()}
    other = frozen(3 * tokens)
    assert all(torch.equal(value, state[name]) for name, value in frozen.state_dict().items() if "running" in name)
    assert torch.equal(other, frozen.eval()(3 * tokens)) and not torch.equal(other, plain.train()(3 * tokens))
    other.sum().backward()
    assert frozen.norm.weight.grad.any()
    results = []
    for checkpointing in (False, True):
        model = tiny(attention_config("norm_only") | {"norm": "frozen"})
        model.set_grad_checkpointing(checkpointing)
        for _ in range(2):
            model(torch.ones(4, 3, 32, 32).cumsum(3)).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert_close(gradient, results[1][name], atol=1e-6 * gradient.abs().max().item(), rtol=1e-4, msg=name)


def test_frozen_mix_does_not_learn(images):
    model = tiny(attention_config("reattention") | {"mix": "frozen"})
    model(images).square().sum().backward()
    assert {name.split(".", 2)[2] for name, p in model.named_parameters() if p.grad is None} == {
        "attn.mix.weight", "attn.mix.bias"}
    assert torch.equal(model.blocks[1].attn.mix.weight, tiny("reattention").blocks[1].attn.mix.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self", "reattention"])
def test_qk_norm(name, tokens):
    attention = stirred(tiny(attention_config(name) | {"qk_norm": True}).blocks[0].attn).eval()
    q, k, _ = attention.qkv(tokens).view(2, 17, 3, 4, 6).permute(2, 0, 3, 1, 4)
    q, k = (F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-6)
            for x, norm in ((q, attention.q_norm), (k, attention.k_norm)))
    assert_close(attention.weights(tokens, "softmax"), (q @ k.mT / math.sqrt(6)).softmax(-1))


@torch.no_grad()
def test_high_gain_in_half_precision(tokens):
    """The maps are centred before anything is rounded: 300 times them cancels nothing."""
    attention = tiny(attention_config("contrast") | {"gain": 300.0}).blocks[0].attn
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(tokens)
    assert (half - attention(tokens)).norm() < 0.01 * attention(tokens).norm()


@torch.no_grad()
def test_attention_dropout_is_dropout_on_the_maps(tokens):
    attention = tiny("attention_dropout").blocks[0].attn
    assert attention.attn_drop == 0.1
    assert_close(attention.eval()(tokens), tiny("self").blocks[0].attn.eval()(tokens))
    assert not torch.equal(attention.train()(tokens), attention(tokens))


def test_identity_start():
    assert torch.equal(tiny("reattention_identity").blocks[2].attn.mix.weight, torch.eye(4))


def test_last_k_blocks():
    model = tiny("talking_heads", reattention_blocks="-2:")
    assert [type(block.attn).__name__ for block in model.blocks] == ["SelfAttention", "TalkingHeads", "TalkingHeads"]


# Options of the block.

@torch.no_grad()
def test_feat_scale():
    scale, x = FeatScale(6), torch.randn(2, 5, 6)
    assert torch.equal(scale(x), x)
    scale.shared.fill_(1.0)
    scale.apart.copy_(torch.arange(6.0))
    mean = x.mean(1, keepdim=True).expand(-1, 5, -1)
    assert_close(scale(x), 2 * mean + (x - mean) * (1 + torch.arange(6.0)))
    model = tiny(feat_scale=True)
    assert_close(model.eval()(torch.zeros(1, 3, 32, 32)), tiny().eval()(torch.zeros(1, 3, 32, 32)))
    assert "blocks.2.feat_scale.apart" in model.state_dict()


@torch.no_grad()
def test_layer_scale_of_zero_starts_as_the_identity(tokens):
    """ReZero: `init_values=0` is a LayerScale that starts at 0; None is none."""
    block = tiny(init_values=0.0).blocks[0]
    assert torch.equal(block(tokens), tokens) and block.ls1.gamma.requires_grad
    assert "blocks.0.ls1.gamma" not in tiny(init_values=None).state_dict()


@torch.no_grad()
def test_layer_scale_and_residual_scale(tokens):
    block = tiny(init_values=0.1, residual_scale=0.5).blocks[0]
    x = tokens + 0.1 * block.attn(block.norm1(0.5 * tokens)) / 0.5
    assert_close(block(tokens), x + 0.1 * block.mlp(block.norm2(0.5 * x)) / 0.5)


@torch.no_grad()
def test_deepnorm(tokens):
    model = tiny(block="deepnorm", depth=8, embed_dim=96, num_heads=4)
    block = model.blocks[3]
    x, alpha = torch.randn(2, 17, 96), 2.0  # (2 * 8)^(1/4)
    x1 = F.layer_norm(alpha * x + block.attn(x), (96,), eps=1e-6)
    assert_close(block(x), F.layer_norm(alpha * x1 + block.mlp(x1), (96,), eps=1e-6), atol=1e-5, rtol=1e-5)
    beta = 64 ** -0.25  # (8 * 8)^(-1/4)
    q, k, v = block.attn.qkv.weight.chunk(3)
    for weight, gain in ((q, 1), (k, 1), (v, beta), (block.attn.proj.weight, beta), (block.mlp.fc1.weight, beta)):
        assert weight.std().item() == pytest.approx(gain * math.sqrt(2 / sum(weight.shape)), rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)  # the rest as always
    with pytest.raises(UserError, match="residual_scale"):
        tiny(block="deepnorm", residual_scale=0.5)
    with pytest.raises(UserError, match="block"):
        tiny(block="deepnorn")


@pytest.mark.parametrize("name", ["reattention", "talking_heads", "temperature_decay"])
def test_very_deep_with_checkpointing(name, images):
    """64 blocks: the same gradients and BatchNorm statistics with and without recomputation, dropout included."""
    results = []
    for checkpointing in (False, True):
        model = tiny(name, depth=64, embed_dim=16, drop_path_rate=0.1, attn_drop_rate=0.1)
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        model(images).square().sum().backward()
        results.append((dict(model.named_buffers()), {n: p.grad for n, p in model.named_parameters()}))
    (buffers, gradients), (buffers_2, gradients_2) = results
    assert all(torch.equal(buffers[name], buffers_2[name]) for name in buffers)
    for label, gradient in gradients.items():
        assert_close(gradient, gradients_2[label], atol=1e-6 * gradient.abs().max().item() + 1e-12, rtol=1e-4)


def test_qk_norm_in_timm():
    model = timm.models.VisionTransformer(**TINY, attn_layer=SelfAttention, qk_norm=True)
    theirs = timm.models.VisionTransformer(**TINY, qk_norm=True)
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert_close(model.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["LearnedTemperature", "TalkingHeads", "AttnScale"])
def test_variants_fit_timm(name):
    model = timm.models.VisionTransformer(**TINY, attn_layer=ATTENTIONS[name])
    assert len(deepvit.analysis.attention_maps(model, torch.zeros(1, 3, 32, 32))) == 3


def shared(attention="self", **settings):
    return stirred(tiny(attention, **{"depth": 5, "share_maps": 2, **settings})).eval()


@pytest.mark.parametrize("attention", ["self", "reattention", "qk_norm", "reattention_ln"])
def test_followers_take_the_maps_of_their_leader(attention, images):
    """Blocks 1 and 3 follow 0 and 2: one softmax, no q and k of their own, and the law with the leader's input."""
    model = shared(attention)
    record = analysis.record(model, images)
    maps = record.maps("softmax")
    assert_close(maps[0], maps[1])
    assert (maps[1] - maps[2]).abs().max() > 1e-3
    assert [block.attn.qkv is None for block in model.blocks] == [False, True, False, True, False]
    with torch.no_grad():
        leader, follower = model.blocks[2], model.blocks[3]
        x = record.tokens[2]
        heads = follower.attn.weights(leader.norm1(x)) @ follower.attn.values(follower.norm1(record.tokens[3]))
        out = follower.attn(follower.norm1(record.tokens[3]), qk=leader.shared(x))
        assert_close(follower.attn.merge(heads), out, atol=1e-5 * out.abs().max().item(), rtol=0)


def test_shared_maps_cost_what_they_share():
    own, theirs = tiny(depth=4), tiny(depth=4, share_maps=4)
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in theirs.parameters()) == 3 * 2 * 24 * 25
    assert {name for name in theirs.state_dict() if ".qkv." in name} == {f"blocks.0.attn.qkv.{part}"
                                                                          for part in ("weight", "bias")}
    assert deepcopy(theirs).blocks[3].attn.source is not theirs.blocks[0].attn
    twin = deepcopy(theirs)
    assert twin.blocks[3].attn.source is twin.blocks[0].attn


def test_shared_maps_train_with_and_without_checkpointing(images):
    """Gradients and statistics are the same; the leader's q and k get what all of their followers ask for."""
    plain, saving = (shared("reattention").train() for _ in range(2))
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().max() > 0 or "bias" in name or "mix" in name, name
        assert_close(a.grad, b.grad, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers()))
    features = plain.eval().forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
    assert_close(features[3], analysis.record(plain, images).tokens[4][:, 1:])


@pytest.mark.parametrize("settings", [
    {"share_maps": 4}, {"share_maps": 0}, {"share_maps": 2, "block": "deepnorm"},
    {"share_maps": 2, "weight_init": "mimetic"}, {"share_maps": 2, "attention": "talking_heads"},
    {"share_maps": 2, "attention": "temperature"}])
def test_maps_that_cannot_be_shared_are_refused(settings):
    with pytest.raises(UserError, match="share_maps"):
        tiny(**settings)
    with pytest.raises(UserError, match="share_maps"):
        tiny(share_maps=2).blocks[1](torch.zeros(1, 17, 24))
