"""The index of a large folder: the same listing, seen to be stale, never half of one, made by one process."""

import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

import deepvit.data as data
from deepvit.bench import startup
from deepvit.data import listing
from deepvit.data.imageset import balanced_part

HOUR_AGO = time.time() - 3600


def age(folder: Path) -> None:
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        os.utime(path, (HOUR_AGO, HOUR_AGO))


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """train/ of two classes whose folders last changed an hour ago; a cache of its own, for sets of any size."""
    monkeypatch.setattr(listing, "MANY", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("b/x.jpg", "a/2.png", "a/deep/é.jpg", "a/no.gif", "a/\udcff.jpg"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    age(tmp_path / "train")
    return tmp_path / "train"


def names(found: listing.Listing) -> list[tuple[int, bytes]]:
    return [(int(found.places[row]), found.name(row)) for row in range(len(found))]


def is_mapped(found: listing.Listing) -> bool:
    base = found.text
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def test_the_index_tells_what_the_listing_tells(tree, monkeypatch):
    straight = listing.list_images(tree, ["a", "b"])
    first = listing.kept_listing(tree, ["a", "b"])
    monkeypatch.setattr(listing, "list_images", None)  # is not asked again
    again = listing.kept_listing(tree, ["a", "b"])
    assert names(first) == names(again) == names(straight) and len(again) == 4
    assert again.left_out == {".gif": 1} and is_mapped(first) and is_mapped(again)
    lengths = np.diff(again.starts).max()
    expected = b"x.jpg".ljust(lengths, b"\0") + b"2.png".ljust(lengths, b"\0")
    assert b"".join(part.tobytes() for part in again.padded(np.array([3, 0]))) == expected


CHANGES = {"a new file": lambda tree: (tree / "b/y.jpg").touch(),
           "a file less": lambda tree: (tree / "a/deep/é.jpg").unlink(),
           "another name": lambda tree: (tree / "a/2.png").rename(tree / "a/3.png"),
           "below a class folder": lambda tree: (tree / "a/deep/z.jpg").touch(),
           "a new folder": lambda tree: [(tree / "a/more").mkdir(), (tree / "a/more/z.jpg").touch()]}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_said(tree, caplog, change):
    before = names(listing.kept_listing(tree, ["a", "b"]))
    CHANGES[change](tree)
    with caplog.at_level(logging.INFO):
        after = listing.kept_listing(tree, ["a", "b"])
    assert names(after) == names(listing.list_images(tree, ["a", "b"])) != before
    assert "again, which has changed" in caplog.text
    assert not is_mapped(after)  # the folder changed this very moment, and may within the same tick of its clock
    age(tree)
    assert is_mapped(listing.kept_listing(tree, ["a", "b"]))


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b"",
                                    lambda content: b"[1]\n" + content, lambda content: b"\xff" + content,
                                    lambda content: content.replace(b'"version": 1', b'"version": 0')])
def test_a_damaged_or_foreign_index_is_not_used(tree, damage):
    before = names(listing.kept_listing(tree, ["a", "b"]))
    path = listing.index_path(tree, ["a", "b"])
    path.write_bytes(damage(path.read_bytes()))
    assert listing.open_index(path, tree) is None
    assert names(listing.kept_listing(tree, ["a", "b"])) == before and listing.open_index(path, tree) is not None


def test_a_cache_that_cannot_be_written_costs_the_index_alone(tree, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert len(listing.kept_listing(tree, ["a", "b"])) == 4
    assert "cannot be kept" in caplog.text


def test_a_write_that_fails_leaves_the_old_one(tree, monkeypatch):
    found = listing.kept_listing(tree, ["a", "b"])
    path = listing.index_path(tree, ["a", "b"])
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        listing.write_index(path, found)
    assert [one.name for one in path.parent.iterdir() if one.suffix != ".lock"] == [path.name]
    assert names(listing.open_index(path, tree)) == names(found)


def _list_slowly(tree: Path, told) -> None:
    at_once = listing.list_images

    def slowly(folder, classes):
        told.put(os.getpid())
        time.sleep(0.3)
        return at_once(folder, classes)

    listing.list_images = slowly
    assert len(listing.kept_listing(tree, ["a", "b"])) == 4


def test_one_process_lists_while_the_others_wait(tree):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=_list_slowly, args=(tree, told)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert told.get(timeout=5) and told.empty()


def test_few_images_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.load("folder", root=str(Path(__file__).parent / "data" / "images"))
    assert not (tmp_path / "cache").exists()


def test_a_balanced_part_has_its_share_of_each_class():
    targets = np.random.default_rng(0).integers(0, 3000, 60_000)
    part = balanced_part(targets, 0.5, 0)
    sizes, taken = np.bincount(targets), np.bincount(targets[part], minlength=3000)
    assert np.array_equal(taken, np.maximum(1, np.round(sizes * 0.5)).astype(int)) and (np.diff(part) > 0).all()


def test_the_bench_of_listings(monkeypatch):
    monkeypatch.setattr(startup, "apart", lambda function, *arguments, **_: function(*arguments))
    row, = startup.listing(images=5_000)
    assert row["name"] == "5,000 names from the index" and row["ms"] > 0 and row["mb_node"] > 0.1
