"""The tables of docs/results are what their committed data give."""

import csv
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ARMS = ("self", "norm_only", "reattention_fc", "reattention")
DEPTHS = (16, 24, 32)


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, int], dict[str, float]]:
    with (RESULTS / "cifar10" / "report.csv").open() as file:
        return {(row["attention"], int(row["depth"])): {name: float(text) for name, text in row.items()
                                                        if text.replace(".", "").replace("-", "").isdigit()}
                for row in csv.DictReader(file)}


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the table whose header begins with `first`."""
    lines = (RESULTS / page).read_text().split(f"| {first} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_accuracies_are_the_csvs(cells):
    assert table("cifar10.md", "depth") == [[str(depth), *(
        f"{cells[arm, depth]['top1_mean']:.2f} ± {cells[arm, depth]['top1_std']:.2f}" for arm in ARMS)]
        for depth in DEPTHS]


def test_differences_are_the_csvs(cells):
    for name, *values, mean in table("cifar10.md", "difference"):
        plus, minus = name.split(" - ")
        found = [cells[plus, depth]["top1_mean"] - cells[minus, depth]["top1_mean"] for depth in DEPTHS]
        assert [float(value) for value in [*values, mean]] == pytest.approx([*found, sum(found) / 3], abs=0.0051)


def test_similarities_are_the_csvs(cells):
    for arm, *values, pairs in table("cifar10.md", "32 blocks"):
        row = cells[arm, 32]
        assert [float(value) for value in values] == pytest.approx([
            row[f"similarity_{kind}_mean"] for kind in ("initial_final", "final_final", "final_softmax")], abs=0.0051)
        assert [float(count) for count in pairs.split(", ")] == [
            row[f"similar_blocks_final_{kind}_mean"] for kind in ("final", "softmax")]


def test_accuracies_by_calibration_are_the_jsons():
    kept = json.loads((RESULTS / "calibration.json").read_text())
    for data, update, *values in table("calibration.md", "data"):
        rows = [next(row for row in kept if (row["data"], row["step"], row["decay"]) == (data, int(update), decay)
                     and row["calibrate"] in (3200, 1408)) for decay in (None, 0.99, 0.998)]
        assert values == [f"{row[name]:.2f}" for row in rows for name in ("uncalibrated_top1", "top1")]
