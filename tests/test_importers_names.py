"""Weights by a name that stands where a path does: `timm:`, `hf-hub:`, `google:`, `local-dir:`, `deepvit:`."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import DATA
from oracles import oracle, part
from PIL import Image
from torch.testing import assert_close

import deepvit
from deepvit.commands.export import export
from deepvit.errors import UserError
from deepvit.importers import locate
from deepvit.run import evaluate


def tiny_of_timm(folder: Path):
    """A folder as timm writes it for the hub."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    timm.models.save_for_hf(theirs, folder, safe_serialization=True)
    return theirs


def test_a_folder_of_the_hub(tmp_path):
    theirs = tiny_of_timm(tmp_path)
    model = deepvit.load_model(f"local-dir:{tmp_path}").eval()
    assert model.config["num_heads"] == 3
    x = torch.randn(1, 3, 32, 32)
    assert_close(model(x), theirs(x), atol=1e-5, rtol=0)
    assert evaluate.checkpoints([f"local-dir:{tmp_path}"]) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("name, message", [
    ("timm:vit_tyni_patch16_224", "Did you mean"), ("timm:vit_small_patch16_224.mine", "no weights on"),
    ("hf-hub:a/b/c", "cannot be fetched"),
    ("hf-hub:owner/name", "cannot be fetched.*OfflineModeIsEnabled.*give the path"),
    ("local-dir:/nowhere", "/nowhere"), ("deepvit:../x", "came with the package"),
    ("google:ViT-B_16", "COLLECTION/NAME"), ("google:../../x", "COLLECTION/NAME"),
    ("google:imagenet21k/ViT-X_1", "http://127.0.0.1:9/imagenet21k/ViT-X_1.npz .*give the file's path")])
def test_names_that_lead_nowhere(monkeypatch, tmp_path, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("deepvit.importers.locate.GOOGLE", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=message) as refusal:
        deepvit.load_model(name)
    assert "\n" not in str(refusal.value)


def test_the_released_weights_see():
    """Of three images a class, at an accuracy of 80 %, fewer than 19 are right once in a hundred such sheets."""
    model = deepvit.load_model("deepvit:vit6_cifar10").eval()
    sheet = np.asarray(Image.open(DATA / "cifar10.png"), dtype=np.float32)  # [3 32, 10 32, 3], a column a class
    images = torch.from_numpy(sheet).view(3, 32, 10, 32, 3).permute(2, 0, 4, 1, 3).flatten(0, 1) / 127.5 - 1
    assert int((model(images).argmax(dim=1) == torch.arange(10).repeat_interleave(3)).sum()) >= 19
    card = (locate.RELEASED / "vit6_cifar10.md").read_text()
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card and "cat, deer" in card


def test_weights_that_came_with_the_package(monkeypatch, tmp_path):
    model = deepvit.create_model("vit", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=4)
    deepvit.save_model(model, tmp_path / "tiny.safetensors")
    monkeypatch.setattr("deepvit.importers.locate.RELEASED", tmp_path)
    assert deepvit.load_model("deepvit:tiny").config["depth"] == 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export("deepvit:tiny", "safetensors").path.resolve() == tmp_path / "here" / "tiny.safetensors"
    for name in ("deepvit:tiyn", "tiny"):
        with pytest.raises(UserError, match="Did you mean 'deepvit:tiny'"):
            deepvit.load_model(name)


def test_googles_files_are_fetched_once(monkeypatch, tmp_path):
    there, here = tmp_path / "imagenet21k+imagenet2012", tmp_path / "hub" / "checkpoints" / "vit_models"
    there.mkdir()
    tensors = part(oracle("other/vit_plain")[0], "file")
    np.savez(there / "ViT-T_4.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    monkeypatch.setattr("deepvit.importers.locate.GOOGLE", tmp_path.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = deepvit.load_model("google:imagenet21k+imagenet2012/ViT-T_4")
    assert model.load_report.dialect == "google" and (here / there.name / "ViT-T_4.npz").exists()
    locate._of_google.cache_clear()
    (there / "ViT-T_4.npz").unlink()
    deepvit.load_model("google:imagenet21k+imagenet2012/ViT-T_4.npz")


@pytest.mark.slow
def test_names_are_fetched_from_the_hub(tmp_path):
    """From a local server that speaks as much of the hub's protocol as a download takes."""
    x = torch.randn(1, 3, 32, 32)
    expected = tiny_of_timm(tmp_path)(x)
    torch.save((x, expected), tmp_path / "expected")

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            owner, name, _, _, file = self.path.strip("/").split("/")
            found = owner in ("me", "timm") and (tmp_path / file).is_file()
            self.send_response(200 if found else 404)
            content = (tmp_path / file).read_bytes() if found else b""
            for key, value in {"ETag": f'"{file}"', "X-Repo-Commit": "0" * 40, "Content-Length": len(content)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            return content

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = ("import sys, torch, deepvit; x, expected = torch.load(sys.argv[1])\n"
               "for name in sys.argv[2:]:\n"
               "    assert torch.allclose(deepvit.load_model(name).eval()(x), expected, atol=1e-5), name")
    try:
        subprocess.run([sys.executable, "-c", program, tmp_path / "expected", "hf-hub:me/mine", "hf-hub:me/mine@main",
                        "timm:vit_tiny_patch16_224.augreg_in21k"], check=True, timeout=120,
                       env=os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                                         "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"})
    finally:
        server.shutdown()
