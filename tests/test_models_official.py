"""Our models against the published DeepViT code: logits, maps, training step, parameter counts."""

import pytest
import torch
from oracles import keys, oracle, part, synthetic_images, synthetic_state
from torch.testing import assert_close

import deepvit

SMALL = ["vit_plain", "reattn_fc", "reattn_fc_bn", "reattn_cnn_S", "reattn_cnn_L"]
# model of conf/model -> (the published name, its overrides here, parameters)
PUBLISHED = {
    "vit16": ("vit_plain_16", {}, 24_423_784),
    "vit24": ("vit_plain_24", {}, 36_257_128),
    "vit32": ("vit_plain_32", {}, 48_090_472),
    "deepvit16": ("deepvit_patch16_224_re_attn_16b", {}, 24_426_664),
    "deepvit24": ("deepvit_patch16_224_re_attn_24b", {}, 36_261_448),
    "deepvit32": ("deepvit_patch16_224_re_attn_32b", {}, 48_096_232),
    "deepvit32 without BatchNorm": ("reattn_fc_32_nobn", {"attention": "reattention_fc"}, 48_095_464),
    "deepvit_s": ("deepvit_S", {}, 27_312_632),
    "deepvit_l": ("deepvit_L", {}, 58_883_708),
    "deepvit_l_384": ("deepvit_L_384", {}, 59_043_308),
}


def _scalars(config: dict) -> dict:
    """What the tensors of an oracle do not tell."""
    head_dim = config["embed_dim"] // config["num_heads"]
    return {"num_heads": config["num_heads"], "residual_scale": config["scale_adjustment"],
            "map_scale": head_dim**-0.5 if config["transform_scale"] else 1.0}


def _published_name(ours: str) -> str:
    return ours.replace(".mix.", ".reatten_matrix.").replace("attn.norm.", "attn.var_norm.")


@pytest.fixture(scope="module", params=SMALL)
def case(request, tmp_path_factory):
    """(model built by `load_model` from the oracle's weights, the oracle's tensors)."""
    tensors, config = oracle(f"official/{request.param}")
    path = tmp_path_factory.mktemp("official") / f"{request.param}.pth"
    torch.save(part(tensors, "state"), path)
    return deepvit.load_model(path, dialect="deepvit", **_scalars(config)), tensors


@pytest.fixture
def model(case):
    """The model with its buffers put back after the test."""
    buffers = {name: buffer.clone() for name, buffer in case[0].named_buffers()}
    yield case[0].eval()
    for name, buffer in case[0].named_buffers():
        buffer.copy_(buffers[name])
    case[0].zero_grad()


@torch.no_grad()
def test_eval_logits_and_features(case, model):
    tensors = case[1]
    assert_close(model(tensors["input"]), tensors["logits"], atol=1e-5, rtol=0)
    assert_close(model.forward_features(tensors["input"])[:, 0], tensors["features"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("stage, prefix", [("final", "attn"), ("softmax", "attn_softmax")])
def test_attention_maps(case, model, stage, prefix):
    wanted = part(case[1], prefix) or part(case[1], "attn")  # without re-attention there is one stage
    for i, maps in enumerate(_maps(model, case[1]["input"], stage)):
        if str(i) in wanted:
            assert_close(maps[:1], wanted[str(i)], atol=2e-5, rtol=0)


@torch.no_grad()
def test_attention_maps_while_training(case, model):
    """On batch statistics; asking for the maps must not move them."""
    model.train()
    wanted = part(case[1], "attn_train") or part(case[1], "attn")  # equal where no norm has batch statistics
    for i, attention, x in _attention_inputs(model, case[1]["input"]):
        running = {name: buffer.clone() for name, buffer in attention.named_buffers()}
        assert_close(attention.weights(x)[:1], wanted[str(i)], atol=5e-5, rtol=0)
        for name, buffer in attention.named_buffers():
            assert torch.equal(buffer, running[name]), name


@pytest.mark.parametrize("norm_batch", [None, "all", 32])
def test_training_step(case, model, norm_batch):
    """Statistics of the whole batch, of a group that is the batch, and of one that it does not fill are the same."""
    tensors = case[1]
    for module in model.train().modules():
        if hasattr(module, "norm_batch"):
            module.norm_batch = len(tensors["input"]) if norm_batch == "all" else norm_batch
    logits = model(tensors["input"])
    assert_close(logits, tensors["logits_train"], atol=5e-5, rtol=0)
    loss = logits.square().mean()
    assert_close(loss.detach().view(1), tensors["loss_train"], atol=5e-5, rtol=0)
    loss.backward()
    gradients = {_published_name(name): parameter.grad for name, parameter in model.named_parameters()}
    for name, wanted in part(tensors, "grad").items():
        ours = gradients[name].reshape(-1, *wanted.shape[1:])[:len(wanted)]
        error = (ours - wanted).norm() / wanted.norm()
        assert error < 1e-3, f"{name}: {error:.2e}"
    buffers = {_published_name(name): buffer for name, buffer in model.named_buffers()}
    after = part(tensors, "state_after")
    assert set(after) <= set(buffers) and (not buffers or after)
    for name, wanted in after.items():
        assert_close(buffers[name].float(), wanted, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_names(name):
    published, overrides, count = PUBLISHED[name]
    with torch.device("meta"):
        model = deepvit.create_model(name.split()[0], **overrides)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    shapes = {_published_name(key): list(value.shape) + [1, 1] * key.endswith("mix.weight")
              for key, value in model.state_dict().items()}
    assert shapes == keys(published)


@torch.no_grad()
@pytest.mark.parametrize("name, best, spot", [
    ("deepvit_patch16_224_re_attn_32b", [595, 660], [-0.675563, -0.419787, 2.281249, -1.746969, 0.544185]),
    ("vit_plain_32", [585, 977], [-0.163420, 1.014825, 0.866226, 0.735510, 0.942578]),
    ("deepvit_L", [639, 945], [0.862403, -0.482200, -2.446386, -0.102502, -0.880626]),
])
def test_full_size_logits(name, best, spot, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(synthetic_state(keys(name)), path)
    model = deepvit.load_model(path, dialect="deepvit").eval()  # which named model it is, its shapes tell
    logits = model(synthetic_images())
    assert_close(logits, oracle(f"official/full_{name}")[0]["logits"], atol=1e-4, rtol=0)
    assert_close(logits[0, :5], torch.tensor(spot), atol=1e-4, rtol=0)
    assert logits.argmax(1).tolist() == best


def _attention_inputs(model, x):
    """(i, attention of block i, its input) along a forward pass, in the model's mode."""
    seen = []
    hooks = [block.attn.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
             for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return [(i, module, tokens) for i, (module, tokens) in enumerate(seen)]


def _maps(model, x, stage):
    return [attention.weights(tokens, stage) for _, attention, tokens in _attention_inputs(model, x)]
