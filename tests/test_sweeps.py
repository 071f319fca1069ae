"""Every cell of every sweep file composes to settings that hold, with the values that the file gives."""

import inspect
import random
import re
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from deepvit.config.compare import has_no_effect
from deepvit.config.compose import compose
from deepvit.models import build_model
from deepvit.report import published
from deepvit.report.runs import flat
from deepvit.run.build import read_settings

FOLDER = Path(__file__).parents[1] / "conf" / "sweep"
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PAPER_TABLES = ("depth_scaling", "embed_width", "variants", "temperature", "last_k", "augmentation", "data_fraction",
                "beyond_32", "state_of_the_art")
MOST_CELLS = 2  # composed of each file, drawn with its name as the seed


def body(sweep: str) -> dict:
    return yaml.safe_load((FOLDER / f"{sweep}.yaml").read_text())


def cells(sweep: str) -> list[list[str]]:
    """The command line of each cell, as Hydra's own sweeper writes them."""
    given = [f"{key}={value}" for key, value in body(sweep)["hydra"]["sweeper"]["params"].items()]
    overrides = OverridesParser.create().parse_overrides(given)
    return [list(cell) for cell in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]]


def drawn(sweep: str) -> list[list[str]]:
    """The last cell, whose every value is the last of its list, and others by chance."""
    *others, last = cells(sweep)
    return [*random.Random(sweep).sample(others, min(len(others), MOST_CELLS - 1)), last]


@pytest.fixture(scope="module")
def composed() -> dict[str, list[tuple[list[str], dict]]]:
    return {sweep: [(cell, compose([*cell, f"sweep={sweep}"])) for cell in drawn(sweep)] for sweep in SWEEPS}


def test_every_paper_table_has_a_sweep():
    assert {*PAPER_TABLES} <= {*SWEEPS}


@pytest.mark.parametrize("sweep", PAPER_TABLES)
def test_a_table_in_small_is_the_same_cells_with_another_recipe(sweep):
    """The recipe given again takes the place of the file's, as in Hydra's own sweeper."""
    cell = [word for word in cells(sweep)[-1] if not word.startswith("recipe=")]
    config = compose([*cell, f"sweep={sweep}", "recipe=cifar10_small", "data.root=/cifar10"])
    width = [word for word in cell if word.startswith("model.embed_dim=")]
    read_settings(config)
    assert config["data"]["source"] == "cifar10" and config["model"]["img_size"] == 32
    assert width or config["model"]["embed_dim"] == 96 and config["model"]["num_heads"] == 6


@pytest.mark.parametrize("sweep", SWEEPS)
def test_everything_stands_in_the_parameters(sweep):
    """Where `--help` and the report look for it."""
    content = body(sweep)
    assert list(content) == ["hydra"] and set(content["hydra"]) <= {"mode", "sweep", "sweeper", "callbacks"}
    assert content["hydra"]["mode"] == "MULTIRUN" and list(content["hydra"]["sweeper"]) == ["params"]
    assert {"model", "recipe"} <= set(content["hydra"]["sweeper"]["params"])


@pytest.mark.parametrize("sweep", SWEEPS)
def test_header_names_the_command_and_the_shared_recipe(sweep):
    header = [line for line in (FOLDER / f"{sweep}.yaml").read_text().splitlines() if line.startswith("#")]
    params = body(sweep)["hydra"]["sweeper"]["params"]
    assert header[0] == "# @package _global_"
    if sweep != "digits_depth":
        folders = (f"runs/{sweep}", f"docs/results/{sweep}/runs")  # so that a table's runs are by themselves
        assert body(sweep)["hydra"]["sweep"]["dir"] in folders
        assert any(f"python train.py -m sweep={sweep} " in line for line in header)
        assert f"recipe={params['recipe']}" in " ".join(header)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_what_a_sweep_varies_is_in_the_names_of_its_runs(sweep):
    """So each cell has a folder of its own."""
    assert not any(has_no_effect(key) for key, value in body(sweep)["hydra"]["sweeper"]["params"].items()
                   if "," in str(value))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_cells_hold_and_their_values_survive(sweep, composed):
    for cell, config in composed[sweep]:
        read_settings(config)
        assert config["data"]["source"] in sources(sweep)
        for override in cell:
            check_value(override, config)


def sources(sweep: str) -> set[str]:
    """Of its recipes: `finetune_cifar100` is of CIFAR-100, `imagenet_90ep` of ImageNet."""
    words = re.findall("digits|cifar100|cifar10|imagenet", body(sweep)["hydra"]["sweeper"]["params"]["recipe"])
    return {*words}


def check_value(override: str, config: dict) -> None:
    parsed = OverridesParser.create().parse_override(override)
    key, wanted = parsed.key_or_group, parsed.value()
    if key == "model/attention":
        assert config["model"]["attention"]["name"] == wanted
    elif key == "augment":
        assert config["augment"]["mixup"] == {"none": 0.0, "light": 0.0, "deepvit": 0.8}[wanted]
    elif key not in ("model", "recipe", "schedule"):
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == wanted and type(value) is type(wanted), override


@pytest.mark.parametrize("sweep", [sweep for sweep in SWEEPS if {"digits", "cifar10"} >= sources(sweep)])
def test_small_models_can_be_built(sweep, composed):
    """Heads divide widths, patches divide images, chosen blocks exist."""
    config = composed[sweep][-1][1]
    model = build_model({**config["model"], "num_classes": 10, "depth": config["model"]["depth"]})
    assert model.depth == config["model"]["depth"] and model.embed_dim == config["model"]["embed_dim"]


def test_a_table_of_the_paper_is_a_sweep_of_its_depths():
    params = body("depth_scaling")["hydra"]["sweeper"]["params"]
    assert params["model.depth"] == "12,16,24,32" and params["seed"] == "0,1,2"
    assert "norm_only" in params["model/attention"].split(",")


def test_every_row_of_vit_pytorchs_tables_is_a_cell_of_a_sweep():
    """And every cell of its sweeps has a number of its table to stand beside."""
    rows = {(entry.source, entry.model, entry.top1) for entry in published.ENTRIES
            if entry.source.startswith("vit_pytorch")}
    found = set()
    for sweep in (name for name in SWEEPS if name.startswith("vit_pytorch")):
        for cell in cells(sweep):
            first = published.published_of(dict(flat(compose([*cell, f"sweep={sweep}"]))))[0]
            found.add((first.source, first.model, first.top1))
    assert found == rows and len(rows) == 18


def test_the_plain_recipe_has_its_published_number():
    settings = dict(flat(compose(["model=vit_s16", "recipe=imagenet_90ep"])))
    assert [entry.top1 for entry in published.published_of(settings)] == [76.5]
    assert not published.published_of({**settings, "model.init_values": 1e-4})


@pytest.mark.parametrize("change", ["model.init_values=1e-4", "model.mlp_ratio=4", "init=/weights.npz"])
def test_the_papers_numbers_are_of_its_models_trained_from_the_start(change):
    recipe = ["model=deepvit16", "recipe=imagenet"]
    assert published.published_of(dict(flat(compose(recipe))))[0].top1 == 79.10
    assert not published.published_of(dict(flat(compose([*recipe, change]))))


def test_split_is_the_sweepers_own():
    """The cells above are what a multirun runs only as long as the sweeper's function keeps its form."""
    assert list(inspect.signature(BasicSweeper.split_arguments).parameters) == ["overrides", "max_batch_size"]
