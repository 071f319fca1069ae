"""The tables of docs/results are what their committed data give."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import parity
import pytest
import yaml
from scipy import stats

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ARMS = ("self", "norm_only", "reattention_fc", "reattention")
DEPTHS = (16, 24, 32)


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, int], dict[str, float]]:
    with (RESULTS / "cifar10" / "report.csv").open() as file:
        return {(row["attention"], int(row["depth"])): {name: float(text) for name, text in row.items()
                                                        if text.replace(".", "").replace("-", "").isdigit()}
                for row in csv.DictReader(file)}


def table_with_header(page: str, first: str) -> list[list[str]]:
    """The table whose header begins with `first`, without the line below it."""
    text = (RESULTS / page).read_text()
    header, _, *rows = text[text.index(f"| {first} |"):].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]


def table(page: str, first: str) -> list[list[str]]:
    return table_with_header(page, first)[1:]


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


def arms_of(study: str) -> dict[tuple[str, float], dict[int, dict]]:
    """(attention, learning rate) -> seed -> what metrics.json says."""
    found: dict[tuple[str, float], dict[int, dict]] = {}
    for path in (RESULTS / study / "runs").rglob("metrics.json"):
        result = json.loads(path.read_text())
        rate = yaml.safe_load(path.with_name("config.yaml").read_text())["optimizer"]["lr"]
        found.setdefault((result["origin"]["choices"]["model/attention"], rate), {})[result["seed"]] = result
    return found


@pytest.fixture(scope="module")
def dose() -> dict[str, dict[int, dict]]:
    """attention -> seed -> what metrics.json says."""
    return {arm: runs for (arm, _), runs in arms_of("dose").items()}


def test_rates_of_dose_are_the_runs():
    _, *header = table_with_header("dose.md", "held out")[0]
    found = arms_of("dose_rates")
    for arm, *values in table("dose.md", "held out"):
        for rate, value in zip(map(float, header), values, strict=True):
            runs = found.get((arm.strip("`"), rate))
            assert value == (f"{np.mean([runs[seed]['top1'] for seed in (100, 101)]):.2f}" if runs else "")


def test_accuracies_of_dose_are_the_runs():
    found = arms_of("dose")
    for arm, rate, top1, loss, count in table("dose.md", "arm"):
        runs = found[arm.strip("`"), float(rate)].values()
        assert int(count) == len(runs)
        for text, name, digits in ((top1, "top1", 2), (loss, "loss", 3)):
            values = [run[name] for run in runs]
            assert text == f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def test_contrasts_of_dose_are_the_runs(dose):
    for name, difference, interval, p, loss in table("dose.md", "contrast"):
        plus, minus = (dose[arm.strip("` ")] for arm in name.split(": ")[-1].split(" minus "))
        seeds = plus.keys() & minus.keys()
        points, losses = (np.array([plus[seed][key] - minus[seed][key] for seed in seeds]) for key in ("top1", "loss"))
        low, high = stats.ttest_1samp(points, 0).confidence_interval()
        assert (difference, interval) == (f"{points.mean():+.2f}", f"{low:+.2f} to {high:+.2f}")
        assert loss == f"{losses.mean():+.3f}"
        assert float(p.lstrip("<")) == pytest.approx(max(stats.ttest_1samp(points, 0).pvalue, 1e-4), rel=0.1)


def test_the_regime_of_dose_is_the_runs(dose):
    for arm, *values in table("dose.md", "before training"):
        for text, of in zip(values, (lambda probe: probe["spread"], lambda probe: probe["gain"],
                                     lambda probe: probe["branch_over_stream"]["attention"]), strict=True):
            first = [of(run["probe_initial"])[0] for run in dose[arm.strip("`")].values()]
            assert float(text) == pytest.approx(np.mean(first), rel=0.01)


def test_the_small_vit_is_its_runs():
    def result(run):
        found = json.loads((RESULTS / "cifar10_small/runs" / run / "metrics.json").read_text())
        return found, [f"{found['top1']:.2f}", f"{found['loss']:.3f}"]

    for run, (attention, epochs, cutmix, top1, interval, top5, loss, updates, _) in zip(
            ("cutmix60", "vit6", "reattention"), table("cifar10_small.md", "attention"), strict=True):
        found, numbers = result(run)
        assert [top1, loss] == numbers and top5 == f"{found['top5']:.2f}" and attention.strip("`") == found["attention"]
        assert interval == f"{found['top1_low']:.2f} to {found['top1_high']:.2f}" and updates == f"{found['steps']:,}"
        augment = yaml.safe_load((RESULTS / "cifar10_small/runs" / run / "config.yaml").read_text())["augment"]
        assert epochs == f"{found['epochs']:.0f}" and (augment["cutmix"] > 0) == (cutmix != "no")
    for header, runs in (("optimizer", ("tuning/adamw", "tuning/muon")),
                         ("after 282 updates", [f"short/{arm}" for arm in (
                             "self", "norm_only", "reattention", "theta_by_adamw")])):
        for run, row in zip(runs, table("cifar10_small.md", header), strict=True):
            assert row[-2:] == result(run)[1]


@pytest.mark.parametrize("contest, seeds", [("bare", 5), ("plain", 2), ("reattention", 5)])
def test_parity_is_its_rows(contest, seeds):
    rows = [json.loads(line) for line in (RESULTS / f"parity/{contest}/rows.jsonl").read_text().splitlines()]
    told = (RESULTS / f"parity/{contest}/table.md").read_text()
    assert told == parity.table(rows, rows[0]["settings"]["margin"]) and told.strip() in (
        RESULTS / "parity.md").read_text()
    assert sorted((row["trainer"], row["seed"]) for row in rows) == [*product(("ours", "timm"), range(seeds))]
    (top1, *_), = (line.split("|")[2:5] for line in told.splitlines() if line.startswith("| top-1 %")),
    for text in top1[:2]:
        assert text.partition("(")[0].strip() in (RESULTS.parent.parent / "README.md").read_text()
