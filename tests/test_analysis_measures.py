"""Each measure against a plain second implementation, its invariances and examples made by hand."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import deepvit
from deepvit import analysis
from deepvit.analysis import measures, plots
from deepvit.analysis.measures import MEASURES
from deepvit.analysis.similarity import SampledRows
from deepvit.analysis.study import Study
from deepvit.errors import UserError

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=4, num_classes=5)


def tiny(attention="reattention", **settings):
    torch.manual_seed(0)
    return deepvit.create_model("vit", **{**TINY, "attention": attention, **settings})


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, 3, 7, 7, generator=generator).mul(2).softmax(-1) for _ in range(4)]


UNIFORM, IDENTITY = torch.full((1, 1, 7, 7), 1 / 7), torch.eye(7)[None, None]


def test_entropy(maps):
    a = maps[0].double().numpy()
    rows = [[-sum(x * math.log(x) for x in a[b, h, i]) for b in range(2) for i in range(7)] for h in range(3)]
    expected = [sum(entropies) / 14 for entropies in rows]
    np.testing.assert_allclose(analysis.attention_entropy(maps[0]), expected, rtol=1e-5)
    assert analysis.attention_entropy(UNIFORM).item() == pytest.approx(math.log(7), rel=1e-6)
    assert analysis.attention_entropy(IDENTITY).item() == 0
    with pytest.raises(UserError, match="negative entries"):
        analysis.attention_entropy(-maps[0])


def test_distance(maps):
    a, grid = maps[0].double().numpy(), (2, 3)  # token 0 is the class token
    expected = np.zeros(3)
    for h in range(3):
        for b in range(2):
            for i in range(6):
                reach = [math.dist((i // 3, i % 3), (j // 3, j % 3)) for j in range(6)]
                row = a[b, h, 1 + i, 1:]
                expected[h] += np.dot(row, reach) / row.sum() / 12
    np.testing.assert_allclose(analysis.attention_distance(maps[0], grid), expected, rtol=1e-5)
    assert analysis.attention_distance(IDENTITY, grid).item() == 0
    neighbour = torch.eye(4).roll(1, 1)[None, None]  # on a line of 4: three steps of 1, one of 3
    assert analysis.attention_distance(neighbour, (1, 4)).item() == pytest.approx(6 / 4)


def test_effective_rank(maps):
    s = np.linalg.svd(maps[0].double().numpy(), compute_uv=False)
    expected = ((s**2).sum(-1) ** 2 / (s**4).sum(-1)).mean(0)
    np.testing.assert_allclose(analysis.effective_rank(maps[0]), expected, rtol=1e-5)
    np.testing.assert_allclose(analysis.effective_rank(maps[0] * -1e-4), expected, rtol=1e-5)
    assert analysis.effective_rank(IDENTITY).item() == pytest.approx(7)
    assert analysis.effective_rank(UNIFORM).item() == pytest.approx(1)


def test_token_similarity():
    tokens = torch.randn(2, 5, 8)
    pairs = [F.cosine_similarity(x[i], x[j], dim=0) for x in tokens for i in range(5) for j in range(5) if i != j]
    assert analysis.token_similarity(tokens) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert analysis.token_similarity(tokens[:, :1].repeat(1, 5, 1)) == pytest.approx(1, abs=1e-6)


def test_feature_cosine_and_cka():
    p, q = torch.randn(2, 30, 6), torch.randn(2, 30, 6)
    assert analysis.feature_cosine(p, q) == pytest.approx(float(F.cosine_similarity(p, q, dim=-1).mean()), abs=1e-6)
    x, y = p.flatten(0, 1), q.flatten(0, 1)[:, :4]
    H = np.eye(60) - 1 / 60  # by Gram matrices: HSIC(K, L) = tr(K H L H)
    K, L = (z.double().numpy() @ z.double().numpy().T for z in (x, y))
    hsic = lambda a, b: np.trace(a @ H @ b @ H)  # noqa: E731
    assert analysis.linear_cka(x, y) == pytest.approx(hsic(K, L) / (hsic(K, K) * hsic(L, L)) ** 0.5, rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert analysis.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-5)


def test_sampled_rows_are_the_same_in_any_batches():
    tokens = [torch.arange(12.0)[:, None, None] * 100 + torch.arange(15.0)[None, :, None] for _ in range(2)]
    whole, parts = SampledRows(12, rows=40), SampledRows(12, rows=40)
    whole.add(tokens)
    for chunk in zip(*(block.split(5) for block in tokens)):
        parts.add(chunk)
    assert torch.equal(whole.blocks()[1], parts.blocks()[1])
    places = whole.blocks()[0].flatten() % 100
    assert len(places) <= 40 and len(places.unique()) == 15  # every place of the image, not a few again and again


def test_rollout(maps):
    expected = np.eye(7)
    for block in maps:
        step = block[1].double().numpy().mean(0) + np.eye(7)
        expected = step / step.sum(1, keepdims=True) @ expected
    np.testing.assert_allclose(analysis.rollout(maps)[1], expected, atol=1e-6)
    rolled = analysis.rollout(maps)
    torch.testing.assert_close(analysis.rollout([block * -5 for block in maps]), rolled)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 7))
    mask = analysis.class_token_mask(rolled, (2, 3))
    assert mask.shape == (2, 2, 3) and mask.amax().item() == 1
    np.testing.assert_allclose(mask[1].flatten(), expected[0, 1:] / expected[0, 1:].max(), rtol=1e-5)


def test_thetas_and_diagonal_share():
    model = tiny(reattention_blocks=[1])
    first, second, third = analysis.thetas(model)
    assert first is None and third is None and torch.equal(second, model.blocks[1].attn.mix.weight)
    assert analysis.diagonal_share(torch.eye(5)) == 1
    assert analysis.diagonal_share(torch.ones(5, 5)) == pytest.approx(1 / 5)


@pytest.mark.parametrize("attention", ["reattention", "norm_only"])
def test_norm_variance_is_what_the_norm_measures(attention, images):
    """BatchNorm's own running variance after one step with momentum 1 (unbiased), from batches of any size."""
    model = tiny(attention, depth=1)
    measured = torch.tensor(analysis.probe(model, images, batch_size=2)["norm_variance"])
    norm = model.blocks[0].attn.norm
    norm.momentum = 1.0
    model.train()(images)
    n = 5 * 17**2
    torch.testing.assert_close(measured[0], norm.running_var.mean() * (n - 1) / n, rtol=1e-4, atol=0)
    assert analysis.norm_variance(tiny("self").blocks[0].attn, torch.zeros(1, 1, 1, 1)) is None
    half = analysis.probe(model.bfloat16(), images)["norm_variance"]
    torch.testing.assert_close(torch.tensor(half), measured, rtol=0.1, atol=0)


def test_probe_is_json_and_agrees_with_the_measures(images):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    result = analysis.probe(model, images, batch_size=2, matrix=True)
    assert torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads(json.dumps(result, allow_nan=False)) == result

    softmax, final = (analysis.attention_maps(model, images, stage) for stage in ("softmax", "final"))
    tokens = analysis.record(model, images).tokens
    for kind, blocks in {"softmax": softmax, "final": final, "final_centred": list(map(analysis.centred, final)),
                         "softmax_centred": list(map(analysis.centred, softmax))}.items():
        similarity, adjacent = result["similarity"][kind], analysis.adjacent_similarity(blocks)
        assert similarity["adjacent"] == pytest.approx(adjacent.tolist(), abs=1e-6)
        assert similarity["mean"] == pytest.approx(adjacent.mean().item(), abs=1e-6)
        assert similarity["similar_blocks"] == analysis.similar_blocks(blocks)
        np.testing.assert_allclose(similarity["matrix"], analysis.cross_layer_similarity(blocks), atol=1e-6)
        assert result["head_similarity"][kind] == pytest.approx([analysis.head_similarity(b) for b in blocks], abs=1e-5)
    assert result["entropy"] == pytest.approx([analysis.attention_entropy(b).mean().item() for b in softmax])
    assert result["distance"] == pytest.approx([analysis.attention_distance(b, (4, 4)).mean().item() for b in softmax])
    assert result["rank"]["final"] == pytest.approx([analysis.effective_rank(b).mean().item() for b in final], rel=1e-5)
    assert result["feature_cosine_first"][1] == pytest.approx(analysis.feature_cosine(tokens[0], tokens[2]), abs=1e-6)
    assert result["cka_adjacent"][2] == pytest.approx(analysis.linear_cka(*(t.flatten(0, 1) for t in tokens[2:])))
    assert (result["images"], result["tokens"], result["heads"], result["blocks"]) == (5, 17, 4, 3)


@pytest.mark.parametrize("attention", ["reattention", "reattention_ln"])
def test_no_measure_depends_on_how_images_are_batched(attention, images):
    model = tiny(attention, init_std=0.3)  # images differ in how sharply they are attended to
    model.train()(images)
    whole, parts = (analysis.probe(model, images, batch_size=size) for size in (5, 1))
    for name, measure in MEASURES.items():
        one, other = (result["similarity"][name.partition("/")[2]]["adjacent"] if name.startswith("similarity/")
                      else measure.found_in(result) for result in (whole, parts))
        np.testing.assert_allclose(np.array(other, float), np.array(one, float), rtol=1e-3, atol=1e-5, err_msg=name)


def test_probe_of_one_plain_block(images):
    result = analysis.probe(tiny("self", depth=1, num_heads=1), images[:1])
    assert result["similarity"]["final"] == {"adjacent": [], "mean": None, "similar_blocks": 0}
    assert result["head_similarity"]["final"] == [None] and result["theta_diagonal_share"] == [None]
    assert result["norm_eps"] == [None] and result["norm_variance"] == [None]


def test_block_norms(images):
    model, labels = tiny(drop_path_rate=0.3, drop_rate=0.1), torch.tensor([0, 1, 2, 3, 4])
    state, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    model.eval()
    loss = lambda logits: F.cross_entropy(logits, labels)  # noqa: E731
    table = analysis.block_norms(model, images, loss, training=False)
    assert torch.equal(torch.get_rng_state(), rng) and not model.training
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    x = (torch.cat([model.cls_token.expand(5, -1, -1), model.patch_embed(images)], 1) + model.pos_embed).detach()
    inputs = []
    for block in model.blocks:  # the same by hand: a second way through the model, with ordinary backward
        inputs.append(x.requires_grad_() if not inputs else x)
        inputs[-1].retain_grad()
        x = block(x)
    loss(model.forward_head(model.norm(x))).backward()
    rms = lambda t: t.detach().square().mean().sqrt().item()  # noqa: E731
    assert table["stream"] == pytest.approx([rms(t) for t in inputs], rel=1e-5)
    assert table["update"][2] == pytest.approx(rms(x - inputs[2]), rel=1e-5)
    assert table["update_ratio"][2] == pytest.approx(rms(x - inputs[2]) / rms(inputs[2]), rel=1e-5)
    assert table["attention"][1] == pytest.approx(rms(model.blocks[1].attn(model.blocks[1].norm1(inputs[1]))), rel=1e-5)
    assert table["gradient_stream"] == pytest.approx([t.grad.norm().item() for t in inputs], rel=1e-4)
    expected = [math.sqrt(sum(p.grad.square().sum().item() for p in block.parameters())) for block in model.blocks]
    assert table["gradient_weights"] == pytest.approx(expected, rel=1e-4)


def test_block_norms_in_training_leave_the_statistics(images):
    model = tiny(drop_rate=0.1)
    state, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    first = analysis.block_norms(model, images, lambda logits: logits.square().mean())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert analysis.block_norms(model, images, lambda logits: logits.square().mean()) == first
    with pytest.raises(UserError, match="no `blocks`"):
        analysis.block_norms(torch.nn.Linear(3, 3), torch.zeros(1, 3), torch.sum)


def test_at_initialisation(images):
    model = tiny("norm_only")
    with torch.no_grad():
        model.head.weight.fill_(7.0)
    rng = torch.get_rng_state()
    fresh, seen = (analysis.at_initialisation(model, seed=3, images=x) for x in (None, images))
    assert torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(3)
    expected = deepvit.create_model("vit", **{**TINY, "attention": "norm_only"}).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in fresh.state_dict().items())
    raw, centred = (analysis.probe(m, images)["similarity"]["final"]["mean"] for m in (fresh, seen))
    assert raw > 0.99 and abs(centred) < 0.3  # by construction, before any learning
    assert seen.blocks[0].attn.norm.momentum == 0.1
    with pytest.raises(UserError, match="does not say how it was built"):
        analysis.at_initialisation(torch.nn.Linear(3, 3))


def test_largest_logit_and_sink_mass():
    logits = torch.zeros(2, 3, 4, 4)
    logits[0, 1, 2, 3], logits[1, 0, 0, 0] = 5.0, -7.0
    assert measures.largest_logit(logits).tolist() == [5.0, 0.0]
    assert measures.sink_mass(UNIFORM).item() == pytest.approx(1 / 7)
    assert measures.class_token_mass(IDENTITY, torch.zeros(1)).item() == pytest.approx(1 / 7)
    sink = torch.zeros(1, 1, 4, 4)
    sink[..., :3, 2], sink[..., 3, 0] = 1.0, 1.0  # three of four queries look at token 2, one at the class token
    assert measures.sink_mass(sink).item() == 0.75
    assert measures.class_token_mass(sink, torch.zeros(1)).item() == 0.25


def test_rank_residual():
    """Against singular values where tokens differ in one direction, and its two ends."""
    same = torch.randn(2, 1, 6).repeat(1, 5, 1)
    assert measures.rank_residual(same).tolist() == pytest.approx([0, 0], abs=1e-6)
    apart = torch.eye(5)[None] - 1 / 5  # tokens whose mean is zero
    assert measures.rank_residual(apart).item() == pytest.approx(1)
    a, b = torch.randn(6), torch.randn(5)  # 1 a^T + (b - mean) c^T: |residual| is |b - mean| |c|
    b = b - b.mean()
    tokens = a + b[:, None] * torch.ones(6)
    expected = b.norm() * 6**0.5 / torch.linalg.svdvals(tokens).norm()
    assert measures.rank_residual(tokens[None]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_probe_has_the_logits_that_the_softmax_sees(images):
    for attention in ("self", "temperature", "temperature_decay", "talking_heads", "qk_norm"):
        maps = [analysis.attention_maps(tiny(attention), images, stage) for stage in ("logits", "softmax")]
        for logits, softmax in zip(*maps):
            torch.testing.assert_close(logits.softmax(-1), softmax)
    model = tiny("temperature")
    with torch.no_grad():
        model.blocks[0].attn.log_sharpness.fill_(math.log(3.0))
    logits = analysis.attention_maps(model, images, "logits")[0]
    assert analysis.probe(model, images, batch_size=2)["largest_logit"][0] == pytest.approx(
        logits.amax((1, 2, 3)).mean().item(), rel=1e-5)
    torch.testing.assert_close(logits.softmax(-1), analysis.attention_maps(model, images, "softmax")[0])


def test_branches_over_stream_are_those_of_the_block(images):
    model = tiny("self", init_values=0.5).eval()
    found = analysis.probe(model, images, batch_size=2)["branch_over_stream"]
    x = model._embed(images)
    block, rms = model.blocks[0], lambda tokens: tokens.square().mean((1, 2)).sqrt()
    branch = block.ls1(block.attn(block.norm1(x)))
    mlp = block.ls2(block.mlp(block.norm2(x + branch)))
    assert found["attention"][0] == pytest.approx((rms(branch) / rms(x)).mean().item(), rel=1e-4)
    assert found["mlp"][0] == pytest.approx((rms(mlp) / rms(x)).mean().item(), rel=1e-4)


def test_a_measure_is_one_function(images, monkeypatch):
    """What is registered stands in the probe, in the figures and in the images of a run, and nothing is left out."""
    mine = measures.Measure("mine/largest", ("softmax",), torch.amax, "Mine", "x")
    monkeypatch.setitem(MEASURES, "mine/largest", mine)
    result = analysis.probe(tiny("self"), images)
    assert result["mine"]["largest"] == [attn.max().item() for attn in analysis.attention_maps(
        tiny("self"), images, "softmax")]
    study = Study({}, {"name": "", "attention": "", "probe": result, "initial": None})
    assert "Mine" in [ax.get_title() for ax in plots.measures_with_depth([study]).axes]
    for name, one in MEASURES.items():
        pairs = name.startswith("similarity/")
        found = result["similarity"][one.name.partition("/")[2]]["adjacent"] if pairs else one.found_in(result)
        assert len(found) == 3 - pairs, name
    assert MEASURES["entropy"].found_in({}) == MEASURES["sink_mass/largest"].found_in({"sink_mass": []}) == []


def test_the_grid_is_that_of_the_images():
    """timm's dynamic_img_size: the model knows a grid, of other images."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, reg_tokens=3, dynamic_img_size=True)
    for size, grid in ((64, (4, 4)), (128, None)):
        (maps,) = analysis.attention_maps(model, torch.zeros(1, 3, size, size))
        assert analysis.patch_grid(model, maps.shape[-1]) == grid
