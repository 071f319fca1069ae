"""Every setting of `deepvit eval` arrives: each entry changes one and names what must change with it."""

import copy
import csv
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from setting_data import make_data
from setting_outcomes import ALONE
from test_settings_arrive import BASE, names

from deepvit.config.compose import compose
from deepvit.config.settings import Data, EvalSettings
from deepvit.engine import evaluate as engine
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.run import evaluate, knn
from deepvit.run.launch import program
from deepvit.run.train import train

TRAINED = ["model/attention=reattention", "model.attention.norm_batch=6", "ema.decay=0.5", "schedule.epochs=1",
           "calibrate=0", "logger=null"]
PLACES: dict[str, Path] = {}  # what stands for a path in a setting -> the path


class Case(NamedTuple):
    """What `look` sees changes with the value `change`, beside what is `given`; to `wanted`, where told."""

    look: Callable[[SimpleNamespace], Any]
    change: Any
    given: dict[str, Any] = {}
    wanted: Any = None


def first(name: str) -> Callable:
    return lambda seen: seen.results[0][name]


def confidences(seen):
    return seen.confidences


def features(seen):
    """Of the images whose neighbours are sought."""
    return seen.votes[0].args[0].tolist()


TRAINING, LAUNCHING = "of training alone", "of launching, which is the same for training"
NEAREST, BAD, TARS = {"knn": 1}, {"data.root": "BAD"}, {"data.source": "timm", "data.root": "TARS"}
CASES: dict[str, Case | list[Case] | str] = {
    **dict.fromkeys(("data.batch_size", "data.hflip", "data.on_device", "precision.scale_gradients"), TRAINING),
    **dict.fromkeys((f"engine.{name}" for name in (
        "device_batch", "log_every", "save_every", "keep_epochs", "keep", "profile", "grad_checkpointing", "compile",
        "max_skipped")), TRAINING),
    **dict.fromkeys((f"engine.{name}" for name in ("devices", "accelerator", "timeout_s", "max_restarts")), LAUNCHING),
    "data.img_size": "the model's",
    "data.source": Case(first("data"), "imagenet", {"data.root": "PHOTOS"}, "imagenet"),
    "data.root": Case(first("n"), "FLAT", wanted=8),
    "data.eval_batch_size": Case(lambda seen: seen.batches, 4, wanted=[4, 2]),
    "data.workers": Case(lambda seen: max(seen.workers), 1, {"data.in_memory_mb": 0}, 1),
    "data.norm": [Case(confidences, "imagenet"), Case(features, "imagenet", NEAREST)],
    "data.crop_pct": Case(confidences, 0.5),
    "data.interpolation": Case(confidences, "bilinear"),
    "data.fraction": Case(confidences, 0.34, {"calibrate": 6}),
    "data.classes": Case(first("n"), 2, wanted=4),
    "data.val_fraction": Case(first("n"), 0.5, {"data.root": "FLAT"}, 4),
    "data.decoder": Case(lambda seen: seen.images.decoder, "pil", wanted="pil"),
    "data.max_bad": Case(confidences, 0, {**BAD, "calibrate": 12, "data.on_error": "report"}),  # which is refused
    "data.on_error": [Case(first("bad_pictures"), "report", BAD, 1),
                      Case(lambda seen: len(seen.votes), "report", {**BAD, **NEAREST, "data.classes": None})],
    "data.in_memory_mb": Case(lambda seen: seen.images.cache_decoded(), 0, wanted=False),
    "data.exclude": Case(first("n"), "UNUSED", wanted=5),
    "data.name": Case(first("n"), "wds", TARS),  # which is refused
    "data.train_split": Case(confidences, "more", {**TARS, "calibrate": 6}),
    "data.val_split": Case(first("n"), "more", TARS, 8),
    "precision.dtype": [Case(confidences, "bfloat16"), Case(first("precision"), "bfloat16", wanted="bfloat16"),
                        Case(features, "bfloat16", NEAREST)],
    "precision.tf32": Case(lambda seen: seen.tf32, True, wanted=(True, True)),
    "engine.threads": Case(lambda seen: seen.threads, 3, wanted=3),
    "engine.deterministic": Case(lambda seen: seen.deterministic, True, wanted=True),
    "checkpoint": [Case(first("step"), "EARLIER", wanted=0),
                   Case(lambda seen: len(seen.results), ["WEIGHTS", "EARLIER"], wanted=2)],
    "weights": [Case(confidences, "raw"), Case(first("weights"), "raw", {"weights": "ema"}, "raw")],
    "dialect": Case(first("dialect"), "timm"),  # which is refused
    "calibrate": [Case(confidences, 6), Case(confidences, 12, {"calibrate": 6})],
    "labels": Case(first("n"), "real", {"data.root": "REAL"}),  # which is refused: its classes are no wnids
    "ablate": Case(lambda seen: [one["form"] for one in seen.results[0].get("ablations", [])], "theta",
                   {"ablate": "blocks"}),
    "also": Case(lambda seen: sorted(result["n"] for result in seen.results), "FLAT", wanted=[6, 8]),
    "knn": Case(lambda seen: seen.votes[0].args[3], 3, NEAREST, 3),
    "out": [Case(lambda seen: seen.places, "ELSEWHERE", {"out": None}, {"elsewhere"}),
            Case(lambda seen: seen.places, "FAR", {"out": None, **NEAREST}, {"far"})],
    "model.img_size": Case(first("img_size"), 32, wanted=[32, 32]),
    "model.num_heads": Case(first("n"), 1),  # which is refused
    "model.arch": Case(first("n"), "vit_b16"),
    "origin": "test_images_are_prepared_as_in_training",
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    PLACES.update(make_data(root), TMP=root, ELSEWHERE=root / "elsewhere", FAR=root / "far", REAL=root / "real")
    for number, path in enumerate(sorted(PLACES["PHOTOS"].glob("val/*/*.png")), 1):
        named = PLACES["REAL"] / "val" / path.parent.name / f"ILSVRC2012_val_{number:08d}.JPEG"
        named.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, named)
    config = compose([word.replace("PHOTOS", str(PLACES["PHOTOS"])) for word in (*BASE, *TRAINED)])
    train(config, root / "run", ALONE, StopRequest())
    PLACES.update({"WEIGHTS": root / "run/checkpoints/best.pt", "EARLIER": root / "run/checkpoints/previous.pt"})


def placed(value: Any) -> Any:
    if isinstance(value, list):
        return [placed(one) for one in value]
    return str(PLACES.get(value, value)) if isinstance(value, str) else value


def seen_with(changes: dict[str, Any]) -> SimpleNamespace:
    """What an evaluation of the run shows."""
    config = copy.deepcopy(asked(changes.get("data.source")))
    out = tempfile.mkdtemp(dir=PLACES["TMP"])
    for name, value in {"checkpoint": "WEIGHTS", "out": out, **changes}.items():
        *groups, key = name.split(".")
        reduce(dict.__getitem__, groups, config)[key] = placed(value)
    seen = SimpleNamespace(batches=[], workers=[])

    def score(model, batch, *rest):
        seen.batches.append(len(batch))
        seen.workers.append(len(multiprocessing.active_children()))
        return real_score(model, batch, *rest)

    real_score, folder = engine._score, Path(config["out"] or PLACES["TMP"] / "run" / "eval")
    with (mock.patch.object(engine, "_score", score), mock.patch.object(knn, "vote", wraps=knn.vote) as vote,
          mock.patch.object(evaluate, "Evaluator", wraps=evaluate.Evaluator) as made):
        program("eval", config, Path("."))(config, ALONE, StopRequest())
    files = [*folder.rglob("predictions.csv"), *folder.rglob("knn.json")]
    seen.places = {path.relative_to(PLACES["TMP"]).parts[0] for path in files}
    seen.results = [json.loads(path.read_text()) for path in folder.rglob("metrics.json")]
    seen.confidences = [row["confidence"] for path in files if path.suffix == ".csv"
                        for row in csv.DictReader(path.open())]
    seen.votes, seen.images = vote.call_args_list, made.call_args and made.call_args.args[1]
    seen.tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen.threads, seen.deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return seen


@cache
def asked(source: str | None = None) -> dict[str, Any]:
    """As composed; what a run was trained on is taken where no `source` is given."""
    return compose(["engine.accelerator=cpu", *([f"data={source}", "data.workers=0"] if source else [])], "eval")


def outcome(look: Callable[[SimpleNamespace], Any], changes: dict[str, Any]) -> Any:
    """What is seen; of what is refused, the sentence."""
    threads = torch.get_num_threads()
    try:
        return look(seen_with(changes))
    except UserError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


EACH = [pytest.param(name, case, id=f"{name}-{number}") for name, cases in CASES.items() if not isinstance(cases, str)
        for number, case in enumerate(cases if isinstance(cases, list) else [cases])]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_it_arrives(name, case):
    before, after = (outcome(case.look, {**case.given, **change}) for change in ({}, {name: case.change}))
    assert after != before
    assert case.wanted is None or after == case.wanted


def test_every_setting_has_an_entry():
    groups = {f"data.{field.name}" for field in fields(Data)} | {f"model.{name}" for name in asked()["model"]}
    assert set(CASES) == names(EvalSettings) - {"data", "model"} | groups


@pytest.mark.parametrize(("typed", "norm"), [([], "imagenet"), (["data.norm=half"], "half"), (None, "half")])
def test_images_are_prepared_as_in_training(typed, norm):
    """Named data has a normalisation of its own, which is not the model's; what was typed is meant."""
    content = torch.load(PLACES["WEIGHTS"], weights_only=True)
    content["run"]["data"] |= {"norm": "imagenet", "crop_pct": 0.5}
    torch.save(content, path := PLACES["TMP"] / "otherwise.pt")
    seen = seen_with({"checkpoint": str(path), "data.source": "folder", "data.root": "PHOTOS",
                      "origin": None if typed is None else {"overrides": typed}})
    (result,) = seen.results
    assert (result["norm"], result["crop_pct"]) == (norm, 0.9 if typed is None else 0.5)


def test_what_has_no_effect_is_said(caplog):
    """The same settings as the entries above that change nothing."""
    idle = {name for name, case in CASES.items() if case == TRAINING}
    assert idle == evaluate.OF_TRAINING
    seen_with({"origin": {"overrides": ["data.batch_size=8", "data.crop_pct=0.9"]}})
    assert ["data.batch_size" in line and "data.crop_pct" not in line for line in caplog.messages
            if "No effect" in line] == [True]
    for more, is_said in (({}, True), ({"calibrate": 6}, False)):
        caplog.clear()
        seen_with({"origin": {"overrides": ["data.fraction=0.5"]}, **more})
        assert any("No effect" in line and "data.fraction" in line for line in caplog.messages) == is_said


def test_what_has_no_effect_beside_neighbours_is_refused():
    for name, value in {"ablate": "blocks", "also": "FLAT", "calibrate": 6, "labels": "real"}.items():
        with pytest.raises(UserError, match=f"{name}=.*knn=1"):
            seen_with({**NEAREST, name: value})


@pytest.mark.parametrize(("typed", "n"), [([], 4), (["data.val_fraction=null"], 8)])
def test_what_was_held_out_of_a_folder_is_evaluated(typed, n):
    """The rest of it is what the model was trained on."""
    run = PLACES["TMP"] / "held out"
    words = [word.replace("PHOTOS", str(PLACES["FLAT"])) for word in BASE]
    more = ["data.val_fraction=0.5", "data.batch_size=4", "schedule.epochs=1", "logger=null"]
    train(compose([*words, *more]), run, ALONE, StopRequest())
    seen = seen_with({"checkpoint": str(run), "data.source": "folder", "data.root": "FLAT",
                      "origin": {"overrides": typed}})
    assert [result["n"] for result in seen.results] == [n]
    if not typed:
        seen = seen_with({"checkpoint": str(run), "also": [str(PLACES["FLAT"])]})
        assert [result["n"] for result in seen.results] == [n, n]


def test_neighbours_in_other_images_have_a_folder_of_their_own():
    out = PLACES["TMP"] / "neighbours"
    for root in ("PHOTOS", "OTHER"):
        seen_with({**NEAREST, "out": str(out), "data.source": "folder", "data.root": root})
    assert len([*out.rglob("knn.json")]) == 2
