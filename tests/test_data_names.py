"""Names and surroundings: what is left out is counted, what can be read in two ways is refused, any name works."""

import io
import logging
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import deepvit.data as data
from deepvit.commands.cli import quoted
from deepvit.commands.main import expanded, main
from deepvit.commands.sweep import in_quotes
from deepvit.data.decode import decode
from deepvit.errors import BAD_INPUT, DONE, UserError

IMAGE = io.BytesIO()
Image.new("RGB", (8, 8), (9, 9, 9)).save(IMAGE, "PNG")


def classes(folder: Path, *names: str, count: int = 3) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(IMAGE.getvalue())
    return folder


def names_of(images) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def test_each_file_is_listed_or_counted_with_a_reason(tmp_path, caplog):
    classes(tmp_path / "train", "a", "b")
    inside = tmp_path / "train/a"
    for name in ("x.gif", "y.jfif", "z", "w.JFIF", ".hidden.png", "._x.jpg", ".DS_Store"):
        (inside / name).write_bytes(b"x")
    (inside / "broken.png").symlink_to("nowhere.png")  # an image that cannot be read: it is met, and said, later
    (inside / "self").symlink_to("self")
    (inside / "up").symlink_to("..")
    (inside / ".cache").mkdir()
    (inside / "folder.png").mkdir()
    (inside / "folder.png/1.png").write_bytes(b"x")
    os.mkfifo(inside / "pipe.png")
    (tmp_path / "train/stray.png").write_bytes(b"x")
    shutil.copytree(tmp_path / "train", tmp_path / "val", symlinks=True, ignore=lambda *_: ["pipe.png"])
    with caplog.at_level(logging.WARNING):
        train = data.load("folder", root=str(tmp_path)).train
    listed = [name.removeprefix(f"{inside}/") for name in names_of(train)[:5]]
    assert listed == ["0.png", "1.png", "2.png", "broken.png", "folder.png/1.png"] and len(train) == 8
    assert train.listing.left_out == {
        ".jfif": 2, ".gif": 1, "without extension": 1, "hidden": 2, "hidden folder": 1, "link that leads nowhere": 1,
        "link to a folder above itself": 1, "no regular file": 1, "beside the class folders": 1}
    assert f"In {tmp_path / 'train'} 11 are left out: 2 " in caplog.text


VEHICLES = ("bus", "car", "train")


@pytest.mark.parametrize("flat", [True, False])
def test_a_class_called_like_a_split(tmp_path, flat):
    classes(tmp_path, *VEHICLES)
    if flat:
        assert data.load("folder", root=str(tmp_path), val_fraction=0.4).class_ids == [*VEHICLES]
        assert len(data.eval_folder(str(tmp_path), [*VEHICLES])) == 9
    else:  # two readings
        classes(tmp_path / "train", "steam", "electric")
        with pytest.raises(UserError, match=r"\(train\).*\(bus, car\).*move"):
            data.load("folder", root=str(tmp_path), val_fraction=0.4)
        assert len(data.eval_folder(str(tmp_path), [*VEHICLES])) == 15  # the model tells what train is


def test_splits_that_hold_classes_called_like_splits(tmp_path, caplog):
    classes(tmp_path / "train", "test", "val"), classes(tmp_path / "val", "test", "val")
    classes(tmp_path / "samples", "x")
    with caplog.at_level(logging.WARNING):
        splits = data.load("folder", root=str(tmp_path))
    assert splits.class_ids == ["test", "val"] and len(splits.train) == len(splits.val) == 6
    assert "samples" in caplog.text  # not used, and said
    assert len(data.eval_folder(str(tmp_path), ["test", "val"])) == 6


def test_what_a_setting_would_leave_unused_is_refused(tmp_path):
    classes(tmp_path / "train", "a", "b")
    with pytest.raises(UserError, match="has train/ but no val/"):
        data.eval_folder(str(tmp_path), ["a", "b"])
    classes(tmp_path / "val", "a", "b")
    with pytest.raises(UserError, match="val/.*data.val_fraction=0.3"):
        data.load("folder", root=str(tmp_path), val_fraction=0.3)
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/1.png").write_bytes(IMAGE.getvalue())  # without classes it can serve for nothing here
    assert len(data.load("folder", root=str(tmp_path), val_fraction=0.4).val) == 2


def test_a_root_one_level_too_high(tmp_path, caplog):
    classes(tmp_path / "one/pets", "cat", "dog")
    with pytest.raises(UserError, match="one class only, 'pets'.*too high"):
        data.load("folder", root=str(tmp_path / "one"), val_fraction=0.4)
    classes(tmp_path / "two/pets", "cat", "dog"), classes(tmp_path / "two/cars", "bmw", "vw")
    with caplog.at_level(logging.WARNING):
        data.load("folder", root=str(tmp_path / "two"), val_fraction=0.4)
    assert "one level too high" in caplog.text


def webdataset(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = b"1" if name.endswith(".cls") else IMAGE.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("names", "count"), [
    ([f"cam1.{i:03d}.{kind}" for i in range(12) for kind in ("png", "cls")], "one key, 'cam1', for cam1.000.png"),
    ([f"{i}.{kind}" for i in range(4) for kind in ("left.png", "cls", "json")], 4),
    (["a.png", "a.cls", "b.cls", "notes.txt"], 1),
    (["a.png", "a.seg.png", "a.cls"], "one key, 'a', for a.png and a.seg.png"),
    (["a.png", "a.cls", "a.more.cls"], "one key, 'a', for a.cls and a.more.cls"),
    (["a.png", "a.cls", "b.png"], "b.png without a .cls")])
def test_keys_of_webdataset(tmp_path, caplog, names, count):
    root = str(webdataset(tmp_path / "train.tar", *names))
    options = {"name": "wds/", "root": root, "val_fraction": 0.5}
    if isinstance(count, str):
        with pytest.raises(UserError, match=count):
            data.load("timm", **options)
        return
    from deepvit.data.timm_sets import read_webdataset
    with caplog.at_level(logging.WARNING):
        images, _ = read_webdataset([root], "pil")
    assert len(images) == count and len({*names_of(images)}) == count
    assert ("left out: 1 .cls without an image" in caplog.text) == ("b.cls" in names)


def test_tars_of_a_split_are_found_by_whole_words(tmp_path):
    keys = [f"{split}/{number}.png" for split in "ab" for number in range(2)]
    for name in ("constrained-val.tar", "set-train-0.tar", "validated-train-1.tar"):
        webdataset(tmp_path / name, *keys)
    splits = data.load("timm", root=str(tmp_path))
    assert len(splits.train) == 8 and len(splits.val) == 4
    with pytest.raises(UserError, match=r"constrained-val.tar.*data.val_fraction"):
        data.load("timm", root=str(tmp_path), val_fraction=0.5)
    (tmp_path / "constrained-val.tar").rename(tmp_path / "train-val.tar")
    with pytest.raises(UserError, match="same tars"):
        data.load("timm", root=str(tmp_path))


@pytest.mark.parametrize(("largest", "brightest"), [(4095, 255), (65535, 255), (4096, 16), (2000, 125)])
def test_grey_of_12_bits_in_16(tmp_path, largest, brightest):
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)).save(content, "PNG")
    pixels = np.asarray(decode(bytearray(content.getvalue()), "pil")[0])
    assert (pixels.min(), pixels.max()) == (0, brightest)


@pytest.mark.parametrize("where", ["train/loop", "val/loop", "loop"])
def test_links_to_themselves(tmp_path, where):
    classes(tmp_path / "train", "a", "b"), classes(tmp_path / "val", "a", "b")
    (tmp_path / where).symlink_to("loop")
    with pytest.raises(UserError, match="leads nowhere"):
        data.load("folder", root=str(tmp_path))
    with pytest.raises(UserError, match="cannot be read|does not exist|leads nowhere"):
        data.load("folder", root=str(tmp_path / where))


@pytest.mark.parametrize("where", ["train", "val/b", "train/a/deep", ""])
def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, where):
    """Permissions do not bind root, so the refusal is the system call's."""
    classes(tmp_path / "train", "a", "b"), classes(tmp_path / "val", "a", "b")
    (tmp_path / "train/a/deep").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(os.fsdecode(path)) == tmp_path / where:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{where} cannot be read .Permission denied"):
        data.load("folder", root=str(tmp_path))


def test_files_that_vanish_are_bad_images(tmp_path):
    val = data.load("folder", root=str(classes(tmp_path, "a", "b")), val_fraction=0.4, in_memory_mb=0).val
    Path(val.name(0)).unlink()
    with pytest.raises(UserError, match="cannot be read .No such file"):
        list(data.eval_batches(val, data.eval_transform(4), batch_size=2))


SPECIAL = ["données", "图片", "set (1)", "run#2", "a[1]", "a=b", "it's", "a,b", "2024", "null", "[x]", "a b ", "x'",
           "\\", "a\\'b", "{a}", 'say "x"', "tab\tx", "M\udcf6we"]


def value_of(word: str):
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("name", SPECIAL)
def test_a_folder_by_any_name_is_a_setting(tmp_path, name, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for value in (name, str(tmp_path / name)):
        assert value_of(quoted(f"data.root={value}")) == value
        if "," in name:  # by itself it is taken whole, in a list it cannot be
            continue
        assert value_of(quoted(f"checkpoint=[{value}]")) in ([value], [value.strip()])
        assert value_of(quoted(f"checkpoint=[b, {value}]")) in (["b", value], ["b", value.strip()])
        swept = value_of(quoted(f"init=b,{value}")).list
        assert [getattr(part, "text", part) for part in swept] in (["b", value], ["b", value.strip()])


@given(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1, max_size=12))
@example("it's, [a] (1)")
def test_a_value_that_is_refused_is_read_as_it_was_typed(text):
    assert value_of(f"data.root={in_quotes(text)}") == text


@pytest.mark.parametrize("word", ["seed=1", "model.depth=range(1,3)", "optimizer.betas=[0.9,0.99]", "-m", "init=null",
                                  "data.root=${oc.env:DATA,/x}", "init='a=b'", "x={a: 1, b: [2, 3]}", "~model.stem"])
def test_what_the_grammar_reads_stays(word):
    assert quoted(word) == word


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    for word, expected in (("~/a", "/home/x/a"), ("init=~/a", "init=/home/x/a"), ("out='~/a b'", "out='/home/x/a b'"),
                           ("checkpoint=[~/a, ~/b]", "checkpoint=[/home/x/a, /home/x/b]"),
                           ("--out=~/a", "--out=/home/x/a"),
                           ("data.root=~", "data.root=/home/x"), ("a~/b", "a~/b"), ("~model/stem", "~model/stem")):
        assert expanded(word) == expected


@pytest.fixture
def log_given_back():
    """Programs send the log to what is standard output then, and to no handler of pytest's."""
    yield
    logger = logging.getLogger("deepvit")
    logger.handlers.clear()
    logger.propagate = True


def test_every_command_takes_a_name_that_is_not_utf8(tmp_path, monkeypatch, capfd, log_given_back):
    """Nor free of what matplotlib's mathematics and Hydra's grammar would read."""
    from hydra.core.global_hydra import GlobalHydra
    monkeypatch.chdir(tmp_path)
    root, odd = "M\udcf6we (1) $\\frac$", "t\udcf6r, [$\\frac$]"
    for split in ("train", "val"):
        classes(tmp_path / root / split, "b", odd)
        (tmp_path / root / split / odd / "0.png").rename(tmp_path / root / split / odd / f"{odd}.png")
    small = ["model=vit", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "model.img_size=8",
             "augment=none", "model.patch_size=4", "recipe=folder", "data.workers=0", "data.batch_size=4",
             "schedule.epochs=1", "schedule.warmup_epochs=0", "probe.images=0", f"data.root={root}"]
    for words in (["train", *small, f"hydra.run.dir={root}/run"],
                  ["eval", f"checkpoint=[{root}/run]", f"out={root}/out"], ["predict", f"{root}/run", f"{root}/val"],
                  ["figures", f"{root}/run", f"{root}/val", "--out", f"{root}/f"],
                  ["export", f"{root}/run", "--to", "timm", "--out", f"{root}/x"], ["report", f"{root}/run"],
                  ["preview", f"{root}/new/p.png", *small], ["replay", f"{root}/run", "--batch", "0"],
                  ["train", *small, f"init={root}/run", f"hydra.run.dir={root}/fine-tuned"]):
        GlobalHydra.instance().clear()
        code = main(words)
        said = capfd.readouterr()
        assert code == DONE, (words[0], said)
    predicted = next(tmp_path.glob("M*/run/eval/*/predictions.csv"), None) or next(tmp_path.glob("M*/out/*/pred*.csv"))
    assert os.fsencode(f"{odd}.png").replace(b'"', b'""') in predicted.read_bytes()


def test_an_unreadable_path_ends_in_a_sentence(tmp_path, capsys, monkeypatch):
    """Wherever a program first meets it."""
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    assert main(["report", str(tmp_path / "x")]) == BAD_INPUT
    assert f"{tmp_path / 'x'} cannot be used (Permission denied)" in capsys.readouterr().err
