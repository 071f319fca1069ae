"""Maps are read from models that know nothing of it, and nothing in the models moves."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.models import vision_transformer
from torch import nn

import deepvit
from deepvit import analysis
from deepvit.errors import UserError
from deepvit.models import list_attentions

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, num_classes=5)


def tiny(attention="reattention", **settings):
    torch.manual_seed(0)
    model = deepvit.create_model("vit", **{**TINY, "attention": attention, **settings})
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0.05, 0.01)
        elif "running_var" in name:
            buffer.uniform_(1e-4, 2e-4)
    return model


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def timm_vit(**settings):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**TINY, **settings)


def eager_maps(model, x):
    """timm's own maps: its attention without the fused kernel, seen by a hook on the dropout behind the softmax."""
    seen, hooks = [], []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            hooks.append(module.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out)))
    with torch.no_grad():
        model.eval()(x)
    [hook.remove() for hook in hooks]
    return seen


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"},
                                      {"reg_tokens": 4}, {"block_fn": vision_transformer.ParallelScalingBlock},
                                      {"block_fn": vision_transformer.ResPostBlock}])
def test_timm_maps_are_timms_own(settings, images):
    model = timm_vit(**settings)
    ours = analysis.attention_maps(model, images)
    theirs = eager_maps(model, images)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", list_attentions())
@pytest.mark.parametrize("training", [True, False])
def test_reading_leaves_no_trace(attention, training, images):
    model = tiny(attention, attn_drop_rate=0.3, drop_rate=0.2, drop_path_rate=0.2).train(training)
    model.blocks[1].eval()  # a part that the user froze
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    first = analysis.attention_maps(model, images)
    again = analysis.attention_maps(model, images, batch_size=2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for a, b in zip(first, again):  # batches only bound the memory
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_maps_multiply_v(images):
    """The maps rebuild the model's own output, block by block."""
    model = tiny().eval()
    maps = analysis.attention_maps(model, images)
    with torch.no_grad():
        x = torch.cat([model.cls_token.expand(5, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
        for block, weights in zip(model.blocks, maps):
            x = x + block.attn.merge(weights @ block.attn.split(block.norm1(x))[2])
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(model.head(model.norm(x)[:, 0]), model(images), atol=1e-5, rtol=1e-4)


def test_softmax_stage(images):
    softmax = analysis.attention_maps(tiny(), images, stage="softmax")
    final = analysis.attention_maps(tiny(), images)
    assert all(torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5) for maps in softmax)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(softmax, final))


def test_recorded_tokens_and_logits(images):
    model = tiny()
    recording = analysis.record(model, images)
    assert len(recording.tokens) == 4 and len(recording.inputs) == 3
    with torch.no_grad():
        logits = model.eval()(images)
        torch.testing.assert_close(recording.logits, logits)
        torch.testing.assert_close(model.head(model.norm(recording.tokens[-1])[:, 0]), logits)


def test_compiled_and_autocast_models_are_read_in_full_precision(images):
    model = tiny()
    expected = analysis.attention_maps(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = analysis.attention_maps(torch.compile(model), images)
        similar = analysis.cross_layer_similarity(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, under_autocast))
    assert torch.equal(similar, analysis.cross_layer_similarity(expected))


def test_user_mistakes(images):
    with pytest.raises(UserError, match="no attention that can be read"):
        analysis.attention_maps(nn.Linear(3, 3), images)
    with pytest.raises(UserError, match="stage='mixed'"):
        analysis.attention_maps(tiny(), images, stage="mixed")
    with pytest.raises(UserError, match="img_size"):
        analysis.attention_maps(tiny(), images[..., :24])
    for looking in (analysis.attention_maps, partial(analysis.probe, matrix=True)):
        with pytest.raises(UserError, match="no images"):
            looking(tiny(), images[:0])


# Similarity: against loops, on made examples, by its invariances.

def loop_similarity(p, q):
    p, q = p.double().numpy(), q.double().numpy()
    B, H, N, _ = p.shape
    M = np.zeros((B, H, N))
    for b in range(B):
        for h in range(H):
            for t in range(N):
                u, v = p[b, h, :, t], q[b, h, :, t]
                M[b, h, t] = sum(u * v) / (sum(u * u) * sum(v * v)) ** 0.5
    return M


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 7, 7, generator=generator).mul(2).softmax(-1) for _ in range(5)]


def test_column_similarity_is_the_papers(maps):
    p, q = maps[:2]
    np.testing.assert_allclose(analysis.column_similarity(p, q), loop_similarity(p, q), atol=1e-6)


@pytest.mark.parametrize("held", [1, 2**28])
def test_all_pairs_and_adjacent_agree_with_loops(maps, held, monkeypatch):
    monkeypatch.setattr(analysis.similarity, "HELD_BYTES", held)  # 1: one block at a time, recomputed for each other
    expected = np.array([[loop_similarity(p, q).mean((0, 2)) for q in maps] for p in maps])  # [L, L, H]
    per_head = analysis.cross_layer_similarity(maps, per_head=True)
    np.testing.assert_allclose(per_head, expected.transpose(2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(analysis.cross_layer_similarity(maps), expected.mean(-1), atol=1e-6)
    adjacent = [expected[i, i + 1] for i in range(4)]
    np.testing.assert_allclose(analysis.adjacent_similarity(maps, per_head=True), adjacent, atol=1e-6)


def test_all_pairs_are_exact_for_many_images():
    """Millions of nearly equal products: summed one after the other in float32 they are off by a percent."""
    block = (1e-3 * torch.rand(64, 1, 197, 197)).softmax(-1)
    torch.testing.assert_close(analysis.cross_layer_similarity([block, block]), torch.ones(2, 2), atol=1e-6, rtol=0)


def test_similarity_invariances(maps):
    same = analysis.cross_layer_similarity([maps[0], maps[0] * 3, maps[0] * -0.2])
    torch.testing.assert_close(same, torch.tensor([[1., 1, -1], [1, 1, -1], [-1, -1, 1]]))
    rows = torch.randperm(7)  # queries in another order: columns permute alike, M stays
    torch.testing.assert_close(analysis.column_similarity(maps[0][:, :, rows], maps[1][:, :, rows]),
                               analysis.column_similarity(maps[0], maps[1]))


def test_similarity_by_hand():
    """Columns, not rows: both maps send token 0 to everyone in the same proportions, token 1 to opposite outputs."""
    p, q = torch.tensor([[[[1., 1.], [2., 0.]]]]), torch.tensor([[[[2., 0.], [4., 3.]]]])
    torch.testing.assert_close(analysis.column_similarity(p, q).flatten(), torch.tensor([1.0, 0.0]))


def test_centred_is_minus_one_over_n_for_softmax_maps(maps):
    torch.testing.assert_close(analysis.centred(maps[0]), maps[0] - 1 / 7)
    near_uniform = [torch.full((1, 1, 7, 7), 1 / 7) + 1e-4 * maps[i][:1, :1] for i in (0, 1)]
    assert analysis.column_similarity(*near_uniform).mean() > 0.999  # the confound that centring removes
    assert analysis.column_similarity(*map(analysis.centred, near_uniform)).mean() < 0.9


def test_similar_blocks(maps):
    chain = [maps[0], maps[0] * 2, maps[1], maps[1], maps[0]]
    assert analysis.similar_blocks(chain, 0.99) == 2  # 0-1 and 2-3
    assert analysis.similar_blocks(chain, 0.99, rule="earlier") == 3  # block 4 repeats block 0
    matrix = torch.tensor([[1.0, 0.95, 0.2], [0.95, 1.0, 0.9], [0.2, 0.9, 1.0]])
    assert analysis.similar_blocks(matrix) == 1  # 0.9 does not exceed 0.9
    assert analysis.similar_blocks(matrix.diagonal(1), threshold=0.5) == 2
    with pytest.raises(UserError, match="rule='any'"):
        analysis.similar_blocks(matrix, rule="any")


def test_similarity_of_a_model_streams(images):
    model = tiny()
    found = analysis.probe(model, images, batch_size=2, matrix=True)["similarity"]
    for stage in ("softmax", "final"):
        maps = analysis.attention_maps(model, images, stage)
        whole = analysis.cross_layer_similarity(maps)
        torch.testing.assert_close(torch.tensor(found[stage]["matrix"]), whole)
        torch.testing.assert_close(torch.tensor(found[f"{stage}_centred"]["matrix"]),
                                   analysis.cross_layer_similarity([analysis.centred(block) for block in maps]))


def test_head_similarity(maps):
    pairs = [loop_similarity(maps[0][:, [h]], maps[0][:, [g]]).mean() for h in range(3) for g in range(3) if h != g]
    assert analysis.head_similarity(maps[0]) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert analysis.head_similarity(maps[0][:, :1].repeat(1, 3, 1, 1)) == pytest.approx(1, abs=1e-6)
    assert analysis.head_similarity(maps[0][:, :1]) is None


def test_incomparable_maps(maps):
    with pytest.raises(UserError, match="same number of heads"):
        analysis.cross_layer_similarity([maps[0], maps[1][:, :2]])
