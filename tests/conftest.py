"""Shared by all tests: one thread (two cores are often shared), and either no GPU or one that was asked for."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

DATA = Path(__file__).parent / "data"


def pytest_configure(config):
    """A GPU is hidden from this process and its children unless `-m gpu` asks for it: all other tests state what holds
    on a CPU, to the bit and with any number of ranks, and must not move because the host has a GPU."""
    torch.set_num_threads(1)
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device and `pytest -m gpu`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a test printed may be a name that is no UTF-8, which pytest-xdist cannot send on to who reports."""
    report = yield
    report.sections = [(title, _printable(text)) for title, text in report.sections]
    if report.failed and _printable(report.longreprtext) != report.longreprtext:
        report.longrepr = _printable(report.longreprtext)
    return report


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture
def undrawn(monkeypatch):
    """For tests of words and numbers: the pictures take most of a report's time."""
    monkeypatch.setattr("deepvit.report.write.charts", lambda *_: [])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The CPU, and the first GPU for `-m gpu`: one body serves both."""
    return torch.device(request.param, 0 if request.param == "cuda" else None)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """`run("train", "model=vit", ...)` -> (exit code, standard output, standard error), started in an empty folder."""
    from hydra.core.global_hydra import GlobalHydra

    from deepvit.commands.main import main
    monkeypatch.chdir(tmp_path)

    def start(program: str, *words: str) -> tuple[int, str, str]:
        GlobalHydra.instance().clear()
        code = main([program, *words])
        torch.set_num_threads(1)
        return code, *capfd.readouterr()

    return start


@pytest.fixture(scope="session")
def template() -> Path:
    """A finished run of a real sweep: a copy of its JSON."""
    return next(path.parent for path in sorted((DATA / "report").rglob("metrics.json")))


@pytest.fixture
def make_run(template, tmp_path):
    """Makes run folders from the `template`: settings by dotted key, results by name."""
    def make(name: str, recipe: str = "digits", result: dict | None = None, finished: bool = True,
             augmentation: str = "none", **settings):
        folder = tmp_path / "runs" / recipe / "vit" / name
        folder.mkdir(parents=True)
        config = yaml.safe_load((template / "config.yaml").read_text())
        for key, value in settings.items():
            *groups, last = key.split("__")
            values = config
            for group in groups:
                values = values[group]
            values[last] = value
        config["origin"] = {"recipe": recipe, "choices": {"augment": augmentation, "precision": "fp32"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for name in ("metrics.jsonl", "events.jsonl"):
            shutil.copy(template / name, folder)
        if finished:
            content = json.loads((template / "metrics.json").read_text())
            (folder / "metrics.json").write_text(json.dumps({**content, **(result or {})}))
        return folder
    return make
