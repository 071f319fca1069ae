"""Contrasts of a study: from the sweep file through its record to tests that are scipy's."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from scipy import stats
from test_provenance import TINY
from test_report import attention, the_grid

from deepvit.commands.main import main
from deepvit.config.compare import flat
from deepvit.config.records import SweepRecord, read_json_lines
from deepvit.errors import BAD_INPUT, DONE, UserError
from deepvit.report.statistics import Contrast, Finding, find, holm, read_plan
from deepvit.report.tables import tables

PLAN = {"outcome": "top1", "margin": 0.5, "contrasts": {
    "mixing": {"plus": {"model/attention": "reattention"}, "minus": {"model/attention": "norm_only"},
               "claim": "equal", "primary": True},
    "re-attention at 32": {"plus": {"model/attention": "reattention"}, "minus": {"model/attention": "self"},
                           "at": {"model.depth": 32.0}, "claim": "greater", "primary": True},
    "interaction": {"plus": {"model/attention": "reattention"}, "minus": {"model/attention": "self"},
                    "at": {"model.depth": 32}, "against": {"model.depth": 16}, "claim": "greater"}}}
ARMS = ("self", "norm_only", "reattention")


@pytest.fixture
def study(make_run, tmp_path):
    """`study(seeds)`: runs of every arm at 16 and 32 blocks under a sweep's record, and their top-1 and log-loss."""
    def runs_of(seeds: int, plan: dict = PLAN) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(0)
        by_seed = draw.normal(0, 2, seeds)
        top1 = {(arm, depth): 50 + by_seed + 2 * (arm != "self") + draw.normal(0, 0.2, seeds) + (depth == 32)
                * (arm == "reattention") for arm in ARMS for depth in (16, 32)}
        cells = []
        for (arm, depth), values in top1.items():
            for seed, value in enumerate(values):
                folder = make_run(f"{arm}-{depth}-{seed}", model__depth=depth, model__attention=attention(arm),
                                  seed=seed, result={"top1": value, "loss": 2 - value / 100, "seed": seed})
                config = yaml.safe_load((folder / "config.yaml").read_text())
                config["origin"]["choices"]["model/attention"] = arm
                (folder / "config.yaml").write_text(yaml.safe_dump(config))
                cells.append({"overrides": [folder.name], "folder": str(folder.relative_to(tmp_path / "runs")),
                              "settings": dict(flat(config))})
        SweepRecord(tmp_path / "runs" / "sweeps" / "study-0.jsonl", "1").open("deepvit", "study", cells, {}, plan)
        return top1
    return runs_of


def test_differences_are_paired_by_seed_and_the_seed_is_the_unit(study, tmp_path):
    top1 = study(6)
    mixing, at_32, interaction = find(read_plan(PLAN), the_grid(tmp_path / "runs"))
    assert (mixing.unmatched, at_32.unmatched, interaction.unmatched) == (0, 0, 0)
    over_depths = [(top1["reattention", 16] + top1["reattention", 32]) / 2,
                   (top1["norm_only", 16] + top1["norm_only", 32]) / 2]
    paired = stats.ttest_rel(*over_depths)
    assert mixing.p_different == pytest.approx(paired.pvalue)
    assert (mixing.difference.low, mixing.difference.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))
    gap = over_depths[0] - over_depths[1]
    assert mixing.equivalence.p == pytest.approx(max(stats.ttest_1samp(gap, -0.5, alternative="greater").pvalue,
                                                     stats.ttest_1samp(gap, 0.5, alternative="less").pvalue))
    assert (mixing.equivalence.low, mixing.equivalence.high) == pytest.approx(
        tuple(stats.ttest_1samp(gap, 0).confidence_interval(0.9)))
    gain = {depth: top1["reattention", depth] - top1["self", depth] for depth in (16, 32)}
    assert at_32.p == pytest.approx(stats.ttest_1samp(gain[32], 0).pvalue)
    assert [*interaction.points.values()] == pytest.approx(gain[32] - gain[16])
    assert [*interaction.losses.values()] == pytest.approx((gain[16] - gain[32]) / 100)
    assert [mixing.adjusted, at_32.adjusted] == pytest.approx(holm([mixing.p, at_32.p]))
    assert interaction.adjusted is None
    assert (at_32.verdict, interaction.verdict) == ("greater, as claimed", "greater, as claimed")
    assert mixing.verdict == ("different, against the claim" if paired.pvalue < 0.05 else "undecided")


def test_like_is_compared_with_like(study, tmp_path):
    """An arm that has more cells than the other counts where both are; one that is not told apart is refused."""
    arms = {"norm": {"plus": {"model/attention": "norm_only"}, "minus": {"model/attention": "self"}},
            "typo": {"plus": {"model/attention": "norm"}, "minus": {"model/attention": "self"}},
            "same": {"plus": {"model/attention": "norm_only"}, "minus": {"model.qkv_bias": True}}}
    top1 = study(3, {"contrasts": arms})
    for folder in (tmp_path / "runs").rglob("norm_only-32-*"):
        shutil.rmtree(folder)
    record = tmp_path / "runs/sweeps/study-0.jsonl"
    record.write_text(re.sub(r'{"overrides": \["norm_only-32-.*?}}, ', "", record.read_text()))
    norm, typo, same = find(read_plan({"contrasts": arms}), grid := the_grid(tmp_path / "runs"))
    assert any(note.startswith("norm: ") and "Left out: 1 of" in note for note in tables(grid, 0.9)[0].notes)
    assert [*norm.points.values()] == pytest.approx(top1["norm_only", 16] - top1["self", 16])
    assert "no run is model/attention=norm" in typo.verdict and "several runs of one seed" in same.verdict


def test_each_arm_may_have_its_own_learning_rate(study, tmp_path):
    top1 = study(3)
    for path in (tmp_path / "runs").rglob("config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["optimizer"]["lr"] = 0.002 if "norm_only" in path.parent.name else 0.001
        path.write_text(yaml.safe_dump(config))
    mixing, at_32, _ = find(read_plan(PLAN), the_grid(tmp_path / "runs"))
    gap = sum(top1["reattention", depth] - top1["norm_only", depth] for depth in (16, 32)) / 2
    assert [*mixing.points.values()] == pytest.approx(gap)
    assert [*at_32.points.values()] == pytest.approx(top1["reattention", 32] - top1["self", 32])


def test_arms_of_other_depths_are_not_alike(study, tmp_path):
    """As where a sweep was cut by hand to one depth for each arm."""
    study(3)
    record = tmp_path / "runs/sweeps/study-0.jsonl"
    line = json.loads(record.read_text())
    cut = ("reattention-16", "norm_only-32", "self-32")
    line["cells"] = [cell for cell in line["cells"] if not cell["overrides"][0].startswith(cut)]
    record.write_text(json.dumps(line) + "\n")
    for folder in (tmp_path / "runs/digits/vit").iterdir():
        if folder.name.startswith(cut):
            shutil.rmtree(folder)
    assert all("all else alike" in found.problem for found in find(read_plan(PLAN), the_grid(tmp_path / "runs")))


def test_a_missing_run_has_the_precision_that_the_others_found(study, tmp_path):
    """`precision=auto` is decided as a run begins: one that never began is no other configuration."""
    study(3)
    shutil.rmtree(tmp_path / "runs/digits/vit/reattention-32-1")
    record = tmp_path / "runs/sweeps/study-0.jsonl"
    line = json.loads(record.read_text())
    cell, = (cell for cell in line["cells"] if cell["overrides"] == ["reattention-32-1"])
    cell["settings"] |= {"origin.choices.precision": "auto", "precision.dtype": "auto"}
    record.write_text(json.dumps(line) + "\n")
    grid = the_grid(tmp_path / "runs")
    assert grid.extras == () and sum(run.is_missing for run in grid.planned) == 1


def test_a_loss_that_is_not_finite_leaves_its_seed_out(study, tmp_path):
    """`metrics.json` has null there; the accuracy still counts."""
    study(4)
    path = next((tmp_path / "runs").rglob("reattention-32-2/metrics.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"loss": None}))
    _, at_32, _ = find(read_plan(PLAN), the_grid(tmp_path / "runs"))
    assert [*at_32.points] == [0, 1, 2, 3] and [*at_32.losses] == [0, 1, 3]


def test_holm_steps_down():
    """The example of Wright (Biometrics 48, 1992, table 1), by hand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("claim", "shift", "verdict"), [
    ("equal", 0.0, "equal within 0.5 points, as claimed"), ("equal", 3.0, "different, against the claim"),
    ("less", 3.0, "greater, against the claim"), ("greater", 3.0, "greater, as claimed"), ("different", -3.0, "less"),
    ("greater", 0.0, "equal within 0.5 points")])
def test_a_verdict_follows_from_the_tests(claim, shift, verdict):
    points = {seed: shift + 0.2 * (-1) ** seed for seed in range(8)}
    contrast = Contrast("one", {"model/attention": "norm_only"}, {"model/attention": "self"}, claim=claim)
    assert Finding(contrast, 0.5, points, {}, []).verdict == verdict


def test_the_verdict_of_a_primary_contrast_goes_by_its_adjusted_p():
    contrast = Contrast("one", {"model/attention": "norm_only"}, {"model/attention": "self"}, claim="greater")
    found = Finding(contrast, 0.5, {seed: 3 + 0.2 * (-1) ** seed for seed in range(8)}, {}, [], adjusted=0.06)
    assert found.p < 0.001 and found.verdict == "undecided"


def test_a_preregistration_is_named_and_a_changed_one_too(study, tmp_path):
    study(3, {**PLAN, "preregistered": "docs/plan.md"})
    configs = list((tmp_path / "runs").rglob("config.yaml"))
    for path in configs:
        config = yaml.safe_load(path.read_text())
        config["origin"]["preregistered"] = {"file": "docs/plan.md", "sha256": "ab" * 32}
        path.write_text(yaml.safe_dump(config))
    assert any(f"docs/plan.md, sha256 {'ab' * 32}" in note for note in tables(the_grid(tmp_path), 0.9)[0].notes)
    configs[0].write_text(configs[0].read_text().replace("ab" * 32, "cd" * 32))
    assert any("not every run" in note for note in tables(the_grid(tmp_path), 0.9)[0].notes)


def test_the_report_of_a_study(study, tmp_path, capsys):
    study(2)
    next((tmp_path / "runs").rglob("reattention-32-1/metrics.json")).unlink()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "n = 1: no interval" in said and "seed 1" in said and "interim" in said
    assert (tmp_path / "out" / "figures" / "contrasts.png").exists()


def test_a_report_that_is_refused_leaves_no_folder(study, tmp_path, capsys):
    study(1, {**PLAN, "margin": 0.0})
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "out")]) == 2
    assert "margin" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"outcom": "top1"}, "outcome"), ({"outcome": "accuracy"}, "uncalibrated_top1"), ({"margin": 0.0}, "margin"),
    ({"contrasts": {"a": {"plus": {"seed": 1}, "minus": {"seed": 2}, "primari": True}}}, "primary"),
    ({"contrasts": {"a": {"plus": {"seed": 1}}}}, "minus"),
    ({"contrasts": {"a": {"plus": {"x": 1}, "minus": {"x": 2}, "claim": "same"}}}, "equal"),
    ({"contrasts": {str(at): {"plus": {"x": 1}, "minus": {"x": 2}, "primary": True} for at in range(4)}}, "primary")])
def test_a_plan_that_cannot_be_meant_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        read_plan({"contrasts": {}, **change})


def test_a_sweep_file_names_its_contrasts(run, tmp_path, undrawn):
    """As conf/sweep/dose.yaml does it."""
    path = tmp_path / "conf" / "sweep" / "tiny_study.yaml"
    path.parent.mkdir(parents=True)
    params = dict(word.split("=") for word in TINY)
    file = {"hydra": {"mode": "MULTIRUN", "sweep": {"dir": "runs/study"}, "callbacks": {"sweep": {"statistics": {
        "margin": 0.5, "preregistered": "plan.md", "contrasts": {"the norm": {
            "plus": {"model/attention": "norm_only"}, "minus": {"model/attention": "self"}, "primary": True}}}}},
        "sweeper": {"params": {**params, "model/attention": "self,norm_only", "seed": "0,1"}}}}
    path.write_text("# @package _global_\n" + yaml.safe_dump(file))
    sweep = ["--config-dir", str(tmp_path / "conf"), "sweep=tiny_study"]
    code, _, sentence = run("train", "-m", *sweep)
    assert code == BAD_INPUT and "plan.md" in sentence and not (tmp_path / "runs").exists()
    (tmp_path / "plan.md").write_text("what is asked")
    assert run("train", "-m", *sweep)[0] == DONE
    digest = hashlib.sha256(b"what is asked").hexdigest()
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "runs").rglob("config.yaml")]
    assert [one["origin"]["preregistered"]["sha256"] for one in configs] == [digest] * 4
    record, = (tmp_path / "runs/study/sweeps").glob("*.jsonl")
    assert read_json_lines(record)[0]["statistics"] == file["hydra"]["callbacks"]["sweep"]["statistics"]
    code, said, _ = run("report", "runs/study")
    results = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("metrics.json")}
    tops = {(one["attention"], one["seed"]): one["top1"] for one in results.values()}
    mean = sum(tops["norm_only", seed] - tops["self", seed] for seed in (0, 1)) / 2
    assert code == DONE and f"{mean:+.2f}" in said and "n = 2: no interval worth reading" in said
    code, _, sentence = run("train", "-m", *sweep, "hydra.callbacks.sweep.statistics.margin=-1")
    assert code == BAD_INPUT and "margin" in sentence


@pytest.mark.parametrize(("change", "words"), [
    ({"plus": {"model/attentoin": "norm_only"}}, "model/attentoin"), ("hello", "not a mapping")])
def test_a_contrast_of_no_cell_is_refused_before_the_sweep(run, tmp_path, change, words):
    contrast = {"plus": {"model/attention": "norm_only"}, "minus": {"model/attention": "self"}}
    write_sweep(tmp_path, {"norm": {**contrast, **change} if isinstance(change, dict) else change})
    code, _, sentence = run("train", "-m", "--config-dir", str(tmp_path / "conf"), "sweep=study")
    assert code == BAD_INPUT and words in sentence and sentence.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_contrast_whose_value_no_cell_has_is_named(run, tmp_path):
    """A sweep may be cut down on purpose."""
    write_sweep(tmp_path, {"norm": {"plus": {"model/attention": "centred"}, "minus": {"model/attention": "self"}}})
    code, said, _ = run("train", "-m", "--config-dir", str(tmp_path / "conf"), "sweep=study")
    assert code == DONE and "model/attention=centred" in said


def write_sweep(folder, contrasts) -> None:
    path = folder / "conf" / "sweep" / "study.yaml"
    path.parent.mkdir(parents=True)
    params = {**dict(word.split("=") for word in TINY), "model/attention": "self,norm_only"}
    path.write_text("# @package _global_\n" + yaml.safe_dump({"hydra": {
        "mode": "MULTIRUN", "sweep": {"dir": "runs/study"}, "sweeper": {"params": params},
        "callbacks": {"sweep": {"statistics": {"contrasts": contrasts}}}}}))
