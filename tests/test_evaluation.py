"""What an evaluation tells beside its top-1: the worst classes, further folders, nearest neighbours of each block."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from test_engine import ALONE, Images, take
from test_programs import TINY
from torch import nn

import deepvit
from deepvit.engine.evaluate import Evaluation, evaluate
from deepvit.engine.step import Precision
from deepvit.errors import BAD_INPUT, DONE
from deepvit.run.eval_results import by_class
from deepvit.run.knn import TEMPERATURE, block_features, vote

CLASSES = ["ant", "bee", "cow"]


@pytest.fixture
def folders(tmp_path):
    """data/{train,val}/<class> of images in three shades, other/<class> of two classes, and a model of the three."""
    random = np.random.default_rng(0)
    for part, classes in (("data/train", CLASSES), ("data/val", CLASSES), ("other", CLASSES[1:])):
        for place, name in enumerate(classes):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                pixels = np.clip(random.normal(60 + 70 * place, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    torch.manual_seed(1)
    model = deepvit.create_model("vit", img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=3)
    deepvit.save_model(model, tmp_path / "m.pt", classes=CLASSES)
    return tmp_path


def results(folder, name="metrics.json"):
    return [json.loads(path.read_text()) for path in sorted(folder.rglob(name))]


def test_no_evaluation_takes_the_place_of_another(run, folders):
    for arguments in (["data.root=data/val"], ["data.root=other"], ["-m", "data.root=other", "precision=fp32,bf16"]):
        assert run("eval", *arguments, "checkpoint=m.pt", "data=folder", "out=out")[0] == DONE
    assert sorted(result["n"] for result in results(folders / "out")) == [12, 12, 12, 18]


def test_classes_are_named_the_worst_first_and_further_folders_are_rows(run, folders):
    code, said, _ = run("eval", "checkpoint=m.pt", "data=folder", "data.root=data", "also=[other]", "out=out")
    assert code == DONE and said.count("| m.pt ") == 2 and "| other " in said and "among its classes" in said
    assert "top-5" not in said and "worst classes" in said
    further, own = sorted(results(folders / "out"), key=lambda result: result["n"])
    assert (further["n"], own["n"]) == (12, 18) and "top5" not in own and "present_top1" not in own
    assert further["present_top1"] >= further["top1"]
    (path,) = (path for path in (folders / "out").rglob("predictions.csv") if "-folder-" in str(path.parent))
    rows = list(csv.DictReader(path.open()))
    assert {row["target"] for row in rows} == set(CLASSES) and {row["prediction"] for row in rows} <= set(CLASSES)
    assert 100 * np.mean([row["target"] == row["prediction"] for row in rows]) == pytest.approx(own["top1"])
    classes = list(csv.DictReader((path.parent / "classes.csv").open()))
    for row in classes:
        right = [one["prediction"] == row["class"] for one in rows if one["target"] == row["class"]]
        assert float(row["top1"]) == pytest.approx(100 * np.mean(right), abs=0.01) and int(row["images"]) == len(right)
    assert [row["class"] for row in classes[:3]] == [row["class"] for row in own["worst_classes"]]
    code, _, sentence = run("eval", "checkpoint=m.pt", "data=folder", "data.root=data", "also=gone", "out=out")
    assert code == BAD_INPUT and "gone" in sentence


@pytest.mark.parametrize("words", [["data.root=data", "knn=19"], ["data.root=data/val", "calibrate=9"]], ids=" ".join)
def test_a_refused_evaluation_leaves_no_folder(run, folders, words):
    before = {*folders.rglob("*")}
    code, *_ = run("eval", "checkpoint=m.pt", "data=folder", *words)
    assert code == BAD_INPUT and {*folders.rglob("*")} - before == set()


def test_a_loss_that_is_not_finite_is_null_in_the_file(run, folders):
    model = deepvit.load_model(folders / "m.pt")
    torch.nn.init.constant_(model.head.weight, 3e38)
    deepvit.save_model(model, folders / "huge.pt", classes=CLASSES)
    assert run("eval", "checkpoint=huge.pt", "data=folder", "data.root=data", "out=out")[0] == DONE
    assert [one["loss"] for one in results(folders / "out")] == [None]


def test_the_worst_class_and_what_it_is_taken_for():
    targets, guesses = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 1, 1, -1])
    found = Evaluation(6, 3, 3, 0.0, 1.0, targets=targets, predictions=guesses[:, None])
    assert [tuple(row.values()) for row in by_class(found, CLASSES)] == [
        ("cow", 1, 0.0, "", 0), ("ant", 3, pytest.approx(100 / 3), "bee", 2), ("bee", 2, 100.0, "", 0)]


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_told_of_more_than_five_classes(classes):
    logits, targets = torch.eye(classes), torch.arange(classes)
    batch = Images(logits, (targets + 1) % classes, targets)
    found = evaluate(nn.Identity(), [batch], take, ALONE, Precision(), n=classes)
    assert ("top5" in found.summary()) == (classes > 5) and found.top1 == 0


def test_a_choice_among_some_classes():
    logits = torch.tensor([[3.0, 2, 1], [3, 1, 2], [0, 1, 2]])
    batch = Images(logits, torch.tensor([1, 1, 2]), torch.arange(3))
    found = evaluate(nn.Identity(), [batch], take, ALONE, Precision(), n=3, among=torch.tensor([1, 2]))
    assert found.correct1 == 1 and found.correct_present == 2


@pytest.mark.parametrize("k", [1, 7, 40])
def test_neighbours_vote_as_in_scikit_learn(k):
    random = torch.Generator().manual_seed(k)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 5, generator=random), dim=1) for n in (60, 33))
    labels = torch.randint(4, (60,), generator=random)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute",
                                  weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)).fit(bank, labels)
    assert vote(queries, bank, labels, k, 4).tolist() == theirs.predict(queries).tolist()


def test_features_of_the_last_block_are_what_the_classifier_sees():
    for settings in ({}, {"pool": "avg", "final_norm": "after_pool"}, {"representation_size": 16}):
        model = deepvit.create_model("vit", img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=2,
                                     num_classes=3, **settings).eval()
        x = torch.randn(2, 3, 16, 16)
        features = block_features(model, x)
        assert len(features) == 3
        torch.testing.assert_close(model.head(features[-1]), model(x))


def test_knn_of_any_checkpoint_on_other_classes(run, folders):
    words = ("eval", "checkpoint=m.pt", "data=folder", "out=out")
    code, said, _ = run(*words, "data.root=other", "data.val_fraction=0.5", "knn=3")
    assert code == DONE and "3 neighbours" in said and " 2 |" in said
    (found,) = results(folders / "out", "knn.json")
    assert found["n"] == found["train_images"] == 6 and found["top1_by_block"] == [100.0] * 3
    code, _, sentence = run(*words, "data.root=data", "knn=19")
    assert code == BAD_INPUT and "knn=19" in sentence and "18 training images" in sentence
    assert run(*words, "data.root=data", "knn=0")[0] == BAD_INPUT
    assert run(*words[:-1], "data.root=data", "knn=3")[0] == DONE and results(folders / "runs" / "eval", "knn.json")
    assert run("train", "-m", *TINY, "dry=true", "seed=0,1")[0] == DONE  # a sweep starts beside them, in runs/


def test_broken_images_are_wrong_and_nobodys_neighbours(run, folders):
    """And said, of an evaluation and a look at the neighbours alike."""
    for name in CLASSES:  # black, as broken ones are
        Image.new("RGB", (16, 16)).save(folders / "data" / "val" / name / "black.png")
    for part in ("train", "val"):
        (folders / "data" / part / "ant" / "bad.png").write_bytes(b"no image")
    words = ("eval", "checkpoint=m.pt", "data=folder", "data.root=data", "data.on_error=report", "out=out")
    code, said, err = run(*words, "knn=1")
    (found,) = results(folders / "out", "knn.json")
    assert code == DONE and found["n"] == 22 and (said + err).count("bad.png cannot be used") == 2
    with_broken = found["top1_by_block"]
    code, said, err = run(*words)
    assert code == DONE and "1 of 22 images cannot be used and count as wrong" in said + err
    for part in ("train", "val"):
        (folders / "data" / part / "ant" / "bad.png").unlink()
    assert run(*words, "knn=1")[0] == DONE
    (found,) = results(folders / "out", "knn.json")
    assert with_broken == pytest.approx([top1 * 21 / 22 for top1 in found["top1_by_block"]])
