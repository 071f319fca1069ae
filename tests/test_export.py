"""Exports read back by whoever will use them: ourselves, timm, onnxruntime, the published layout."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from oracles import DATA, keys, oracle, part
from torch.testing import assert_close

import deepvit
from deepvit.commands.export import FORMS, export
from deepvit.commands.main import main
from deepvit.errors import Failure, UserError
from deepvit.importers import deepvit as published
from deepvit.importers.dialect import write

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 3}
needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
                                reason="needs pip install 'deepvit[onnx]'")


def make_run(folder, ema: bool = False, **settings):
    """A run folder as training leaves it, of a model that has taken a step (so no buffer is at its start)."""
    torch.manual_seed(0)
    model = deepvit.create_model("vit", **SMALL | settings)
    model.train()(torch.randn(4, *model.input_size))
    averaged = {"ema": {name: tensor * 0.5 for name, tensor in model.state_dict().items()}} if ema else {}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"format": "deepvit", "version": 1, "model": model.state_dict(), **averaged, "config": model.config,
                "classes": ["ant", "bee", "cat"]}, folder / "checkpoints" / "best.pt")
    (folder / "config.yaml").write_text("seed: 3\noptimizer:\n  name: adamw\n  lr: 0.001\nschedule:\n  epochs: 2\n")
    lines = [{"step": 10, "epoch": 1.0, "loss": 1.0, "lr": 0.1}] + [
        {"step": step, "epoch": step / 10, "top1": 30.0 + step, "top5": 99.0, "loss": 1 / step, "n": 90}
        for step in range(1, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.json").write_text(json.dumps({
        "top1": 69.0, "top5": 99.0, "top1_low": 60.0, "top1_high": 77.0, "loss": 0.5, "n": 90, "data": "insects",
        "git": "abc123", "versions": {"torch": "2.15.0"}, "best_top1": 69.5, "best_step": 38}))
    return model.eval(), folder


def test_an_export_replaces_earlier_exports_alone(tmp_path):
    _, run = make_run(tmp_path / "run")
    for mine in ("best.safetensors", "best.safetensors.md"):
        (path := run / "checkpoints" / mine).write_text("mine")
        with pytest.raises(UserError, match=f"{mine} is there already.*--out"):
            export(run, "safetensors")
        assert path.read_text() == "mine"
        path.unlink()
    assert export(run, "safetensors").path == export(run, "safetensors").path


def test_exports_of_different_sources_are_different_files(tmp_path, monkeypatch):
    """By default too: names with dots, without a suffix, and names whose files are called alike."""
    _, run = make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for place in ("w-0.1.pt", "w-0.2.pt", "w.pth.tar", "w-0.3", "a/one.b/pytorch_model.bin",
                  "a/two.b/pytorch_model.bin"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "checkpoints" / "best.pt", place)
    names = [str(export(source, "safetensors").path)
             for source in ("w-0.1.pt", "w-0.2.pt", "w.pth.tar", "w-0.3", "local-dir:a/one.b", "local-dir:./a/two.b")]
    assert names == [f"{name}.safetensors" for name in ("w-0.1", "w-0.2", "w", "w-0.3", "a-one.b", "a-two.b")]


def test_an_export_that_computes_no_numbers_fails_and_is_not_kept(tmp_path, monkeypatch):
    """Also where it does so for several images alone. What it left would be in the way of the next."""
    def write(model, path):
        path.write_text("wrong")
        return lambda x: model(x) * (1.0 if len(x) == 1 else float("nan")), "read back", ""

    _, run = make_run(tmp_path / "run")
    monkeypatch.setitem(FORMS, "onnx", (write, "onnx"))
    with pytest.raises(Failure, match="differ by nan"):
        export(run, "onnx", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_safetensors_of_a_run_and_its_card(tmp_path):
    model, run = make_run(tmp_path / "run", attention="reattention", reattention_blocks=[1], map_scale=0.5)
    done = export(run, "safetensors")
    assert done.path == run / "checkpoints" / "best.safetensors" and done.difference == 0
    assert torch.equal(deepvit.load_model(run).head.weight, model.head.weight)  # a run folder is its best.pt
    again = deepvit.load_model(done.path).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x)) and again.config == model.config
    assert again.load_report.said["classes"] == ["ant", "bee", "cat"]
    card = re.sub(" +", " ", done.card.read_text())
    for told in ("69.00", "60.00 to 77.00", "insects", "abc123", "2.15.0", "adamw", "ant, bee, cat", "reattention",
                 "16 x 16 pixels", "size / 0.9 (bicubic)", "mean (0.5, 0.5, 0.5) over std (0.5, 0.5, 0.5)",
                 "| 1 | 0.1 | 31.00", "| 39 | 3.9 | 69.00", "difference of logits 0.0e+00"):
        assert told in card, told
    assert card.count("\n| ") < 80


def test_the_card_of_a_best_checkpoint_has_its_own_evaluation(tmp_path):
    _, run = make_run(tmp_path / "run")
    best = run / "checkpoints" / "best.pt"
    torch.save({**torch.load(best), "metrics": {"top1": 71.25, "top5": 99.0, "loss": 0.4, "n": 90}}, best)
    card = re.sub(" +", " ", export(run, "safetensors").card.read_text())
    assert "Of `best.pt`" in card and "| 71.25 |" in card and "| 69.00 | 60.00" not in card


@pytest.mark.parametrize(("step", "is_measured"), [(39, True), (20, False)])
def test_a_card_has_no_numbers_of_another_step(tmp_path, step, is_measured):
    """Weights that `engine.keep_epochs` kept on the way were not evaluated at the end."""
    _, run = make_run(tmp_path / "run")
    (run / "metrics.json").write_text(json.dumps({**json.loads((run / "metrics.json").read_text()), "steps": 39}))
    kept = run / "checkpoints" / f"step-{step}.pt"
    torch.save({**torch.load(run / "checkpoints" / "best.pt"), "step": step}, kept)
    assert ("| 69.00 | 60.00" in re.sub(" +", " ", export(kept, "safetensors").card.read_text())) == is_measured


def test_a_card_has_no_numbers_of_another_model(tmp_path):
    """A run with a moving average measures that; positions made for other images are another model's, as are another
    attention and another head."""
    _, run = make_run(tmp_path / "run", ema=True)
    with (run / "config.yaml").open("a") as file:
        file.write("ema:\n  decay: 0.9\n")
    for number, (options, is_measured) in enumerate((({}, True), ({"weights": "raw"}, False),
                                                     ({"attention": "contrast"}, False), ({"head": "zero"}, False),
                                                     ({"img_size": 24}, False))):
        done = export(run, "safetensors", tmp_path / f"{number}.safetensors", **options)
        assert ("| 69.00 | 60.00" in re.sub(" +", " ", done.card.read_text())) == is_measured
    assert "pos_embed 4x4 -> 6x6" in done.card.read_text()


def test_averaged_weights_are_taken_unless_asked_otherwise(tmp_path):
    model, run = make_run(tmp_path / "run", ema=True)
    x = torch.randn(2, 3, 16, 16)
    raw = export(run, "safetensors", tmp_path / "raw.safetensors", weights="raw").path
    assert torch.equal(deepvit.load_model(raw).eval()(x), model(x))
    ema = deepvit.load_model(export(run, "safetensors", tmp_path / "ema.safetensors").path)
    assert torch.equal(ema.head.weight, model.head.weight * 0.5)


@pytest.mark.parametrize("settings", [{}, {"attention": "reattention", "qk_scale": 0.3},
                                      {"attention": "reattention", "stem": "conv", "residual_scale": 0.5,
                                       "map_scale": 6**-0.5, "reattention_blocks": "-1:"},
                                      {"attention": "reattention", "img_size": [8, 32]}, {"attention": "self_sharp"}],
                         ids=["plain", "reattention", "conv stem", "2x8 patches", "qk_scale of the attention"])
def test_published_layout(tmp_path, settings):
    model, run = make_run(tmp_path / "run", **settings)
    done = export(run, "deepvit", tmp_path / "out.pth.tar")
    assert done.difference == 0
    state = torch.load(done.path, weights_only=True)["state_dict"]
    assert ("blocks.1.attn.reatten_matrix.weight" in state) == (settings.get("attention") == "reattention")


@pytest.mark.parametrize("name, changes, arch", [
    *((name, {}, arch) for arch, name in published.ARCHS.items() if arch != "deepvit_L_384"),
    ("deepvit_l_384", {}, "deepvit_L_384"), ("deepvit16", {"num_classes": 7}, "deepvit_patch16_224_re_attn_16b"),
    ("deepvit16", {"drop_path_rate": 0.2, "attention": "reattention_identity", "img_size": [224, 224]},
     "deepvit_patch16_224_re_attn_16b"),
    *((name, {}, None) for name in ("vit16", "vit24", "vit32")),
    *(("deepvit16", change, None) for change in (
        {"attention": "reattention_fc"}, {"qkv_bias": False}, {"in_chans": 1}, {"img_size": 384},
        {"img_size": [112, 448]}, {"mlp_ratio": 4.0}, {"qk_scale": 0.1}, {"residual_scale": 0.5},
        {"reattention_blocks": "-3:"}, {"num_heads": 6}, {"map_scale": 0.5}, {"stem": "conv"}))])
def test_a_published_name_is_for_what_its_function_loads(name, changes, arch):
    """The published functions' names and shapes are in `keys`, for those whose lists we have."""
    with torch.device("meta"):
        model = deepvit.create_model(name, **changes)
    found = [arch for arch, ours in published.ARCHS.items() if published.is_named(ours, model)]
    assert found == ([arch] if arch else [])
    if arch and not changes:
        theirs = write(published.ROWS, model.state_dict(), "deepvit")
        assert {key: list(tensor.shape) for key, tensor in theirs.items()} == keys(arch)


def test_files_have_the_mode_of_the_umask(tmp_path):
    _, run = make_run(tmp_path / "run")
    before = os.umask(0o027)
    try:
        for to in ("safetensors", "timm", "deepvit"):
            done = export(run, to)
            assert {path.stat().st_mode & 0o777 for path in (done.path, done.card)} == {0o640}, to
    finally:
        os.umask(before)


@pytest.mark.parametrize("settings", [{"num_heads": 3, "init_values": 0.1, "pool": "avg", "final_norm": "after_pool"},
                                      {"attention": "reattention", "stem": "conv", "img_size": [16, 32]},
                                      {"in_chans": 1}], ids=["a ViT of timm's", "ours", "grey"])
def test_a_folder_for_the_hub_loads_in_timm(tmp_path, settings):
    model, run = make_run(tmp_path / "run", **settings)
    done = export(run, "hub-folder", tmp_path / "mine")
    assert done.difference == 0
    theirs = timm.create_model(f"local-dir:{tmp_path}/mine", pretrained=True).eval()
    x = torch.randn(2, *model.input_size)
    assert torch.equal(theirs(x), model(x)) and isinstance(theirs, deepvit.ViT) == ("attention" in settings)
    assert deepvit.load_model(tmp_path / "mine").load_report.said["classes"] == ["ant", "bee", "cat"]
    card = done.card.read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm" and str(tmp_path) not in card
    monkey = {"timm": timm, "deepvit": deepvit}
    code = card.split("```")[1].removeprefix("python").replace("local-dir:mine", f"local-dir:{tmp_path}/mine")
    exec(code, monkey)
    assert torch.equal(monkey["model"](x), model(x)) and monkey["transform"]
    export(run, "hub-folder", tmp_path / "mine")  # its own files are replaced, others' not
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--out.*other files"):
        export(run, "hub-folder", tmp_path / "mine")


def test_a_folder_for_the_hub_crops_images_as_its_card_says(tmp_path):
    """Above 224 pixels nothing is cut off where the file says nothing, unlike for timm's own model of that name."""
    _, run = make_run(tmp_path / "run", img_size=240, patch_size=80)
    done = export(run, "hub-folder", tmp_path / "mine")
    config = json.loads((done.path / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_pct"] == 1.0 and "resized to size / 1 (" in done.card.read_text()


@pytest.mark.parametrize("to", ["safetensors", pytest.param("onnx", marks=needs_onnx)])
def test_the_card_of_a_grey_model_asks_for_one_channel(tmp_path, to):
    card = export(make_run(tmp_path / "run", in_chans=1)[1], to).card.read_text()
    assert "grey from 0 to 1 less mean (0.5,) over std (0.5,)" in card and "RGB" not in card and "[B, 3," not in card


@pytest.mark.parametrize("to", ["safetensors", "timm", "deepvit"])
def test_the_card_tells_how_to_load(tmp_path, monkeypatch, to):
    """Positions of 2x8 patches are as many as a square's."""
    model, run = make_run(tmp_path / "run", num_heads=3, img_size=[8, 32])
    done = export(run, to)
    monkeypatch.chdir(done.path.parent)
    found = {}
    exec(done.card.read_text().split("```")[1].removeprefix("python"), found)
    x = torch.randn(2, 3, *model.img_size)
    assert_close(found["model"].eval()(x), model(x), atol=1e-6, rtol=0)


def test_published_checkpoint_there_and_back(tmp_path):
    """From their file to ours and back: the very tensors, under the very names."""
    path = DATA / "official/ckpt_full.pth.tar"
    deepest = export(path, "safetensors", tmp_path / "ours.safetensors", weights="raw").path
    back = export(deepest, "deepvit", tmp_path / "back.pth.tar").path
    theirs, ours = torch.load(back, weights_only=True)["state_dict"], deepvit.importers.open_weights(path)
    assert theirs.keys() == ours.shapes.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours.read(name)), name
    tensors = oracle("official/ckpt_expected")[0]
    with torch.no_grad():
        assert_close(deepvit.load_model(back).eval()(tensors["input"]), tensors["logits"], atol=1e-5, rtol=0)
    assert part(tensors, "state") == {}


@pytest.mark.parametrize("settings", [{}, {"pool": "avg", "final_norm": "after_pool", "init_values": 0.1}],
                         ids=["class token", "average"])
def test_timm_takes_it(tmp_path, settings):
    model, run = make_run(tmp_path / "run", **settings)
    done = export(run, "timm", tmp_path / "vit.safetensors")
    assert done.difference < 1e-5
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4, num_classes=3, mlp_ratio=3,
        global_pool="avg" if settings else "token", init_values=settings.get("init_values"))
    timm.models.load_checkpoint(theirs, str(done.path))
    x = torch.randn(2, 3, 16, 16)
    assert_close(theirs.eval()(x), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("to, settings, named", [
    ("timm", {"attention": "reattention"}, "re-attention"), ("timm", {"residual_scale": 0.5}, "residual_scale"),
    ("timm", {"pool": "mean"}, "pool='mean'"), ("timm", {"gelu": "tanh"}, "gelu"),
    ("timm", {"attention": "self_sharp"}, "qk_scale=2.0"),
    ("deepvit", {"attention": {"class": "SelfAttention", "head_dim": 5}}, "head_dim=5"),
    ("timm", {"attention": {"class": "SelfAttention", "num_heads": 6}, "reattention_blocks": [1]}, "all blocks"),
    ("deepvit", {"attention": "self_sharp", "reattention_blocks": [1]}, "all blocks"),
    ("deepvit", {"attention": "norm_only"}, "norm_only"), ("deepvit", {"pool": "avg"}, "pool"),
    ("deepvit", {"attention": "reattention_ln"}, "reattention_ln"),
    ("deepvit", {"attention": "reattention_fc"}, "reattention_fc"),
    ("deepvit", {"attention": "reattention", "map_scale": 0.2}, "map_scale")])
def test_what_a_form_cannot_hold_is_refused(tmp_path, to, settings, named):
    _, run = make_run(tmp_path / "run", **settings)
    with pytest.raises(UserError, match=named):
        export(run, to, tmp_path / "out")


@needs_onnx
@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow, id="self"),
                                      pytest.param({"attention": "reattention", "stem": "conv"}, id="reattention")])
def test_onnx_runs_with_any_batch(tmp_path, settings):
    import onnxruntime
    model, run = make_run(tmp_path / "run", **settings)
    done = export(run, "onnx", tmp_path / "model.onnx")
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16)
        (logits,) = session.run(None, {"pictures": x.numpy()})
        assert_close(torch.from_numpy(logits), model(x).detach(), atol=1e-4, rtol=0)


def test_command_line(tmp_path, capsys):
    _, run = make_run(tmp_path / "run")
    assert main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "m.safetensors")]) == 0
    assert "largest difference of logits 0.0e+00" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "none"), "--to", "timm"]) == 2
    assert main(["export", str(tmp_path), "--to", "timm"]) == 2
    assert main(["export", str(run), "--to", "safetensors", "--out", str(run / "config.yaml" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 3
    for to in ("safetensors", "deepvit"):
        assert main(["export", str(run), "--to", to, "--out", "/proc/x"]) == 2
        assert main(["export", str(run), "--to", to, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("--out") == 4
    assert main(["export", str(run), "--to", "safetensors", "--weights", "ema"]) == 2
    assert "weights=raw" in capsys.readouterr().err
