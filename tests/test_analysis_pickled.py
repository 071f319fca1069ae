"""The published code's attention pickle: arrays and tensors in any dress, and nothing else, whatever the bytes."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from deepvit import analysis
from deepvit.analysis.pickled import read_pickled_maps, study_of_maps
from deepvit.commands.main import main
from deepvit.errors import UserError

MAPS = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)  # [L, B, H, N, N]


def beside(maps):
    """A block as attn_visualize.py finds it: p, q, v and the maps."""
    return ["p", torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5, 3), maps]


def write(path, *objects, protocol=pickle.DEFAULT_PROTOCOL):
    with path.open("wb") as file:
        for one in objects:
            pickle.dump(one, file, protocol)
    return path


FORMS = {
    "published": [beside(block) for block in MAPS],
    "tensors": list(MAPS),
    "views": [MAPS[:, :, :, :, :].transpose(0, 1)[:, i] for i in range(3)],
    "parameters": [torch.nn.Parameter(block) for block in MAPS],
    "arrays": [block.numpy() for block in MAPS],
    "columns first": [np.asfortranarray(block.numpy()) for block in MAPS],
    "big-endian": [block.numpy().astype(">f8") for block in MAPS],
    "dicts": [{0: "p", 3: block.numpy()} for block in MAPS],
    "one list": [list(MAPS)],
    "one list of arrays": [[block.numpy() for block in MAPS]]}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_maps_in_every_dress(form, protocol, tmp_path):
    read = read_pickled_maps(write(tmp_path / "maps.pkl", *FORMS[form], protocol=protocol))
    assert torch.equal(torch.stack(read), MAPS) and read[0].dtype == torch.float32


def test_half_precision_is_kept(tmp_path):
    read = read_pickled_maps(write(tmp_path / "maps.pkl", *MAPS.half()))
    assert torch.equal(torch.stack(read), MAPS.half().float())


def test_a_study_of_maps_says_what_a_model_would():
    probe = study_of_maps(list(MAPS), "x").facts["probe"]
    M = torch.tensor(probe["similarity"]["final"]["matrix"])
    torch.testing.assert_close(M, analysis.cross_layer_similarity(list(MAPS)))
    assert probe["blocks"] == 3 and probe["similarity"]["final"]["similar_blocks"] == int((M.diagonal(1) > 0.9).sum())


def test_figures_of_a_pickle(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "atten_data.pickle", *FORMS["published"])
    assert main(["figures", "--maps", "atten_data.pickle"]) == 0
    names = {path.name for path in (tmp_path / "figures" / "atten_data").iterdir()}
    assert {"maps_mean.png", "maps_heads.png", "similarity_matrix.png", "similarity_depth.png"} <= names
    assert "theta.png" not in names and len(capsys.readouterr().out.splitlines()) == len(names)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


class Sneaky:
    """Asks for attributes of a function that is allowed."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (), (None, {"__defaults__": (1,)})


@pytest.mark.parametrize("objects", [[Evil()], [beside(Evil())], [Sneaky()], [print], [], [1, 2], [beside(None)],
                                     [MAPS[0], MAPS[0][:, :, :4, :4]], [MAPS[0] * torch.nan], [MAPS[0].long()],
                                     [MAPS[0][0]], [np.array([object()])], ["text"], [torch.zeros(2, 0, 5, 5)]])
def test_anything_else_is_one_sentence(objects, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "maps.pkl", *objects)
    if not objects:
        path.write_bytes(b"\x80")
    assert main(["figures", "--maps", "maps.pkl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "maps.pkl" in error and os.listdir() == ["maps.pkl"]


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_storage_too_small_is_refused(protocol, tmp_path):
    """torch itself would enlarge it and show what lies in memory there."""
    data = pickle.dumps(torch.ones(4), protocol).replace(b"K\x04\x85", b"K\x7f\x85")
    (tmp_path / "maps.pkl").write_bytes(data)
    with pytest.raises(UserError, match="larger than its storage"):
        read_pickled_maps(tmp_path / "maps.pkl")


@pytest.mark.slow
def test_mutated_files_give_maps_or_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw, read, refused = random.Random(0), 0, 0
    whole = [write(tmp_path / "maps.pkl", *objects, protocol=protocol).read_bytes()
             for objects in FORMS.values() for protocol in (2, 4, 5)]
    for _ in range(2000):
        content = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 4)):
            place, kind = draw.randrange(len(content)), draw.random()
            if kind < 0.7:
                content[place] = draw.randrange(256)
            elif kind < 0.85:
                del content[place:place + draw.randint(1, 40)]
            else:
                content[place:place] = bytes(draw.choices(range(256), k=draw.randint(1, 20)))
        (tmp_path / "maps.pkl").write_bytes(bytes(content))
        try:
            maps = read_pickled_maps(tmp_path / "maps.pkl")
            assert all(one.shape == maps[0].shape and one.ndim == 4 for one in maps)
            read += 1
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert read + refused == 2000 and min(read, refused) > 100 and os.listdir() == ["maps.pkl"]
