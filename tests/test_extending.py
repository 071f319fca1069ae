"""The examples of docs/extending.md do what the page says of them."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import deepvit
from deepvit import analysis
from deepvit.analysis import measures
from deepvit.data import sources
from deepvit.engine import loggers, schedule
from deepvit.models import ATTENTIONS
from deepvit.report import tables

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SMALL = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 4}


@pytest.fixture(autouse=True)
def ran():
    """All blocks, each as a file of its own; afterwards the registries are as before."""
    registries = measures.MEASURES, loggers.LOGGERS, schedule.DECAYS, ATTENTIONS, sources.SOURCES, tables.COSTS
    before = [(entries, dict(entries)) for entries in registries]
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, {"__name__": "extended"})
    yield
    for entries, kept in before:
        entries.clear()
        entries.update(kept)


def written(file: str) -> str:
    """The example of a YAML file."""
    return re.search(rf"```yaml\n(# {file}\n.*?)```", PAGE, re.DOTALL)[1]


def test_an_attention_of_settings_and_one_of_a_class():
    settings = yaml.safe_load(written("conf/model/attention/loud.yaml"))
    x = torch.randn(2, 3, 16, 16)
    for attention in ({key: value for key, value in settings.items() if key != "name"}, {"class": "ReluAttention"}):
        model = deepvit.create_model("vit", **SMALL, attention=attention).eval()
        module, tokens = model.blocks[1].attn, torch.randn(2, 5, 24)
        with torch.no_grad():
            v = module.split(tokens)[2]
            torch.testing.assert_close(module.merge(module.weights(tokens) @ v), module(tokens))
        assert [len(maps) for maps in analysis.attention_maps(model, x)] == [2, 2]


def test_a_data_set_is_learned(run, tmp_path):
    """Half of it, with what a data set gets for nothing."""
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "stripes.yaml").write_text(written("conf/data/stripes.yaml"))
    code, said, _ = run("train", "--config-dir", str(tmp_path / "conf"), "data=stripes", "data.fraction=0.5",
                        "model=vit", "model.depth=1", "schedule.epochs=3", "schedule.warmup_epochs=0", "probe.images=0",
                        f"hydra.run.dir={tmp_path}/run")
    assert code == 0 and "200 images in 2 classes from stripes, 100 to evaluate" in said
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["top1"] > 90


def test_a_measure_is_probed():
    found = analysis.probe(deepvit.create_model("vit", **SMALL), torch.randn(2, 3, 16, 16))
    assert len(found["first_token"]) == 2 and all(0 < value < 1 for value in found["first_token"])


def test_a_viewer_is_told(run, tmp_path):
    code, *_ = run("train", "model=vit", "model.depth=1", "data.batch_size=256", "schedule.epochs=1",
                   "schedule.warmup_epochs=0", "engine.log_every=2", "probe.images=0", "logger=lines",
                   f"hydra.run.dir={tmp_path}/run")
    lines = (tmp_path / "run" / "scalars.tsv").read_text().splitlines()
    assert code == 0 and any(line.startswith("train\tloss\t2\t") for line in lines)


def test_a_schedule_falls_as_it_says():
    rate = schedule.Schedule(lr=1.0, steps=100, kind="sqrt")
    assert rate(25) == pytest.approx(0.5) and rate(100) == pytest.approx(0.0)


def test_a_column_is_in_the_report(run, tmp_path, undrawn):
    runs = Path(__file__).parent / "data" / "report"
    code, _, _ = run("report", str(runs), "--out", str(tmp_path / "report"))
    results = {json.loads(path.read_text())["best_top1"] for path in runs.rglob("metrics.json")}
    page = (tmp_path / "report" / "report.md").read_text()
    assert code == 0 and "best top-1 %" in page and all(f" {top1:.2f} " in page for top1 in results)
