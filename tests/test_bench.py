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
    for target in TARGETS["cpu"]:
        assert (target.what in said.out) == (target.bench in ("train-step", "eval", "memory"))
    kept = {row["name"]: row["kept_mib"] for row in results["memory"]}
    assert kept["deepvit, re-attention"] < 1.08 * kept[PEERS[0]] < kept["re-attention, published form"]


def test_the_loader_stands_beside_timms(bench):
    code, said, results = bench("loader", "--data", str(PICTURES / "train"), "--seconds", "0.1")
    assert code == 0
    assert {row["case"] for row in results["loader"]} == {"decode + crop + flip", "full recipe", "evaluation"}
    code, said, _ = bench("loader")
    assert code == 2 and "give --data FOLDER" in said.err


@pytest.mark.parametrize(("device", "number"), [(device, number) for device in TARGETS
                                                for number in range(len(TARGETS[device]))])
def test_a_target_is_met_up_to_its_bound_and_no_further(device, number):
    target = TARGETS[device][number]
    for factor, met in ((1.0, "yes"), (1.01 if target.at_most else 0.99, "no")):
        row = {"case": f"{target.case} and more", "name": target.name, target.field: factor * target.bound}
        judged = against_targets({target.bench: [row]}, device)
        assert [one["met"] for one in judged if one["what"] == target.what] == [met]


def test_every_target_finds_its_row_in_the_figures_of_the_docs():
    """A bench whose rows were renamed would be judged by nothing."""
    results = {name: bench["rows"] for name, bench in json.loads(KEPT.read_text()).items()}
    assert [row["what"] for row in against_targets(results, "cpu")] == [target.what for target in TARGETS["cpu"]]
