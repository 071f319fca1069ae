"""Files that are torn, forged, poisoned or foreign: success or one sentence, never code run, never a traceback."""

import argparse
import io
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import DATA, oracle, part
from safetensors.torch import save as save_safetensors

import deepvit
from deepvit.errors import UserError
from deepvit.importers import files, open_weights

FORMS = ["pth", "legacy pth", "ours", "by name", "npz", "deflated npz", "msgpack", "safetensors"]


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """A small good file of every format."""
    model = deepvit.create_model("vit", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=2,
                                 attention="reattention")
    published = {name.replace(".mix.", ".reatten_matrix.").replace("attn.norm", "attn.var_norm"): tensor
                 for name, tensor in model.state_dict().items()}
    matrix = "blocks.0.attn.reatten_matrix.weight"
    published[matrix] = published[matrix][:, :, None, None]
    arrays = {name: tensor.numpy() for name, tensor in part(oracle("other/vit_prelogits")[0], "file").items()}
    flax = DATA / "other/deepvit_flax_mean.msgpack"
    return {
        "pth": torch_bytes({"state_dict": published, "arch": "deepvit_patch16_224_re_attn_32b", "epoch": 1}),
        "legacy pth": torch_bytes(published, _use_new_zipfile_serialization=False),
        "ours": torch_bytes({"format": "deepvit", "version": 1, "config": model.config, "model": model.state_dict()}),
        "by name": torch_bytes({"arch": "deepvit16", "state_dict": model.state_dict(),
                                "args": argparse.Namespace(model_kwargs={"depth": 1, "num_heads": 2}, gp="avg")}),
        "npz": npz_bytes(np.savez, arrays), "deflated npz": npz_bytes(np.savez_compressed, arrays),
        "msgpack": flax.read_bytes(), "safetensors": save_safetensors(model.state_dict())}


def torch_bytes(content, **how) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def npz_bytes(save, arrays) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def load(path, content: bytes):
    path.write_bytes(content)
    return deepvit.load_model(path, num_heads=2)


def test_the_good_files_load(contents, tmp_path):
    for form, content in contents.items():
        if form in ("npz", "deflated npz", "msgpack"):  # their heads are in the file
            (tmp_path / "good").write_bytes(content)
            deepvit.load_model(tmp_path / "good")
        elif form == "safetensors":
            with pytest.raises(UserError):  # our names without our settings
                load(tmp_path / "good", content)
        else:
            load(tmp_path / "good", content)


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Cut; bytes changed (at the ends, where the structure is, or anywhere); a piece doubled, cut out or blank."""
    changed = bytearray(content)
    kind = random.integers(7)
    at = int(random.integers(len(changed)))
    if kind == 0:
        return bytes(changed[:at])
    if kind <= 3:
        ends = {1: (0, min(2000, len(changed))), 2: (max(0, len(changed) - 3000), len(changed)), 3: (0, len(changed))}
        for _ in range(int(random.integers(1, 8))):
            changed[int(random.integers(*ends[int(kind)]))] = int(random.integers(256))
    if kind == 4:
        piece = changed[at:at + int(random.integers(1, 200))]
        changed[int(random.integers(len(changed))):0] = piece
    if kind == 5:
        del changed[at:at + int(random.integers(1, 200))]
    if kind == 6:
        size = int(random.integers(1, 64))
        changed[at:at + size] = bytes([int(random.choice([0, 255, 0x7F]))]) * size
    return bytes(changed)


def check_mutations(contents, path, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for i in range(count):
        form = FORMS[i % len(FORMS)]
        content = mutate(contents[form], random)
        try:
            keywords = {} if form in ("npz", "deflated npz", "msgpack") else {"num_heads": 2}
            path.write_bytes(content)
            model = deepvit.load_model(path, **keywords)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), (i, form, str(error))
        except BaseException as error:
            raise AssertionError(f"mutation {i} of {form}, seed {seed}: {type(error).__name__}: {error}") from error
        else:
            assert all(tensor.isfinite().all() for tensor in model.parameters())


def test_mutated_files(contents, tmp_path):
    check_mutations(contents, tmp_path / "mutated", 300, seed=0)


@pytest.mark.slow
def test_five_thousand_mutated_files(contents, tmp_path):
    check_mutations(contents, tmp_path / "mutated", 5000, seed=1)


# Poison

class Poison:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["pth", "legacy pth", "in a checkpoint", "plain pickle", "npz", "npz renamed"])
def test_no_pickle_is_executed(tmp_path, form):
    trap, path = tmp_path / "executed", tmp_path / "poisoned.pth"
    poison = Poison(str(trap))
    if form == "pth":
        torch.save(poison, path)
    elif form == "legacy pth":
        torch.save({"a": poison}, path, _use_new_zipfile_serialization=False)
    elif form == "in a checkpoint":
        torch.save({"state_dict": {"head.bias": torch.zeros(1)}, "args": poison}, path)
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(poison))
    else:
        path = tmp_path / ("poisoned.npz" if form == "npz" else "poisoned.pth")
        with path.open("wb") as file:
            np.savez(file, **{"Transformer/posembed_input/pos_embedding": np.array([poison], dtype=object)})
    with pytest.raises(UserError, match="poisoned") as refusal:
        deepvit.load_model(path)
    assert "refused" in str(refusal.value) or "torn" in str(refusal.value)
    assert form != "plain pickle" or "Python objects" in str(refusal.value)
    assert "Weights only load" not in str(refusal.value)
    assert not trap.exists()


# Sizes that are not there

def test_npz_with_a_huge_shape(tmp_path):
    path = tmp_path / "huge.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**9)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(UserError, match="does not match its 64 bytes"):
        deepvit.load_model(path)


def test_a_tensor_of_one_number_that_claims_to_be_huge(tmp_path):
    content = torch_bytes({"cls_token": torch.zeros(1).expand(1, 1, 10**9)})
    with pytest.raises(UserError, match="more than the file holds"):
        load(tmp_path / "weights.pth", content)


def test_npz_that_unpacks_to_far_more_than_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE_BYTES", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", cls=np.zeros(2**22, np.float32))
    with pytest.raises(UserError, match="unpack to 16 MiB"):
        deepvit.load_model(tmp_path / "bomb.npz")


@pytest.mark.parametrize("content", [
    b"\x81\xa1a\xc6\xff\xff\xff\xff", b"\x81\xa1a\xdf\xff\xff\xff\xff", b"\x81\xa1a\xdd\xff\xff\xff\xff",
    b"\x81\xa1a" * 40 + b"\xc0", b"\x81\xa1a" * 5000 + b"\xc0",
    b"\x81\xa1a" + b"\xdd\x00\x10\x00\x00" * 1000 + b"\0" * 2**20,
    b"\x81\xa1a\x01", b"\x81\x01\x01", b"\x81\xa1a", b"\x82\xa1a\x80\xa1a\x80", b"\x81\xa1a\x80 ",
    b"\x81\xa1a\xc7\x07\x01\x93\x91\xff\xa1f\xc4\x00", b"\x81\xa1a\xc1", b"\x81\xa1a\xd4\x07\x00",
    b"\x81\xa1a\xc7\x0e\x01\x93\x91\x02\xa7float32\xc4\x01\x00", b"\x81\xa1a\xc7\x06\x01\x93\x90\x90\xc4\x00",
    b"\x81\xa1a\xd6\xff\x00\x00\x00\x00"],
    ids=["4 GiB of bytes", "a map of 4 billion", "a list of 4 billion", "nested", "nested deep",
         "lists reserved in lists", "no array", "a key that is a number", "torn", "a key twice", "bytes behind",
         "a side below 0", "no value", "another extension", "bytes missing", "a type that is a list", "a time"])
def test_malformed_msgpack(tmp_path, content):
    """What it announces is neither believed nor reserved."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="tree.msgpack is torn or no flax msgpack") as refusal:
        load(tmp_path / "tree.msgpack", content)
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_msgpack_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(UserError, match="pip install 'deepvit\\[flax\\]'"):
        deepvit.load_model(DATA / "other/deepvit_flax_cls.msgpack")


@pytest.mark.parametrize("length", [128, 640, 896])
def test_safetensors_whose_length_begins_like_a_pickle(tmp_path, length):
    bare = struct.unpack("<Q", save_safetensors({"a": torch.ones(1)}, {"pad": ""})[:8])[0]
    content = save_safetensors({"a": torch.ones(1)}, {"pad": "x" * (length - bare)})
    assert content[0] == 0x80 and struct.unpack("<Q", content[:8])[0] == length
    (tmp_path / "a.safetensors").write_bytes(content)
    assert open_weights(tmp_path / "a.safetensors").read("a").tolist() == [1]


def test_safetensors_with_a_huge_header(tmp_path):
    with pytest.raises(UserError, match="safetensors"):
        load(tmp_path / "a.safetensors", struct.pack("<Q", 2**60) + b"{" + b" " * 100)


# Files that are something else

@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"0" * 64, b"hello, world, no weights here",
                                     b"PK\x03\x04 torn", b"\x80\x02]q\x00.", b"\x80", b"\xff" * 40],
                         ids=["empty", "image", "text", "torn zip", "a list", "one byte", "noise"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.npz", "weights.safetensors"])
def test_foreign_files(tmp_path, name, content):
    with pytest.raises(UserError, match=name) as refusal:
        load(tmp_path / name, content)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("what, named", [("missing.pth", "cannot be read"), (".", "no checkpoints/best.pt")])
def test_no_file(tmp_path, what, named):
    with pytest.raises(UserError, match=named):
        deepvit.load_model(tmp_path / what)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"a": 1}, [torch.zeros(1)], torch.zeros(3),
                                     {"fc.weight": torch.zeros(3)}, {1: torch.zeros(3)},
                                     {"state_dict": {"x": [1]}}, {"model": {"model": {"a": torch.zeros(1)}}}])
def test_checkpoints_of_something_else(tmp_path, content):
    with pytest.raises(UserError, match="weights.pth"):
        load(tmp_path / "weights.pth", torch_bytes(content))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_vit_b16_npz_in_ten_seconds_and_little_memory(tmp_path):
    """In a process of its own: peak memory beyond an idle process with the libraries loaded."""
    import subprocess
    import sys
    path = tmp_path / "ViT-B_16.npz"
    write_synthetic_npz(path, "ViT-B_16")
    program = (
        "import sys, time, torch, timm, deepvit, deepvit.importers\n"
        "torch.set_num_threads(1)\n"
        "def memory(field):\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith(field))\n"
        "    return int(line.split()[1]) * 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts anew: it is inherited from the parent
        "before = memory('VmRSS')\n"
        "start = time.time(); model = deepvit.load_model(sys.argv[1])\n"
        "print(time.time() - start, memory('VmHWM') - before)")
    told = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True).stdout
    seconds, extra = map(float, told.split())
    print(f"{path.stat().st_size / 2**20:.0f} MiB in {seconds:.1f} s, {extra / path.stat().st_size:.2f} x its size")
    assert seconds < 10 and extra < 1.3 * path.stat().st_size


def write_synthetic_npz(path, name: str) -> None:
    from oracles import keys
    random = np.random.default_rng(0)
    np.savez(path, **{key: random.standard_normal(shape, dtype=np.float32) * 0.02
                      for key, shape in keys(name).items()})
