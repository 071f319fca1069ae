"""A model with something taken away, against the same thing by hand; and afterwards it is what it was."""

import pytest
import torch
from torch.testing import assert_close

import deepvit
from deepvit.analysis.ablation import ablations, with_theta, without_block
from deepvit.errors import UserError

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, num_classes=5)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tiny(attention, **settings):
    torch.manual_seed(0)
    return deepvit.create_model("vit", **{**TINY, "attention": attention, "init_std": 0.2, **settings}).eval()


@torch.no_grad()
@pytest.mark.parametrize("share_maps", [1, 3])
def test_a_block_left_out(images, share_maps):
    model = tiny("self", share_maps=share_maps)
    whole = model(images)
    x = start = model._embed(images)
    x = model.blocks[1](x, *[model.blocks[0].shared(start)] * (share_maps > 1))  # a leader's maps stay
    x = model.blocks[2](x, *[model.blocks[0].shared(start)] * (share_maps > 1))
    with without_block(model, 0):
        assert_close(model(images), model.forward_head(model.norm(x)))
    assert torch.equal(model(images), whole)


@torch.no_grad()
def test_theta_replaced(images):
    model, free = tiny("reattention"), tiny("norm_only")
    whole, state = model(images), {name: value.clone() for name, value in model.state_dict().items()}
    for block in model.blocks:
        block.attn.mix.bias.zero_()
    with with_theta(model, "identity"):
        assert_close(model(images), free(images))  # the arms are paired: all other weights are the same
    with with_theta(model, "diagonal"):
        theta = model.blocks[1].attn.mix.weight
        assert torch.equal(theta, torch.diag(state["blocks.1.attn.mix.weight"].diagonal()))
    model.load_state_dict(state)
    assert torch.equal(model(images), whole)


def test_the_forms_and_what_is_refused():
    assert list(ablations(tiny("self"), "blocks")) == [f"without block {i}" for i in range(3)]
    assert list(ablations(tiny("reattention"), "theta")) == ["theta diagonal", "theta identity"]
    with pytest.raises(UserError, match="ablate=theta"):
        ablations(tiny("norm_only"), "theta")
    with pytest.raises(UserError, match="ablate=heads"):
        ablations(tiny("self"), "heads")
