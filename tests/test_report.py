"""The report against run folders of a real sweep (a copy of its JSON) and against folders broken on purpose."""

import contextlib
import csv
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from deepvit.commands.main import main
from deepvit.config.compare import flat, labels
from deepvit.config.records import SweepRecord
from deepvit.engine.folder import RunFolder
from deepvit.report import grid as grid_module
from deepvit.report import published, render, runs, tables, write
from deepvit.report.figures import MAX_LINES, depth_chart, draw_curve, look
from deepvit.report.grid import ATTENTION_ORDER, grids
from deepvit.report.statistics import summarise

SWEEP = Path(__file__).parent / "data" / "report"


def attention(name: str) -> dict:
    return {"name": name, "class": "ReAttention"}


def the_grid(folder: Path) -> grid_module.Grid:
    found = grids(runs.read_runs([folder])[0])
    assert len(found) == 1
    return found[0]


# The real sweep

@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> tuple[Path, str]:
    """The sweep's report: its folder and what was printed."""
    out, printed = tmp_path_factory.mktemp("report"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["report", str(SWEEP), "--out", str(out)]) == 0
    return out, printed.getvalue()


def test_report_of_the_sweep(reported):
    tmp_path, printed = reported
    assert "Limits:" in printed and "by construction" in printed
    assert "6 runs (6 finished). The highest top-1 is" in printed
    assert str(tmp_path / "figures" / "depth.png") in printed
    for name in ("depth", "curves", "blocks"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    for folder in (path.parent for path in SWEEP.rglob("metrics.json")):
        result = json.loads((folder / "metrics.json").read_text())
        row = next(row for row in rows if (row["depth"], row["attention"]) == (str(result["depth"]),
                                                                               result["attention"]))
        assert float(row["top1_mean"]) == result["top1"] and row["n"] == "1"
        for moment in ("initial", "final"):
            for kind, values in result[f"probe_{moment}"]["similarity"].items():
                assert float(row[f"similarity_{moment}_{kind}_mean"]) == pytest.approx(values["mean"], abs=1e-6)
                assert float(row[f"similar_blocks_{moment}_{kind}_mean"]) == values["similar_blocks"]
        assert f"{result['top1']:.2f}" in printed


def test_page_needs_nothing_else(reported):
    page = (reported[0] / "report.html").read_text()
    assert "<script" not in page and 'src="http' not in page and "@import" not in page
    assert page.count("data:image/svg+xml;base64,") >= 6 and 'name="viewport"' in page


def test_same_runs_same_bytes(template):
    """Kept results regenerate without a difference."""
    first, second = (the_grid(template) for _ in range(2))
    assert render.as_csv([first], 0.9) == render.as_csv([second], 0.9)
    charts = [depth_chart(grid, "") for grid in (first, second)]
    assert charts[0].svg == charts[1].svg and charts[0].narrow_svg != charts[0].svg


def test_starts_without_torch():
    code = ("import sys, deepvit.commands.report, deepvit.report.write; "
            "print([name for name in ('torch', 'timm', 'hydra', 'sklearn', 'scipy.stats') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_threshold_counts_the_pairs_above_it(template):
    run = runs.read_run(template)
    pairs = tables.similarity(run, "initial", "softmax")
    assert len(pairs) == run.config["model"]["depth"] - 1
    for threshold in (-1, sorted(pairs)[3], 1):
        assert tables.similar_blocks(run, "initial", "softmax", threshold) == sum(x > threshold for x in pairs)


# Seeds, axes, holes

def test_mean_and_deviation_over_seeds(make_run, tmp_path):
    values = [80.0, 83.0, 85.5]
    for seed, top1 in enumerate(values):
        make_run(f"seed={seed}", seed=seed, result={"top1": top1, "seed": seed})
    cell, = the_grid(tmp_path).cells
    summary = tables.over_seeds(cell, tables.of_result("top1"))
    assert summary.text(2) == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    half = T_95[3] * statistics.stdev(values) / math.sqrt(3)
    assert tables.interval(cell) == pytest.approx((summary.mean - half, summary.mean + half))


# Student's t, two-sided 95 %, by the number of values: closed forms for 1, 2 and 4 degrees of freedom, and tables.
ALPHA = 4 * 0.975 * 0.025
T_95 = {2: math.tan(math.pi * 0.475), 3: 0.95 * math.sqrt(2 / ALPHA), 11: 2.228139, 31: 2.042272, 121: 1.979930,
        5: 2 * math.sqrt(math.cos(math.acos(math.sqrt(ALPHA)) / 3) / math.sqrt(ALPHA) - 1)}


@pytest.mark.parametrize("n", T_95)
def test_the_interval_of_a_mean_is_students(n):
    values = [float(value * value % 17) for value in range(n)]
    summary = summarise(values)
    half = T_95[n] * statistics.stdev(values) / math.sqrt(n)
    assert (summary.high - summary.mean, summary.mean - summary.low) == pytest.approx((half, half), rel=1e-6)


def test_summaries_leave_out_what_is_not_there():
    assert summarise([None, float("nan")]) is None
    assert summarise([2.0, None]).text(1) == "2.0"
    assert summarise([1.0] * 40).low == 1.0


@pytest.fixture
def swept(make_run, tmp_path):
    """A sweep's record of runs made by `make_run`, two of which are then taken away; the second said why it failed."""
    def make_record(*folders: Path) -> None:
        top = tmp_path / "runs"
        record = SweepRecord(top / "sweeps" / "cells-0.jsonl", "first")
        configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
        record.open("deepvit train -m ...", None, [
            {"overrides": [folder.name], "folder": str(folder.relative_to(top)), "settings": dict(flat(config))}
            for folder, config in zip(folders, configs)], {})
        for number, folder in enumerate(folders):
            failed = number == len(folders) - 1
            record.add(number, [folder.name], int(failed), "Out of luck." if failed else "", folder, {})
        for folder in folders[-2:]:
            shutil.rmtree(folder)
    return make_record


def test_cells_that_a_sweep_was_to_run_are_marked(make_run, swept, tmp_path):
    swept(*(make_run(f"{depth}-{name}", model__depth=depth, model__attention=attention(name))
            for depth, name in ((8, "self"), (8, "reattention"), (16, "self"), (16, "reattention"))))
    grid = the_grid(tmp_path)
    assert [(cell.depth, cell.attention, cell.status) for cell in grid.cells] == [
        (8, "self", ""), (8, "reattention", ""), (16, "self", "missing"), (16, "reattention", "missing (Out of luck)")]
    assert "missing" in tables.tables(grid, 0.9)[0].rows[-1][-1] and len(grid.runs) == 2
    below = grids(runs.read_runs([tmp_path / "runs" / "digits" / "vit"])[0])  # the record lies above
    assert [cell.status for cell in below[0].cells] == [cell.status for cell in grid.cells]
    assert all(cell.runs[0].finished for cell in the_grid(tmp_path / "runs" / "digits" / "vit" / "8-self").cells)


def test_a_missing_seed_is_named(make_run, swept, tmp_path):
    swept(*(make_run(f"{depth}-{seed}", model__depth=depth, seed=seed) for depth in (8, 16) for seed in (0, 1)))
    make_run("16-0", model__depth=16)
    assert [cell.status for cell in the_grid(tmp_path).cells] == ["", "seed 1: missing (Out of luck)"]


def test_without_a_record_nothing_is_said_to_be_missing(make_run, tmp_path):
    for depth, name in ((8, "self"), (8, "reattention"), (16, "self")):
        make_run(f"{depth}-{name}", model__depth=depth, model__attention=attention(name))
    assert len(the_grid(tmp_path).cells) == 3


def test_what_a_run_began_from_is_named(make_run, tmp_path):
    make_run("a", model__depth=8)
    assert "similar untrained final" in tables.tables(the_grid(tmp_path), 0.9)[0].headers
    make_run("b", model__depth=16, init="weights.npz")
    headers = tables.tables(the_grid(tmp_path), 0.9)[0].headers
    assert "similar untrained or of init final" in headers and "similar trained final" in headers


def test_runs_of_other_images_are_named(make_run, tmp_path, capsys, undrawn):
    """Of the same settings, but for the folder that `data.root` named or what was in it."""
    for seed, count in enumerate((20, 20, 10)):
        marks = {"train": [32, "a", "b"], "val": [count, f"of {count}", "c"]}
        make_run(f"run-{seed}", seed=seed, result={"made_of": {"pictures": marks}})
    make_run("part", seed=3, data__fraction=0.5, result={"made_of": {"pictures": {**marks, "train": [16, "d", "e"]}}})
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("of other images") == 1 and "run-2 is of other images (32 and 10 to evaluate)" in said


def test_a_run_that_was_continued_with_other_settings_is_named(make_run, tmp_path, capsys, undrawn):
    path = make_run("a") / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["origin"]["changes"] = ["optimizer.lr=0.5 instead of 0.1 from step 7 on"]
    path.write_text(yaml.safe_dump(config))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "a has optimizer.lr=0.5 instead of 0.1" in capsys.readouterr().out


def test_settings_that_differ_become_columns(make_run, tmp_path):
    make_run("a", model__embed_dim=48, model__num_heads=3, engine__log_every=7)
    make_run("b", model__embed_dim=96, model__num_heads=6)
    grid = the_grid(tmp_path)
    assert grid.extras == ("embed_dim",) and [cell.extras for cell in grid.cells] == [(48,), (96,)]
    assert any("num_heads" in note for note in tables.tables(grid, 0.9)[0].notes)
    rows = list(csv.DictReader(io.StringIO(render.as_csv([grid], 0.9))))
    assert [(row["model.embed_dim"], row["model.num_heads"]) for row in rows] == [("48", "3"), ("96", "6")]


def test_one_number_is_one_value(make_run, tmp_path):
    make_run("a", model__mlp_ratio=3, seed=0, augment__mixup=0)
    make_run("b", model__mlp_ratio=3.0, seed=1, augment__mixup=0.0)
    assert the_grid(tmp_path).extras == () and len(the_grid(tmp_path).cells) == 1
    make_run("c", model__mlp_ratio=4.0, seed=1)
    assert [cell.details(the_grid(tmp_path)) for cell in the_grid(tmp_path).cells] == [["mlp_ratio 3"], ["mlp_ratio 4"]]


def test_runs_that_differ_in_many_settings_become_several_tables(make_run, tmp_path, capsys, undrawn):
    many = {"optimizer__lr": 0.5, "optimizer__weight_decay": 0.2, "schedule__epochs": 3, "model__drop_rate": 0.1,
            "data__root": "/home/me/images"}
    for seed in (0, 1):
        make_run(f"scratch-{seed}", seed=seed)
        make_run(f"tuned-{seed}", seed=seed, init="/home/me/best.pt", **many)
    found = grids(runs.read_runs([tmp_path])[0])
    assert [(len(grid.runs), grid.extras) for grid in found] == [(2, ()), (2, ())]
    assert len({grid.name for grid in found}) == 2
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    for page in ("report.md", "report.html", "report.csv"):
        text = (tmp_path / "out" / page).read_text()
        assert "/home/me" not in text and str(tmp_path) not in text
    assert "deepvit report" in (tmp_path / "out" / "report.md").read_text()


def test_a_sweeps_runs_stay_in_one_table(make_run, tmp_path):
    folders = [make_run(str(at), optimizer__lr=0.1 * at, schedule__epochs=at % 2 + 2, model__drop_rate=0.1 * (at % 3),
                        optimizer__weight_decay=0.1 * (at % 4), model__embed_dim=48 * (at % 5 + 1)) for at in range(6)]
    alone = len(grids(runs.read_runs([tmp_path])[0]))
    SweepRecord(tmp_path / "runs/sweeps/mine-0.jsonl", "1").open("deepvit", "mine", [
        {"overrides": [], "folder": str(folder.relative_to(tmp_path / "runs")), "settings": {}}
        for folder in folders], {})
    assert alone > 1 and the_grid(tmp_path).name.endswith("sweep mine")


def test_labels_say_what_differs(make_run):
    folders = [make_run("a", model__attention=attention("self")),
               make_run("b", model__attention=attention("reattention"), seed=1, engine__log_every=3)]
    assert labels([runs.read_run(folder).settings for folder in folders]) == ["self, seed 0", "reattention, seed 1"]


def test_a_single_value_is_a_dot(make_run):
    folder = make_run("a")
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 2.0}\n')
    axes = Figure().subplots()
    draw_curve(axes, runs.read_run(folder), "loss")
    assert axes.lines[0].get_marker() == "o"


def test_augmentation_goes_by_the_name_that_was_chosen(make_run, tmp_path):
    make_run("none")
    make_run("light", augmentation="light", augment__crop_scale=[0.6, 1.0])
    grid = the_grid(tmp_path)
    assert grid.extras == ("augment",) and {cell.extras for cell in grid.cells} == {("none",), ("light",)}
    make_run("changed", augmentation="light", augment__crop_scale=[0.6, 1.0], augment__mixup=0.2)
    assert the_grid(tmp_path).extras == ("augment.mixup", "augment")


def test_runs_that_do_not_tell_their_choices_are_told_apart_by_values(make_run, tmp_path):
    make_run("none")
    folder = make_run("old", augment__mixup=0.2)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["origin"]["choices"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert the_grid(tmp_path).extras == ("augment.mixup",)
    del config["origin"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert [grid.name for grid in grids(runs.read_runs([tmp_path])[0])] == [
        "digits, recipe not recorded", "digits, recipe digits"]


def test_attentions_of_one_name_are_told_apart(make_run, tmp_path):
    for rate in (0.1, 0.2):
        make_run(str(rate), model__attention={"name": "attention_dropout", "class": "SelfAttention", "attn_drop": rate})
    assert [cell.attention for cell in the_grid(tmp_path).cells] == [
        "attention_dropout (attn_drop=0.1)", "attention_dropout (attn_drop=0.2)"]


def test_files_of_one_name_are_told_apart(make_run, tmp_path):
    for seed, name in enumerate("ab"):
        make_run(name, init=f"/home/me/{name}/best.pt", seed=seed)
    grid = the_grid(tmp_path)
    assert [cell.extras for cell in grid.cells] == [(".../a/best.pt",), (".../b/best.pt",)] and not grid.duplicates
    make_run("c", init="/home/me/c/other.pt", seed=2)
    assert [cell.extras for cell in the_grid(tmp_path).cells][-1] == (".../c/other.pt",)


def test_a_repeated_run_counts_once(make_run, tmp_path):
    make_run("a")
    make_run("b")
    grid = the_grid(tmp_path)
    assert len(grid.cells[0].runs) == 1 and "repeats" in grid.duplicates[0]


def test_different_data_and_recipes_get_tables_of_their_own(make_run, tmp_path, capsys):
    make_run("a", data__source="cifar10", recipe="cifar10")
    make_run("b", recipe="imagenet", data__source="imagenet")
    make_run("c", recipe="imagenet_32b", data__source="imagenet")
    assert [grid.name for grid in grids(runs.read_runs([tmp_path])[0])] == [
        "cifar10, recipe cifar10", "imagenet, recipe imagenet", "imagenet, recipe imagenet_32b"]
    shutil.rmtree(tmp_path / "runs" / "cifar10")
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 experiments" in printed and printed.count("Accuracy and similar blocks") == 2
    assert len(list((tmp_path / "out" / "figures").glob("imagenet-imagenet-32b*curves.png"))) == 1


# The paper's numbers

IMAGENET = {"data__source": "imagenet", "model__embed_dim": 384, "model__num_heads": 12, "model__img_size": 224,
            "model__patch_size": 16, "recipe": "imagenet"}


def test_published_numbers_stand_beside_the_same_cells_only(make_run, tmp_path):
    whole, deepvit32 = {"top1": 80.0, "n": 50_000}, {"model__depth": 32, "model__attention": attention("reattention")}
    make_run("a", **IMAGENET, **deepvit32, result=whole)
    make_run("b", **IMAGENET, model__depth=32, model__attention=attention("reattention_fc"), result=whole)
    make_run("c", **{**IMAGENET, "model__embed_dim": 512}, **deepvit32, result=whole)
    make_run("d", **IMAGENET, **deepvit32, data__fraction=0.1, result=whole)
    table = tables.tables(the_grid(tmp_path), 0.9)[0]
    column, difference = table.headers.index("published"), table.headers.index("difference")
    begun = [row for row in table.rows if row[-1] != "missing"]
    assert sorted(row[column] for row in begun) == ["80.90 [readme1]"] + 3 * ["–"]
    assert [row[difference] for row in table.rows if "80.90" in row[column]] == ["-0.90"]
    assert any("80.9 [figure]" in note for note in table.notes)
    assert any("similar blocks as published" in note.lower() for note in table.notes)


@pytest.mark.parametrize("changes", [{}, {  # any folder can be data=imagenet
    **IMAGENET, "model__depth": 32, "model__attention": attention("reattention"), "result": {"n": 200}}])
def test_columns_of_the_papers_numbers_are_left_out_where_it_has_none(make_run, tmp_path, changes):
    make_run("a", **changes)
    table = tables.tables(the_grid(tmp_path), 0.9)[0]
    assert not {"published", "difference", "status"} & {*table.headers}


def test_every_published_number_has_a_source_and_a_place():
    for entry in published.ENTRIES:
        assert entry.source in published.SOURCES and 50 < entry.top1 < 100
        assert {"data.source", "model.depth", "model.attention.name"} <= set(entry.match)
    for other in published.OTHERS:
        assert other.source in published.SOURCES and 80 < other.top1 < 90 and 2e7 < other.params < 1e8
        assert other.img_size and other.remark and not other.match
    readme = {entry.model: (entry.top1, entry.similar_blocks) for entry in published.ENTRIES
              if entry.source == "readme1"}
    assert readme == {"ViT-16": (78.88, 5), "DeepViT-16": (79.10, 0), "ViT-24": (79.35, 11), "DeepViT-24": (79.99, 0),
                      "ViT-32": (79.27, 15), "DeepViT-32": (80.90, 0)}


# Runs at work, stopped, broken

def test_progress_of_an_unfinished_run(make_run, tmp_path):
    folder = make_run("a", finished=False)
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    half = len(whole) // 2
    (folder / "metrics.jsonl").write_text("\n".join(whole[:half]) + "\n" + whole[half][:20])
    (folder / "events.jsonl").write_text('{"event": "start"}\n')
    run = runs.read_run(folder)
    done = max(json.loads(line)["step"] for line in whole[:half])
    total = json.loads(whole[-1])["step"]
    assert (run.state, run.step, run.total) == ("unfinished", done, total)
    assert f"step {done}/{total}" in the_grid(tmp_path).cells[0].status


def test_states(make_run, template):
    folder = make_run("a", finished=False)
    run = RunFolder(folder)
    run.claim()
    assert runs.read_run(folder).state == "running"
    run.release()
    (folder / "events.jsonl").write_text('{"event": "start"}\n{"event": "PREEMPTED"}\n')
    assert runs.read_run(folder).state == "stopped"
    (folder / "events.jsonl").write_text('{"event": "start"}\n{"event": "PREEM')
    (folder / "lock").write_text("process 1 on another-machine")
    assert runs.read_run(folder).state == "unfinished (last worked on by another-machine)"
    assert runs.read_run(template).state == "finished"


def test_one_broken_run_does_not_stop_the_rest(make_run, tmp_path, capsys, undrawn):
    make_run("good")
    (make_run("poisoned") / "config.yaml").write_bytes(b"\xff\xfe: [")
    (make_run("foreign") / "config.yaml").write_text("hello: world\n")
    torn = make_run("torn", seed=1)
    (torn / "metrics.json").write_text('{"finished": true, "top1": 9')
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "poisoned/config.yaml cannot be read" in printed and "foreign/config.yaml is not the config" in printed
    assert "seed 1: unfinished" in printed


def test_a_run_without_a_probe_still_has_its_row(make_run, tmp_path):
    make_run("a", result={"probe_initial": None, "probe_final": None})
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "figures" / "blocks.png").exists()


def test_only_begun_runs_can_be_reported(make_run, tmp_path, undrawn):
    folder = make_run("a", finished=False)
    (folder / "metrics.jsonl").unlink()
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("arguments, words", [
    ([], "Give run folders"),
    (["{tmp}/nowhere"], "does not exist"),
    (["{tmp}/empty"], "No config.yaml"),
    (["{sweep}", "--compare", "{tmp}/empty", "{tmp}/empty", "--out", "{tmp}/r"], "cannot be read"),
    (["{sweep}", "--out", "{tmp}/file/out"], "cannot be written"),
])
def test_bad_input_is_one_sentence(arguments, words, tmp_path, capsys, undrawn):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["report", *[word.format(tmp=tmp_path, sweep=SWEEP) for word in arguments]]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


@pytest.mark.parametrize("threshold", ["90", "-1.1", "nan"])
def test_a_threshold_that_is_no_cosine_is_refused(threshold, tmp_path, capsys):
    assert main(["report", str(SWEEP), f"--threshold={threshold}", "--out", str(tmp_path / "out")]) == 2
    assert re.match(r"--threshold=.* at least -1 and at most 1", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_threshold_that_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(SWEEP), "--threshold", "abc"])
    assert stopped.value.code == 2 and "--threshold" in capsys.readouterr().err


# Two runs

def test_compare_names_what_differs(make_run, tmp_path, capsys, undrawn):
    first, second = make_run("a"), make_run("b", optimizer__lr=0.5, result={"top1": 12.5})
    assert main(["report", "--compare", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["optimizer.lr", "0.001", "0.5"] in rows
    assert not any(row and row[0] == "optimizer.weight_decay" for row in rows)
    assert (tmp_path / "out" / "figures" / "compare.svg").exists()


# Forms of a table

def test_table_forms_escape_what_they_hold():
    table = tables.Table("a < b", ["attention", "x|y"], [["<self>", "1|2"], ["a", "10"]], ["5 & 6"])
    assert "&lt;self&gt;" in write.as_html(table) and "5 &amp; 6" in write.as_html(table)
    assert "1\\|2" in write.as_markdown(table)
    ends = {len(line.rstrip()) for line in write.as_text(table).splitlines() if line.endswith(("1|2", "10"))}
    assert len(ends) == 1  # numbers are flush right


@pytest.mark.parametrize("labels", [
    ["self", "reattention", "attn_scale", "centred", "contrast", "reattention_identity", "reattention_ln", "qk_norm"],
    [f"self, lr {rate}" for rate in range(MAX_LINES)], [*ATTENTION_ORDER]], ids=len)
def test_lines_of_a_legend_differ(labels):
    assert len({tuple(look(label, labels).values()) for label in labels}) == len(labels)
    assert look("reattention", ["reattention"]) == look("reattention", [*labels, "reattention"])
