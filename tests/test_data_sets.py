"""Data sets by name: what is found, in which order, and the sentence for everything that can be wrong."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.functional import pil_to_tensor

import deepvit.data as data
from deepvit.commands import preview
from deepvit.commands.main import main
from deepvit.config.compose import compose
from deepvit.data.decode import decode
from deepvit.engine.ranks import Ranks
from deepvit.errors import UserError
from deepvit.run import build

IMAGES = Path(__file__).parent / "data" / "images"  # CIFAR-10: 3 classes, 4 images to train, 2 to test


def pixels(images, index: int) -> torch.Tensor:
    image = images.image(index)
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def by_pil(content: bytes) -> torch.Tensor:
    return pil_to_tensor(decode(content, "pil")[0])


def test_digits_are_sklearns_in_a_fixed_balanced_split():
    splits = data.load("digits", decoder="pil", seed=7)
    assert (len(splits.train), len(splits.val), splits.class_ids) == (1437, 360, list("0123456789"))
    raw = load_digits()
    for part in (splits.train, splits.val):
        place = int(part.name(5).split("/")[1])
        assert np.allclose(pixels(part, 5)[0].numpy() / 255, raw.images[place] / 16, atol=0.002)
        assert part.targets[5] == raw.target[place]
    names = {part.name(index) for part in (splits.train, splits.val) for index in range(len(part))}
    assert len(names) == 1797
    assert np.ptp(np.bincount(splits.val.targets) - np.bincount(raw.target) / 5) < 1.5


@pytest.mark.parametrize("source", ["folder", "cifar10"])
@pytest.mark.parametrize("in_memory_mb", [0, 64])
def test_folders_of_classes(source, in_memory_mb):
    splits = data.load(source, root=str(IMAGES), decoder="pil", in_memory_mb=in_memory_mb)
    assert splits.class_names == splits.class_ids == ["cat", "ship", "truck"]
    assert splits.train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(splits.val) == 6
    splits.train.cache_decoded()
    paths = sorted(IMAGES.glob("train/*/*"))
    for index, path in enumerate(paths):
        assert splits.train.name(index) == str(path)
        assert torch.equal(pixels(splits.train, index), pil_to_tensor(Image.open(path).convert("RGB")))
    part = splits.train.take(np.array([7, 2]))  # of a set whose images may be in memory already
    assert all(torch.equal(pixels(part, at), pixels(splits.train, index)) for at, index in enumerate([7, 2]))


def test_fraction_classes_and_held_out_parts_are_fixed_and_balanced():
    half = data.load("folder", root=str(IMAGES), fraction=0.5, seed=3)
    assert np.bincount(half.train.targets).tolist() == [2, 2, 2] and len(half.val) == 6
    names = [[one.train.name(index) for index in range(6)]
             for one in (half, data.load("folder", root=str(IMAGES), fraction=0.5, seed=3))]
    assert names[0] == names[1]
    two = data.load("folder", root=str(IMAGES), classes=2)
    assert two.class_ids == ["cat", "ship"] and set(two.val.targets) == {0, 1} and len(two.train) == 8
    held = data.load("folder", root=str(IMAGES / "train"), val_fraction=0.25)
    assert np.bincount(held.val.targets).tolist() == [1, 1, 1] and len(held.train) == 9
    shown = {part.name(index) for part in (held.train, held.val) for index in range(len(part))}
    assert len(shown) == 12
    assert data.load("digits", classes=3).class_ids == ["0", "1", "2"]


@pytest.fixture
def imagenet(tmp_path) -> Path:
    for split in ("train", "val"):
        for wnid, folder in (("n01440764", "cat"), ("n01443537", "ship"), ("n09999999", "truck")):
            shutil.copytree(IMAGES / "test" / folder, tmp_path / split / wnid)
    return tmp_path


def test_imagenet_has_readable_names(imagenet):
    splits = data.load("imagenet", root=str(imagenet))
    assert splits.class_ids == ["n01440764", "n01443537", "n09999999"]
    assert splits.class_names == ["tench, Tinca tinca", "goldfish, Carassius auratus", "n09999999"]


def test_links_nesting_hidden_files_and_capital_suffixes(tmp_path):
    (tmp_path / "train/a/deep").mkdir(parents=True)
    image = next((IMAGES / "test/cat").iterdir())
    for name in ("deep/two.JPEG", "one.PNG", ".hidden.jpg", "notes.txt"):
        shutil.copy(image, tmp_path / "train/a" / name)
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/b").symlink_to(IMAGES / "test/ship")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "val").symlink_to("train")
    train = data.load("folder", root=str(tmp_path)).train
    assert [train.name(index).removeprefix(str(tmp_path)) for index in (0, 1)] == \
        ["/train/a/deep/two.JPEG", "/train/a/one.PNG"]
    assert train.targets.tolist() == [0, 0, 1, 1]


def test_evaluation_folders_by_number_and_by_name(tmp_path):
    """ImageNet-V2's folders are called 0 ... 999, sorted by number and not 0, 1, 10, 100."""
    for number in range(12):
        (tmp_path / "v2" / str(number)).mkdir(parents=True)
        Image.new("RGB", (4, 4), (number * 20,) * 3).save(tmp_path / "v2" / str(number) / "x.png")
    ids = [f"n{number:08d}" for number in range(12)]
    v2 = data.eval_folder(str(tmp_path / "v2"), ids)
    assert v2.targets.tolist() == list(range(12))
    assert [int(pixels(v2, index)[0, 0, 0]) for index in range(12)] == [number * 20 for number in range(12)]
    named = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: of a model that has sorted them as text
    assert [int(named[target]) for target in data.eval_folder(str(tmp_path / "v2"), named).targets] == [*range(12)]
    part = data.eval_folder(str(IMAGES), ["bird", "truck", "ship", "cat"])
    assert part.targets.tolist() == [3, 3, 2, 2, 1, 1] and part.name(0).endswith("jpg")
    assert part.take(np.array([4])).targets.tolist() == [1]
    with pytest.raises(UserError, match="classes that the model was not trained on: 1 .ship.*Did you mean 'shop'"):
        data.eval_folder(str(IMAGES), ["cat", "shop", "truck"])


def test_real_labels():
    from timm.data import ImageNetInfo, RealLabelsImagenet
    labels = RealLabelsImagenet(range(50_000)).real_labels
    none, two, three = (f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3))
    assert not labels[none] and labels[two] and labels[three]  # the first image was found to show none of the classes
    names = [f"/val/n01/{none}", f"/val/n02/{two}", three]
    wnids = ImageNetInfo().label_names()
    right = [5, labels[two][0], labels[three][-1]]
    assert data.real_top1(np.array(right), names, wnids) == 100.0
    assert data.real_top1(np.array([*right[:2], -1]), names, wnids) == 50.0
    of_three = [wnids[label] for label in right]  # a model of these classes alone
    assert data.real_top1(np.array([0, 1, 2]), names, of_three) == 100.0
    assert data.real_top1(np.array([0, 2, 2]), names, of_three) == 50.0
    with pytest.raises(UserError, match="no ReaL label"):
        data.real_top1(np.array([0]), ["cat.jpg"], wnids)
    with pytest.raises(UserError, match="labels=real.*'cat'"):
        data.real_top1(np.array([0]), names, ["cat"])


def flat_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    (root / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")


def no_images(root: Path) -> None:
    for file in (root / "train/n01440764").iterdir():
        file.unlink()


WRONG = {
    "flat val": (flat_val, r"val is flat .*sort it into the 1000 wnid folders .*valprep.sh \| bash"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "has no val/ folder"),
    "class missing": (lambda root: shutil.rmtree(root / "val/n01440764"), r"1 only in .*train \(n01440764\)"),
    "class without images": (no_images, r"n01440764 has no images \(.jpg .jpeg"),
    "empty train": (lambda root: [shutil.rmtree(root / "train"), (root / "train").mkdir()], "has nothing in it"),
    "missing root": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_broken_imagenet_folders(imagenet, case):
    spoil, sentence = WRONG[case]
    spoil(imagenet)
    with pytest.raises(UserError, match=sentence) as error:
        data.load("imagenet", root=str(imagenet))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments,sentence", [
    ({"source": "imgenet"}, "Did you mean 'imagenet'"), ({"source": "imagenet"}, "give data.root="),
    ({"source": "digits", "root": "/data"}, "recipe=imagenet"),
    ({"source": "digits", "classes": 11}, "has 10 classes"), ({"source": "cifar10"}, "needs data.root"),
    ({"source": "folder", "root": __file__}, "is a file"),
    ({"source": "folder", "root": str(IMAGES / "train")}, "data.val_fraction=0.1"),
    ({"source": "folder", "root": str(IMAGES / "train"), "val_fraction": 0.99}, "without training images"),
    ({"source": "folder", "root": str(IMAGES / "train/cat"), "val_fraction": 0.5}, "no folder of a class in it"),
    ({"source": "folder", "root": str(IMAGES / "train/cat")}, "no folder of a class in it"),
    ({"source": "timm", "name": "torch/none"}, "cannot open"),
    ({"source": "timm", "root": str(IMAGES)}, "no tar files of the split train"),
])
def test_wrong_arguments(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        data.load(**arguments)


def test_a_download_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(UserError, match=r"neither train/<class>/ .* nor torchvision's cifar-10-batches-py/.*no route"):
        data.load("cifar10", root=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(UserError, match="no route"):
        data.load("cifar10", root=str(mine))
    assert mine.exists()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="no route"):
        data.load("cifar10", root=str(tmp_path / "nowhere/../mine"))
    assert (mine / "notes.txt").read_text() == "keep"


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def originals(split: str) -> dict[str, bytes]:
    paths = sorted(IMAGES.glob(f"{split}/*/*"))
    return {str(path.relative_to(IMAGES / split)): path.read_bytes() for path in paths}


def check_same_images(images, split: str) -> None:
    expected = list(originals(split).items())
    assert len(images) == len(expected)
    for index, (name, content) in enumerate(expected):
        assert images.name(index).endswith(Path(name).name)
        assert torch.equal(pixels(images, index), by_pil(content))


def test_tar_files_by_class(tmp_path):
    for split in ("train", "test"):
        tar_of(tmp_path / f"{split}.tar", originals(split))
    splits = data.load("timm", root=str(tmp_path), val_split="test")
    assert splits.class_ids == ["cat", "ship", "truck"]
    check_same_images(splits.train, "train")
    check_same_images(splits.val, "test")
    held = data.load("timm", root=str(tmp_path / "train.tar"), val_fraction=0.25)
    assert np.bincount(held.val.targets).tolist() == [1, 1, 1]


def test_numbered_classes_have_one_order_in_tars_and_in_folders(tmp_path):
    """0, 1, ..., 11: not 0, 1, 10, 11, 2, as text."""
    image = next(iter(originals("train").values()))
    for number in range(12):
        (tmp_path / "folder" / str(number)).mkdir(parents=True)
        for name in "xy":
            (tmp_path / "folder" / str(number) / f"{name}.jpg").write_bytes(image)
    tar_of(tmp_path / "tars.tar", {f"{number}/{name}.jpg": image for number in range(11, -1, -1) for name in "xy"})
    folder = data.load("folder", root=str(tmp_path / "folder"), val_fraction=0.5)
    tars = data.load("timm", root=str(tmp_path / "tars.tar"), val_fraction=0.5)
    assert tars.class_ids == folder.class_ids == [str(number) for number in range(12)]
    for splits in (folder, tars):
        for index, target in enumerate(splits.train.targets):
            assert splits.class_ids[target] == Path(splits.train.name(index).replace(":", "/")).parent.name


def test_a_tar_of_a_tar_per_class(tmp_path):
    (tmp_path / "train").mkdir()
    inner = {}
    for name in ("cat", "ship", "truck"):
        files = {Path(file).name: content for file, content in originals("train").items() if file.startswith(name)}
        inner[f"{name}.tar"] = tar_of(tmp_path / "inner.tar", files).read_bytes()
    tar_of(tmp_path / "train/all.tar", inner)
    splits = data.load("timm", root=str(tmp_path), val_fraction=0.25)
    assert splits.class_ids == ["cat", "ship", "truck"]
    names = {part.name(index).split(":")[1] for part in (splits.train, splits.val) for index in range(len(part))}
    assert names == {*originals("train")}
    assert torch.equal(pixels(splits.val, 0), by_pil(originals("train")[splits.val.name(0).split(":")[1]]))


def test_webdataset_shards(tmp_path):
    for split, shards in (("train", 2), ("val", 1)):
        files = [*originals("train" if split == "train" else "test").items()]
        for shard in range(shards):
            content = {}
            for name, image in files[shard * len(files) // shards:(shard + 1) * len(files) // shards]:
                key = name.replace("/", "_").removesuffix(".jpg")
                content |= {f"{key}.cls": str(["cat", "ship", "truck"].index(name.split("/")[0])).encode(),
                            f"{key}.jpg": image}
            tar_of(tmp_path / f"small-{split}-{shard:04d}.tar", content)
    splits = data.load("timm", name="wds/small", root=str(tmp_path))
    assert splits.class_ids == ["0", "1", "2"] and splits.train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    check_images = [pixels(splits.train, index) for index in range(12)]
    assert all(torch.equal(one, by_pil(content))
               for one, content in zip(check_images, originals("train").values(), strict=True))
    workers = [torch.cat([batch.images for batch in data.eval_batches(
        splits.train, data.eval_transform(32, 1.0), batch_size=2, workers=count)]) for count in (0, 2)]
    assert torch.equal(*workers)


def test_broken_shards(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        data.load("timm", root=str(tmp_path), val_fraction=0.5)
    tar_of(tmp_path / "train.tar", {"a.jpg": b"x"})
    with pytest.raises(UserError, match="a.jpg without a .cls file"):
        data.load("timm", name="wds/x", root=str(tmp_path), val_fraction=0.5)


@pytest.mark.parametrize("name", ["torch/image_folder", "fake/reader"])
def test_timms_own_readers(name, monkeypatch):
    if name == "fake/reader":  # stands for Hugging Face's: a timm ImageDataset over a reader of byte streams
        from timm.data import ImageDataset, create_dataset
        monkeypatch.setattr("timm.data.create_dataset", lambda name, root, split, download: create_dataset(
            "", root=f"{root}/{split}", search_split=False))
        assert isinstance(create_dataset("", root=str(IMAGES / "train")), ImageDataset)
    else:
        monkeypatch.setattr("timm.data.dataset_factory.ImageFolder", _folder_of_torchvision)
    splits = data.load("timm", name=name, root=str(IMAGES), val_split="test")
    assert splits.class_ids == ["cat", "ship", "truck"]
    assert splits.train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    found = {bytes(pixels(splits.train, index).contiguous().numpy()) for index in range(12)}
    assert found == {bytes(by_pil(content).contiguous().numpy())
                     for content in originals("train").values()}


def test_torchvisions_imagenet_has_a_class_for_each_wnid(tmp_path):
    """It names classes by all their synonyms, which are more than the classes, and some of them alike."""
    words = {"n02012849": ("crane",), "n02123045": ("tabby", "tabby cat"), "n03126707": ("crane",)}
    for split, blue in (("train", 0), ("val", 200)):
        for number, wnid in enumerate(words):
            (tmp_path / split / wnid).mkdir(parents=True)
            Image.new("RGB", (8, 8), (60 * number, 0, blue)).save(tmp_path / split / wnid / "a.JPEG")
    torch.save((words, []), tmp_path / "meta.bin")
    splits = data.load("timm", name="torch/imagenet", root=str(tmp_path))
    assert splits.class_ids == [*words] and splits.train.targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["torch/image_folder", "any"])
def test_a_folder_is_not_both_of_timms_splits(name, monkeypatch):
    monkeypatch.setattr("timm.data.dataset_factory.ImageFolder", _folder_of_torchvision)
    flat = {"name": name, "root": str(IMAGES / "train")}
    with pytest.raises(UserError, match="the same images for data.train_split=train and data.val_split=validation"):
        data.load("timm", **flat)
    splits = data.load("timm", **flat, val_fraction=0.5)
    assert (len(splits.train), len(splits.val)) == (6, 6)


def _folder_of_torchvision(root, **_):
    from torchvision.datasets import ImageFolder
    return ImageFolder(root)


@pytest.mark.parametrize(("target", "caption"), [
    ([0.4, 0.6], "dog 0.60\ncat 0.40"), ([0.5, 0.5], "cat 0.50\ndog 0.50"), ([1.0, 0.0], "cat 1.00"),
    ([0.05, 0.9, 0.05], "dog 0.90"), ([0.05, 0.35, 0.6], "emu 0.60\ndog 0.35")], ids=str)
def test_a_preview_names_all_that_is_mixed(target, caption):
    """Two classes have no third that would show what smoothing alone gives."""
    assert preview._caption(torch.tensor(target), ["cat", "dog", "emu"][:len(target)]) == caption


@pytest.mark.parametrize("augment", [["augment=deepvit"], ["augment.mixup=0.8", "data.on_device=true"]], ids=str)
def test_a_preview_shows_the_images_of_the_run(tmp_path, monkeypatch, capsys, augment):
    """Of a run folder and of its settings alike: those that its first step trains on, whatever the seed."""
    words = ["recipe=cifar10", f"data.root={IMAGES}", *augment, "seed=1", "data.fraction=0.5",
             "data.batch_size=4"]
    config, shown = compose(words), []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    settings = build.read_settings(config)
    train = data.source_of(settings.data).splits().train
    make_batches = build.batch_maker(settings, train, Ranks(0, 1, torch.device("cpu")))
    first = next(make_batches(0, 1, 4))
    monkeypatch.setattr(preview, "draw", lambda batches, *_: shown.append(batches))
    assert main(["preview", "out.png", str(tmp_path)]) == main(["preview", "out.png", *words]) == 0
    for batches in shown:
        assert [batch.indices.tolist() for batch in batches] == [batch.indices.tolist() for batch in first]
        assert all(torch.equal(*(batch.images for batch in pair)) for pair in zip(batches, first, strict=True))
    monkeypatch.undo()
    assert main(["preview", str(tmp_path / "out.png"), str(tmp_path)]) == 0
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("RGB"))
    assert drawn.shape[0] > 100 and drawn.std() > 30
    assert main(["preview", "out.png", "no/such/folder"]) == 2 and "no/such/folder" in capsys.readouterr().err
    assert main(["preview", str(tmp_path / "odd.png"), *words, "augment.mixup=0.8", "data.batch_size=5"]) == 2
    assert "data.batch_size" in capsys.readouterr().err and not (tmp_path / "odd.png").exists()
