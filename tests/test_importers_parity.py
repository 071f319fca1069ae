"""The other implementations' files give their logits, maps and rollout here."""

import numpy as np
import pytest
import torch
from oracles import DATA, keys, oracle, part
from safetensors.torch import save_file
from scipy.ndimage import zoom
from torch.testing import assert_close

import deepvit
from deepvit.errors import UserError
from deepvit.importers.dialect import translate
from deepvit.importers.google import VIT_PYTORCH_NPZ_ROWS
from deepvit.importers.google import zoom as google_resize

NPZ = [("vit_plain", 32), ("vit_plain", 48), ("vit_plain", 24), ("vit_prelogits", 32), ("vit_hybrid", 32),
       ("vit_hybrid", 48)]
LUCIDRAINS = [("deepvit_lucidrains", 32), ("deepvit_lucidrains", 24), ("deepvit_lucidrains_mean", 32),
              ("deepvit_lucidrains_mid", 32), ("deepvit_lucidrains_legacy", 32)]
FLAX = [("deepvit_flax_cls", 32), ("deepvit_flax_cls", 24), ("deepvit_flax_mean", 32)]


def tolerance(case: str) -> float:
    return 1e-4 if case == "vit_hybrid" else 2e-5


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """case -> its weights as Google's .npz."""
    folder, written = tmp_path_factory.mktemp("npz"), {}

    def path(case: str):
        if case not in written:
            written[case] = folder / f"{case}.npz"
            np.savez(written[case], **{name: tensor.numpy() for name, tensor in part(oracle(f"other/{case}")[0],
                                                                                    "file").items()})
        return written[case]
    return path


@torch.no_grad()
@pytest.mark.parametrize("case, size", NPZ)
def test_vit_pytorch_logits_features_maps_and_rollout(npz, case, size):
    expected = part(oracle(f"other/{case}")[0], "io")
    x, limit = expected[f"s{size}_input_nchw"], tolerance(case)
    model = deepvit.load_model(npz(case), dialect="vit_pytorch", img_size=size).eval()
    assert_close(model(x), expected[f"s{size}_logits"], atol=limit, rtol=0)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(features, expected[f"s{size}_cls_feature"], atol=limit, rtol=0)
    maps = attention_maps(model, x)  # [L, B, H, N, N]
    assert_close(maps[:, :1], expected[f"s{size}_attention"], atol=limit, rtol=0)
    assert_close(rollout(maps), expected[f"s{size}_rollout"], atol=limit, rtol=0)
    if f"s{size}_pos_embedding" in expected:
        assert_close(model.pos_embed, expected[f"s{size}_pos_embedding"], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case, size", NPZ)
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_google_logits(npz, case, size, gelu):
    tensors = oracle(f"other/{case}")[0]
    expected = part(tensors, "google")[f"s{size}_logits_google" + ("_erf" if gelu == "erf" else "")]
    keywords = {} if gelu == "tanh" else {"gelu": "erf"}  # tanh is what the dialect takes by itself
    model = deepvit.load_model(npz(case), img_size=size, **keywords).eval()
    assert model.load_report.dialect == "google"
    assert_close(model(part(tensors, "io")[f"s{size}_input_nchw"]), expected, atol=tolerance(case), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case, size", FLAX)
@pytest.mark.parametrize("form", ["msgpack", "npz", "npz with params/"])
def test_flax_logits(tmp_path, case, size, form):
    tensors, config = oracle(f"other/{case}")
    path = DATA / f"other/{case}.msgpack"
    if form != "msgpack":
        tree = deepvit.importers.open_weights(path)
        prefix = "params/" if form == "npz with params/" else ""
        arrays = {prefix + name.removeprefix("params/"): tree.read(name).numpy() for name in tree.shapes}
        path = tmp_path / "params.npz"
        np.savez(path, **arrays)
    model = deepvit.load_model(path, img_size=size, pool=config["config"]["pool"]).eval()
    assert model.load_report.dialect == "deepvit_flax"
    x = part(tensors, "io")[f"s{size}_input_nhwc"].permute(0, 3, 1, 2)
    assert_close(model(x), part(tensors, "io")[f"s{size}_logits"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case, size", LUCIDRAINS)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_lucidrains_logits(tmp_path, case, size, form):
    tensors, config = oracle(f"other/{case}")
    path = tmp_path / f"state.{form}"
    (torch.save if form == "pt" else save_file)(part(tensors, "file"), path)
    model = deepvit.load_model(path, img_size=size, pool=config["config"]["pool"]).eval()
    assert model.load_report.dialect == "lucidrains"
    expected = part(tensors, "io")
    assert_close(model(expected[f"s{size}_input_nchw"]), expected[f"s{size}_logits"], atol=2e-5, rtol=0)


def test_flax_readme_constructor():
    """DeepViT-flax's README: 256 px, patch 32, dim 1024, depth 6, 16 heads, mlp 2048 (docs/flax.md)."""
    model = deepvit.create_model(
        "vit", img_size=256, patch_size=32, num_classes=1000, embed_dim=1024, depth=6, num_heads=16, head_dim=64,
        mlp_ratio=2.0, qkv_bias=False, attention="reattention_ln", gelu="tanh", final_norm="after_pool")
    assert sum(parameter.numel() for parameter in model.parameters()) == 54_623_912
    assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 1000)


def test_finetuning_trajectory(npz):
    """ViT-pytorch's rule: the schedule steps before the optimizer, so the k-th update has lr * multiplier(k)."""
    tensors, config = oracle("other/finetune")
    io = part(tensors, "io")
    model = deepvit.load_model(npz("finetune"), dialect="vit_pytorch", head="zero", num_classes=5).train()
    assert "head/kernel" in model.load_report.dropped
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config["momentum"])
    accumulation = config["accumulation"]
    for update in range(config["updates"]):
        optimizer.param_groups[0]["lr"] = float(io["lr"][update])
        for i in range(update * accumulation, (update + 1) * accumulation):
            loss = torch.nn.functional.cross_entropy(model(io["x_nchw"][i]), io["y"][i].long())
            assert abs(loss.item() - io["micro_loss"][i].item()) < 1e-5, (update, i)
            (loss / accumulation).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"])
        assert abs(norm.item() - io["grad_norm_before_clip"][update].item()) < 1e-5, update
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert_close(model(io["x_nchw"][0]), io["final_logits_microbatch0"], atol=1e-5, rtol=0)
    assert_close(model.head.weight.detach(), io["final_head_weight"], atol=1e-5, rtol=0)
    assert_close(model.head.bias.detach(), io["final_head_bias"], atol=1e-5, rtol=0)
    assert_close(model.cls_token.detach(), io["final_cls_token"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, published, backbone", [
    ("vit_b16", "ViT-B_16", 85_798_656), ("vit_b32", "ViT-B_32", 87_455_232), ("vit_l16", "ViT-L_16", 303_301_632),
    ("vit_l32", "ViT-L_32", 305_510_400), ("vit_h14", "ViT-H_14", 630_764_800),
    ("r50_vit_b16", "R50+ViT-B_16", 97_890_112)])
def test_named_models_take_googles_files(name, published, backbone):
    """Parameters without the head as published, and every name and shape of the released file has its place."""
    with torch.device("meta"):
        model = deepvit.create_model(name)
    head = sum(parameter.numel() for parameter in model.head.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) - head == backbone
    shapes = {key: torch.Size(shape) for key, shape in keys(published).items()}
    steps, _ = translate(VIT_PYTORCH_NPZ_ROWS, shapes, published)
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    assert {key: step.shape for key, step in steps.items() if not key.startswith("head.")} == wanted


def test_vit_pytorch_bin(npz, tmp_path):
    """What ViT-pytorch saves: its own names, q, k, v apart. The arrays are the .npz ones, renamed by its table."""
    tensors = oracle("other/vit_plain")[0]
    path = tmp_path / "cifar10_checkpoint.bin"
    torch.save(as_vit_pytorch(part(tensors, "file")), path)
    with pytest.raises(UserError, match="num_heads"):
        deepvit.load_model(path)
    model = deepvit.load_model(path, num_heads=4).eval()
    assert model.load_report.dialect == "vit_pytorch"
    io = part(tensors, "io")
    with torch.no_grad():
        assert_close(model(io["s32_input_nchw"]), io["s32_logits"], atol=2e-5, rtol=0)


def test_resize_is_scipys_zoom_or_refused():
    """All square pairs from 2..32 to 2..48: the 35 where scipy leaves zeros are refused, the others equal."""
    generator = np.random.default_rng(0)
    refused = []
    for old in range(2, 33):
        grid = generator.standard_normal((old, old, 2)).astype(np.float32)
        pos = torch.cat([torch.zeros(1, 1, 2), torch.from_numpy(grid.reshape(1, -1, 2))], dim=1)
        for new in range(2, 49):
            if new == old:
                continue
            zoomed = zoom(grid, (new / old, new / old, 1), order=1)
            if not zoomed[-1].any():
                refused.append((old, new))
                assert not zoomed[-1].any() and not zoomed[:, -1].any()
                with pytest.raises(UserError, match="zero"):
                    google_resize(pos, (old, old), (new, new))
            else:
                assert_close(google_resize(pos, (old, old), (new, new))[0, 1:],
                             torch.from_numpy(zoomed.reshape(-1, 2)), atol=5e-5, rtol=0)
    assert len(refused) == 35 and (16, 30) in refused and (14, 24) not in refused


def as_vit_pytorch(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Google's arrays under ViT-pytorch's names, as that code's own loader transforms them."""
    state = {"transformer.embeddings.cls_token": arrays["cls"],
             "transformer.embeddings.position_embeddings": arrays["Transformer/posembed_input/pos_embedding"],
             "transformer.embeddings.patch_embeddings.weight": arrays["embedding/kernel"].permute(3, 2, 0, 1),
             "transformer.embeddings.patch_embeddings.bias": arrays["embedding/bias"],
             "head.weight": arrays["head/kernel"].t(), "head.bias": arrays["head/bias"],
             "transformer.encoder.encoder_norm.weight": arrays["Transformer/encoder_norm/scale"],
             "transformer.encoder.encoder_norm.bias": arrays["Transformer/encoder_norm/bias"]}
    width = arrays["cls"].shape[-1]
    for i in range(sum(name.endswith("LayerNorm_0/scale") for name in arrays)):
        old, new = f"Transformer/encoderblock_{i}", f"transformer.encoder.layer.{i}"
        for part_ in ("query", "key", "value", "out"):
            dense = f"{old}/MultiHeadDotProductAttention_1/{part_}"
            state[f"{new}.attn.{part_}.weight"] = arrays[f"{dense}/kernel"].reshape(width, width).t()
            state[f"{new}.attn.{part_}.bias"] = arrays[f"{dense}/bias"].reshape(-1)
        for norm, name in (("LayerNorm_0", "attention_norm"), ("LayerNorm_2", "ffn_norm")):
            state[f"{new}.{name}.weight"] = arrays[f"{old}/{norm}/scale"]
            state[f"{new}.{name}.bias"] = arrays[f"{old}/{norm}/bias"]
        for dense, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            state[f"{new}.ffn.{name}.weight"] = arrays[f"{old}/MlpBlock_3/{dense}/kernel"].t()
            state[f"{new}.ffn.{name}.bias"] = arrays[f"{old}/MlpBlock_3/{dense}/bias"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def attention_maps(model, x: torch.Tensor) -> torch.Tensor:
    """Final maps of every block, `[L, B, H, N, N]`."""
    maps = []
    hooks = [block.attn.register_forward_pre_hook(lambda module, args: maps.append(module.weights(args[0])))
             for block in model.blocks]
    model(x)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def rollout(maps: torch.Tensor) -> torch.Tensor:
    """ViT-pytorch's notebook: mean over heads, plus identity, rows renormalised, multiplied up; class-token row."""
    mixed = maps.mean(2) + torch.eye(maps.shape[-1])  # [L, B, N, N]
    mixed = mixed / mixed.sum(-1, keepdim=True)
    result, side = mixed[0], int((maps.shape[-1] - 1) ** 0.5)
    masks = []
    for i in range(len(mixed)):
        result = mixed[i] @ result if i else result
        masks.append(result[:, 0, 1:].reshape(-1, side, side))
    return torch.stack(masks)  # [L, B, rows, columns]
