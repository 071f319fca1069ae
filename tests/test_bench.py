"""The bench runs and says what it measured; how fast anything is, no test asks."""

import json
from pathlib import Path

import pytest
from test_data_sets import PICTURES

from deepvit.bench.targets import TARGETS, against_targets
from deepvit.commands.main import main

KEPT = Path(__file__).parent.parent / "docs" / "results" / "bench-cpu.json"
PEERS = ["timm ViT, fused attention", "deepvit, self-attention", "deepvit, re-attention",
         "re-attention, published form", "re-attention, vit-pytorch's form"]


@pytest.fixture
def bench(tmp_path, capsys):
    def run(*words: str):
        code = main(["bench", *words, "--device", "cpu", "--json", str(tmp_path / "b.json")])
        said = capsys.readouterr()
        return code, said, json.loads((tmp_path / "b.json").read_text()) if code == 0 else None

    return run


def test_models_stand_beside_their_peers(bench):
    code, said, results = bench("train-step", "eval", "memory", "--depth", "1", "--batch", "1", "--seconds", "0.1")
    assert code == 0 and {"cores", "versions", "date"} < results["provenance"].keys()
    for name in ("train-step", "eval", "memory"):
        assert [row["name"] for row in results[name]] == PEERS and results[name][0]["ratio"] == 1
    assert "against the targets" in said.out and "train step against timm's ViT" in said.out
    kept = {row["name"]: row["kept_mib"] for row in results["memory"]}
    assert kept["deepvit, re-attention"] < 1.08 * kept[PEERS[0]] < kept["re-attention, published form"]


def test_the_loader_stands_beside_timms(bench):
    code, said, results = bench("loader", "--data", str(PICTURES / "train"), "--seconds", "0.1")
    assert code == 0
    assert {row["case"] for row in results["loader"]} == {"decode + crop + flip", "full recipe", "evaluation"}
    code, said, _ = bench("loader")
    assert code == 2 and "give --data FOLDER" in said.err


def test_the_figures_in_the_docs_meet_the_targets():
    results = {name: bench["rows"] for name, bench in json.loads(KEPT.read_text()).items()}
    judged = against_targets(results, "cpu")
    assert len(judged) == len(TARGETS["cpu"]) and {row["met"] for row in judged} == {"yes"}


def test_a_target_that_is_missed_is_said():
    rows = [{"case": "train step, 1 blocks", "name": "deepvit, re-attention", "ratio": 2.0}]
    assert [row["met"] for row in against_targets({"train-step": rows}, "cpu")] == ["no"]
