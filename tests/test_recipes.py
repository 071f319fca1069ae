"""What the rungs to ImageNet need: DeiT III's parts against timm's own, and a list of classes."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2

from deepvit.config.compose import compose
from deepvit.data.source import chosen
from deepvit.data.sources import load
from deepvit.data.stream import generators_kept, seed_sample
from deepvit.engine.ranks import Ranks
from deepvit.engine.step import OBJECTIVES, Status
from deepvit.errors import UserError
from deepvit.run import build

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("kind", "threshold"), [("bce", None), ("multi_label", 0.0)])
def test_the_loss_is_timms(kind, threshold, soft):
    """DeiT III's code has `targets.gt(0.0)`."""
    torch.manual_seed(0)
    network, x = torch.nn.Linear(6, 5), torch.randn(7, 6)
    y = torch.rand(7, 5).sub(0.5).relu() if soft else torch.randint(5, (7,))
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
    torch.testing.assert_close(OBJECTIVES[kind](network, x, y), theirs(network(x), y))


def test_deit3_wants_both_classes_of_a_mixed_image_whole():
    """And has its `--opt-eps`, where timm's LAMB has 1e-6 by itself."""
    settings = build.read_settings(compose(["recipe=imagenet_deit3", "data.root=x"]))
    assert build.optimizer(torch.nn.Linear(1, 1), settings.optimizer).param_groups[0]["eps"] == 1e-8
    x, y = torch.randn(2, 3), torch.tensor([[0.3, 0.7, 0.0], [0.3, 0.7, 0.0]])
    whole = BinaryCrossEntropy(smoothing=0.0)(x, torch.tensor([[1.0, 1.0, 0.0]] * 2))
    torch.testing.assert_close(build.objective(settings)(torch.nn.Identity(), x, y), whole)
    with pytest.raises(UserError, match="label_smoothing=0.1 .* set it to 0"):
        build.read_settings(compose(["recipe=imagenet_deit3", "data.root=x", "augment.label_smoothing=0.1"]))


def test_updates_by_lamb_and_bce_are_timms():
    """Three updates of the digits, of timm's parts alone, with the smoothing that timm's loss does by itself."""
    settings = build.read_settings(compose([
        "model=vit", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "optimizer=lamb", "loss.kind=bce",
        "augment.label_smoothing=0.1", "schedule=constant", "schedule.warmup_epochs=0", "data.batch_size=32"]))
    built = build.build(settings, ALONE)
    theirs, loss = copy.deepcopy(built.model), BinaryCrossEntropy(smoothing=0.1)
    optimizer = create_optimizer_v2(theirs, "lamb", lr=2e-3, weight_decay=0.05)  # the recipe's rate
    prepare = build.prepare(settings.data, 10)
    for batches in built.make_batches(0, 3):
        assert built.stepper.update(built.state, batches)[0] is Status.DONE
        optimizer.zero_grad()
        x, y = prepare(batches[0], 0, ALONE.device, training=False)
        loss(theirs(x), y).backward()
        optimizer.step()
    for ours, other in zip(built.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_three_augment_is_timms():
    """timm's own pipeline of DeiT III's `--ThreeAugment --color-jitter 0.3`, for the same draws."""
    config = compose(["recipe=imagenet_deit3", "data.root=x", "model.img_size=64"])
    ours = build.train_transform(build.read_settings(config).data, build.read_settings(config).augment)
    theirs = create_transform(64, is_training=True, auto_augment="3a", color_jitter=0.3, interpolation="bicubic",
                              re_prob=0.0, use_prefetcher=True)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    with generators_kept():
        for draw in range(12):
            seed_sample(draw, 0, 0, 0)
            mine = ours(photo)[0]
            seed_sample(draw, 0, 0, 0)
            assert torch.equal(mine, theirs(photo))


def test_imagenet_100_is_100_classes_of_imagenet():
    from timm.data import ImageNetInfo
    names = ImageNetInfo().label_names()
    kept = chosen("imagenet100", names)
    assert len(kept) == 100 and kept == sorted(kept) and kept[0] == "n01558993" and kept[-1] == "n13040303"


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for number, name in enumerate("abcd"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (60 * number, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("val_fraction", [None, 0.34])
def test_a_list_of_classes(folder, val_fraction):
    """By name, in the folders' order, targets from 0; the same from two folders and from one that is split."""
    (folder / "list.txt").write_text("# two of four\nd b\n")
    root = folder / "train" if val_fraction else folder
    found = load("folder", root=str(root), classes=str(folder / "list.txt"), val_fraction=val_fraction)
    assert found.class_ids == found.class_names == ["b", "d"]
    half = load("folder", root=str(root), classes=str(folder / "list.txt"), val_fraction=val_fraction, fraction=0.5)
    for part in (found.train, found.val, half.train):
        assert sorted({*part.targets.tolist()}) == [0, 1]
        for index, target in enumerate(part.targets):
            assert part.name(index).split("/")[-2] == found.class_ids[target]


@pytest.mark.parametrize(("content", "words"), [
    ("a x", ["x", "lacks 1"]), ("a", ["two"]), ("a b a", ["once"]), (None, ["list.txt", "imagenet100"])])
def test_a_wrong_list_is_refused(folder, content, words):
    if content:
        (folder / "list.txt").write_text(content)
    with pytest.raises(UserError) as refusal:
        load("folder", root=str(folder), classes=str(folder / "list.txt"))
    assert "data.classes=" in str(refusal.value) and all(word in str(refusal.value) for word in words)


def test_copies_of_an_image_fill_deit3s_batches_on_one_node():
    """2304 images: three copies each, and on 8 devices whole groups of the head norm."""
    from deepvit.run.micro_batches import allowed
    settings = build.read_settings(compose(["model=vit_s16", "model/attention=reattention", "recipe=imagenet_deit3",
                                            "data.root=x"]))
    for world in (1, 2, 4, 8):
        assert allowed(settings, {32}, world)[0] == settings.data.batch_size // world
    assert settings.data.batch_size % settings.augment.repeats == 0
