"""The published cosine regularisation: its value against the published code's, its gradients, and no trace left."""

import pytest
import torch
from oracles import oracle, part
from torch.nn import functional as F
from torch.testing import assert_close

import deepvit
from deepvit.errors import UserError
from deepvit.models.blocks import cosine_regularisation, record_maps

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4, "num_classes": 5}


def tiny(attention="reattention", **settings):
    torch.manual_seed(0)
    return deepvit.create_model("vit", **{**TINY, "attention": attention, **settings})


def soft_target_loss(logits, target):
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def regularised(model, x, target, pairs):
    with record_maps(model, first=pairs + 1) as maps:
        logits = model(x)
    return soft_target_loss(logits, target) + 0.1 * cosine_regularisation(maps)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


TARGET = torch.eye(5)[:3]


@pytest.mark.parametrize("name", ["reattn_fc_bn", "reattn_cnn_S", "reattn_cnn_L"])
def test_against_the_published_loss(name, tmp_path):
    tensors, config = oracle(f"official/{name}")
    torch.save(part(tensors, "state"), tmp_path / "weights.pth")
    head_dim = config["embed_dim"] // config["num_heads"]
    model = deepvit.load_model(tmp_path / "weights.pth", dialect="deepvit", num_heads=config["num_heads"],
                               residual_scale=config["scale_adjustment"],
                               map_scale=head_dim**-0.5 if config["transform_scale"] else 1.0).train()
    loss = regularised(model, tensors["input"], tensors["cosreg/target"], pairs=config["cosreg_n_comn"])
    assert_close(loss.detach().view(1), tensors["cosreg/loss"], atol=5e-5, rtol=0)


def test_value_by_loops():
    maps = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    total = 0.0
    for p, q in ((maps[0], maps[1]), (maps[1], maps[2])):
        for b in range(2):
            for i in range(4):
                for j in range(4):
                    u, v = p[b, :, i, j].double(), q[b, :, i, j].double()
                    total += float(u @ v / (u.norm() * v.norm())) / 32
    assert cosine_regularisation(maps).item() == pytest.approx(total / 2, abs=1e-6)
    assert cosine_regularisation([maps[0], maps[0] * -2]).item() == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_maps_threaded_through(checkpointing, images):
    """Against a model written out with its maps in hand."""
    ours, plain = tiny(), tiny()
    ours.set_grad_checkpointing(checkpointing)
    regularised(ours, images, TARGET, pairs=2).backward()

    x, maps = torch.cat([plain.cls_token.expand(3, -1, -1), plain.patch_embed(images)], 1) + plain.pos_embed, []
    for block in plain.blocks:
        attn, normed = block.attn, block.norm1(x)
        q, k, v = attn.split(normed)
        mixed = torch.einsum("gh,bhij->bgij", attn.mix.weight, (q * attn.scale @ k.mT).softmax(-1))
        mixed = mixed + attn.mix.bias[:, None, None]
        maps.append(F.batch_norm(mixed, None, None, attn.norm.weight, attn.norm.bias, training=True))
        x = x + attn.merge(maps[-1] @ v)
        x = x + block.mlp(block.norm2(x))
    terms = [F.cosine_similarity(maps[i], maps[i + 1], dim=1).mean() for i in range(2)]
    (soft_target_loss(plain.head(plain.norm(x)[:, 0]), TARGET) + 0.1 * sum(terms) / 2).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        if "mix.bias" not in name:  # its gradient is rounding: the norm removes the bias
            assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm(), name


def test_no_trace(images):
    """Statistics, random state and the logits are what they are without it, and no hook stays."""
    results = []
    for watched in (False, True):
        model = tiny(drop_rate=0.1)
        torch.manual_seed(2)
        if watched:
            with record_maps(model, first=3):
                logits = model(images)
        else:
            logits = model(images)
        results.append([torch.get_rng_state(), logits, *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_maps_in_full_precision_under_autocast(images):
    """Near-uniform maps in bfloat16 would be rounding."""
    model = tiny()
    with record_maps(model, first=1) as expected:
        model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_maps(model, first=1) as maps:
        model(images)
    assert maps[0].dtype == torch.float32
    assert (maps[0] - expected[0]).norm() < 0.05 * expected[0].norm()


def test_record_maps(images):
    model = tiny("talking_heads")
    with record_maps(model, first=2) as maps:
        model(images)
    assert len(maps) == 2 and all(block.requires_grad and block.shape == (3, 4, 17, 17) for block in maps)
    assert_close(maps[1].detach(), deepvit.analysis.attention_maps(model, images)[1])
    with pytest.raises(UserError, match="the model has 4"), record_maps(model, first=5):
        pass
