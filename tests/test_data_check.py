"""`deepvit check` names what cannot be used, and `data.exclude` leaves it out."""

import logging
from pathlib import Path

import pytest
from test_data_names import IMAGE, classes, log_given_back, names_of, webdataset  # noqa: F401

import deepvit.data as data
from deepvit.commands.main import main
from deepvit.data.source import read_list, write_list
from deepvit.errors import BAD_INPUT, DONE, UserError

BAD = ("train/a/#0.png", 'train/a/"1".png', "train/a/two\nlines.png", "train/a/M\udcf6we.png", "val/b/ blank.png")


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Two splits of two classes of three good images, and five bad ones with odd names."""
    monkeypatch.chdir(tmp_path)
    classes(tmp_path / "set/train", "a", "b"), classes(tmp_path / "set/val", "a", "b")
    for name in BAD:
        (tmp_path / "set" / name).write_bytes(b"no image" if "0" in name else IMAGE.getvalue()[:40])
    return tmp_path / "set"


def test_what_is_listed_is_left_out(tree, capsys, log_given_back):  # noqa: F811
    (tree / "train/a/x.gif").touch()
    assert main(["check", str(tree), "--workers", "2"]) == BAD_INPUT
    said = capsys.readouterr().out
    assert "12 of 17 images can be used" in said and "left out: 1 .gif" in said and "data.exclude=unusable.txt" in said
    assert f"{tree}/train/a/#0.png: the content is no known image format" in said
    assert read_list("unusable.txt", str(tree)) == {f"{tree}/{name}" for name in BAD}
    splits = data.load("folder", root=str(tree), exclude="unusable.txt")
    assert len(splits.train) == len(splits.val) == 6
    assert not {*names_of(splits.train), *names_of(splits.val)} & {f"{tree}/{name}" for name in BAD}
    assert len(data.eval_folder(str(tree), ["a", "b"], exclude="unusable.txt")) == 6
    assert len(data.eval_folder(str(tree), ["a", "b"])) == 7
    for name in BAD:
        (tree / name).unlink()
    assert main(["check", str(tree), "--workers", "0"]) == DONE  # and no list is written of nothing


def test_names_that_are_not_there_are_said(tree, caplog):
    Path("list.txt").write_text("# a remark\n\ntrain/a/0.png\r\ntrain/a/gone.png\ntrain/c/0.png\n./val/a/1.png\n")
    with caplog.at_level(logging.WARNING):
        splits = data.load("folder", root=str(tree), exclude="list.txt")
    assert (len(splits.train), len(splits.val)) == (9, 6)
    assert "2 of the names in data.exclude=list.txt are not among" in caplog.text and "gone.png" in caplog.text
    caplog.clear()
    part = data.load("folder", root=str(tree), exclude="list.txt", fraction=0.5, seed=1).train
    assert f"{tree}/train/a/0.png" not in names_of(part)
    assert len(data.eval_folder(str(tree), ["a", "b"], exclude="list.txt")) == 6


@pytest.mark.parametrize(("content", "sentence"), [
    (None, "data.exclude=list.txt cannot be read"), ('"torn', "data.exclude=list.txt cannot be read"),
    ("".join(f"val/a/{number}.png\n" for number in range(3)), "no image of class a")])
def test_lists_that_cannot_be_followed(tree, content, sentence):
    if content is not None:
        Path("list.txt").write_text(content)
    with pytest.raises(UserError, match=sentence):
        data.load("folder", root=str(tree), exclude="list.txt")


def test_somebody_elses_file_is_not_overwritten(tree, capsys):
    Path("unusable.txt").write_text("mine")
    assert main(["check", str(tree)]) == BAD_INPUT
    assert "--list" in capsys.readouterr().err and Path("unusable.txt").read_text() == "mine"
    assert main(["check", str(tree), "--list", "nowhere/unusable.txt"]) == BAD_INPUT
    assert "--list nowhere/unusable.txt" in capsys.readouterr().err and not Path("nowhere").exists()


def test_other_sources_have_lists_too(tmp_path):
    root = str(webdataset(tmp_path / "train.tar", *(f"{kind}/{number}.png" for kind in "ab" for number in range(4))))
    write_list(tmp_path / "list", [(f"{root}:a/1.png", "a\nreason")], str(tmp_path))
    assert (tmp_path / "list").read_text().splitlines()[1:] == ["# a reason", "train.tar:a/1.png"]
    splits = data.load("timm", root=str(tmp_path), val_fraction=0.5, exclude=str(tmp_path / "list"))
    assert len(splits.train) + len(splits.val) == 7
    write_list(tmp_path / "list", [("digits/3", "")], "")
    assert len(data.load("digits", exclude=str(tmp_path / "list")).train) in (1436, 1437)
