"""`deepvit figures`: every figure is drawn, computing and drawing come apart, mistakes are named."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import deepvit
from deepvit import analysis
from deepvit.analysis import plots
from deepvit.analysis.images import read_images, top_classes
from deepvit.analysis.measures import MEASURES
from deepvit.analysis.study import Study, load_studies
from deepvit.commands import figures
from deepvit.commands.figures import SIGNED, refuse_strange
from deepvit.commands.main import main
from deepvit.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
NAMES = ["ant", "bee", "cat", "dog", "eel"]


def checkpoint(folder, attention, **settings):
    torch.manual_seed(0)
    model = deepvit.create_model("vit", **{**TINY, "attention": attention, **settings})
    path = folder / f"{attention}.pt"
    run = {"seed": 0, "data": {"source": "folder", "norm": "half", "crop_pct": 1.0}}
    torch.save({"format": "deepvit", "version": 1, "model": model.state_dict(), "config": model.config,
                "classes": NAMES, "run": run}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two checkpoints, two images, a broken one, and the figures of one run of the program."""
    folder = tmp_path_factory.mktemp("figures")
    (folder / "mixed").mkdir()
    for attention in ("self", "reattention"):
        checkpoint(folder, attention)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    for name in ("1.png", "0.png", "broken.jpg"):
        (folder / "mixed" / name).write_bytes((folder / name).read_bytes())
    code = main(["figures", str(folder / "self.pt"), str(folder / "0.png"), str(folder / "1.png"), "--compare",
                         str(folder / "reattention.pt"), "--out", str(folder / "out"), "--save-maps",
                         str(folder / "maps.safetensors")])
    assert code == 0
    return folder


def test_every_figure_is_drawn(place):
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {f"{name}.png" for name in ("maps_mean", "maps_heads_1", "maps_heads_2", "rollout", "theta",
                                                "similarity_matrix", "similarity_depth", "measures_depth")}
    for path in (place / "out").iterdir():
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image.convert("L").resize((64, 64))))) > 20, path  # something is on it


def test_what_is_kept_is_what_the_analysis_says(place):
    plain, mixed = load_studies(place / "maps.safetensors")
    model = deepvit.load_model(place / "reattention.pt").eval()
    images = read_images(model, [place / "0.png", place / "1.png"])
    maps = analysis.attention_maps(model, images.x)
    kept = mixed.tensors
    torch.testing.assert_close(kept["mean_maps"], torch.stack([block.mean((0, 1)) for block in maps]))
    first = torch.stack([block[0] for block in maps])
    torch.testing.assert_close(kept["head_maps"].float(), first, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(kept["rollout"], analysis.class_token_mask(analysis.rollout(maps), (4, 4)))
    assert torch.equal(kept["theta/01"], model.blocks[1].attn.mix.weight)
    assert not any(name.startswith("theta") for name in plain.tensors)
    assert mixed.facts["probe"] == analysis.probe(model, images.x, matrix=True)
    order = model(images.x)[0].argsort(descending=True)
    assert [name for name, _ in mixed.facts["top"][0]] == [NAMES[i] for i in order]
    assert mixed.facts["initial"]["theta_diagonal_share"] == mixed.facts["probe"]["theta_diagonal_share"]  # same seed
    assert (plain.facts["attention"], mixed.facts["attention"]) == ("self", "reattention")


def test_drawing_from_kept_maps(place, tmp_path, capsys):
    assert main(["figures", "--maps", str(place / "maps.safetensors"), "--out", str(tmp_path), "--format", "svg"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.with_suffix(".svg").name for path in (place / "out").iterdir())
    assert capsys.readouterr().out.count(".svg") == 8


def test_a_flat_map_is_grey_and_says_so():
    ramp = torch.linspace(0, 0.95, 81).view(9, 9)
    flat, steep = 0.02 + 1e-4 * ramp, 0.001 + ramp
    assert np.ptp(plots.coloured(flat, signed=False)[..., :3], axis=-1).max() == 0  # grey
    assert np.ptp(plots.coloured(flat, signed=False)[..., 0]) == 1  # its structure shows
    assert np.ptp(plots.coloured(steep, signed=False)[..., :3], axis=-1).max() > 0.2
    assert plots.in_words(flat) == "flat, max/min = 1.00" == plots.in_words(-flat)
    assert plots.in_words(steep).startswith("max 0.9")
    assert not plots.is_flat(steep - 0.5) and plots.is_flat(torch.ones(2, 2))


def test_a_map_with_more_entries_than_pixels_is_not_flatter_for_it(place):
    """Of 577 tokens each of which looks 2.9 times as much at itself, drawn as a mean of neighbours."""
    maps = torch.ones(577, 577) + 1.9 * torch.eye(577)
    study = Study({"mean_maps": maps[None]}, {"name": "", "attention": "", "probe": {"images": 1, "blocks": 1}})
    (panel, *_) = plots.mean_maps([study]).subfigs[0].axes
    assert panel.get_title() == "block 1\nmax 1" and panel.images[0].get_array().shape == (300, 300, 4)
    assert np.ptp(plots.coloured(maps, False, 160)[..., :3], axis=-1).min() > 0.05  # in colour


def test_a_rollout_names_the_ends_of_its_colours():
    held = torch.tensor([[[0.25, 0.5], [0.5, 1.0]]])  # shares of the largest, which is always 1
    study = Study({"rollout": held, "pixels": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)},
                  {"name": "m", "attention": "", "pictures": ["a"], "top": []})
    assert [ax.get_title() for ax in plots.rolled_out([study]).axes[:2]] == ["a", "m\nmax/min = 4"]


def test_axes_make_no_trend_of_noise(place):
    studies = load_studies(place / "maps.safetensors")
    figure = plots.measures_with_depth(studies)
    figure.draw_without_rendering()
    least = {measure.title: measure.span for measure in MEASURES.values() if measure.title}
    for ax in figure.axes:
        low, high = ax.get_ylim()
        if ax.get_title() in least:
            span = high / low if ax.get_yscale() == "log" else high - low
            assert span >= 0.999 * least[ax.get_title()]
            assert not ax.yaxis.get_offset_text().get_text() and all(tick % 1 == 0 for tick in ax.get_xticks())
    assert [text.get_text().split(":")[0] for text in figure.legends[0].get_texts()] == ["self", "reattention"]


def test_blocks_of_a_matrix_are_whole(place):
    figure = plots.similarity_matrices(load_studies(place / "maps.safetensors"))
    figure.draw_without_rendering()
    assert all(tick % 1 == 0 for ax in figure.axes if ax.images for tick in (*ax.get_xticks(), *ax.get_yticks()))


def test_broken_image_is_named_and_the_rest_drawn(place, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda studies, folder, suffix: drawn.extend(studies) or [folder / "a.png"])
    images = [str(place / "broken.jpg"), str(place / "0.png")]
    assert main(["figures", str(place / "reattention.pt"), *images]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "broken.jpg" in said.err and "a.png" in said.out
    assert [one.facts["pictures"] for one in drawn] == [[str(place / "0.png")]]


@pytest.mark.parametrize("arguments, sentence", [
    ([], "Give a checkpoint"),
    (["missing.pt"], "missing.pt"),
    (["self.pt", "broken.jpg"], "broken.jpg"),
    (["self.pt", "missing.jpg"], "missing.jpg"),
    (["self.pt", "empty"], "no images"),
    (["--maps", "self.pt"], "--save-maps"), (["--maps", "."], "Is a directory"), (["--maps", "gone"], "gone"),
    (["--maps", "other.safetensors"], "holds no maps"),
    (["self.pt", "--maps", "maps.safetensors"], "not both"),
    (["--maps", "maps.safetensors", "--compare", "self.pt"], "not both"),
    (["--maps", "maps.safetensors", "--out", "/proc/x"], "choose another folder with --out"),
])
def test_mistakes_are_one_sentence(place, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(place)
    (place / "empty").mkdir(exist_ok=True)
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    assert main(["figures", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_each_model_has_its_own_folder_of_figures(place, monkeypatch):
    folders = []
    monkeypatch.setattr(figures, "draw", lambda studies, folder, suffix: folders.append(str(folder)) or [])
    (place / "run.16" / "checkpoints").mkdir(parents=True)
    (place / "run.16" / "checkpoints" / "best.pt").write_bytes((place / "self.pt").read_bytes())
    for path in ("self.pt", "run.16", "run.16/checkpoints/best.pt"):
        assert main(["figures", str(place / path), str(place / "0.png")]) == 0
    assert folders == ["figures/self", "figures/run.16", "figures/run.16"]
    shutil.copytree(place / "run.16", place / "runs" / "digits" / "vit" / "default")
    monkeypatch.chdir(place)
    assert main(["figures", "runs/digits/vit/default", "--compare", "self.pt", str(place / "0.png")]) == 0
    assert folders[-1] == "figures/digits-vit-default-and-self"  # many runs are named `default`


def test_maps_are_written_over_maps_alone(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ["figures", str(place / "self.pt"), str(place / "0.png"), "--save-maps"]
    Path("precious.txt").write_text("mine")
    for name in ("precious.txt", "nowhere/maps.safetensors", "."):
        assert main([*command, name]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"] and Path("precious.txt").read_text() == "mine"
    assert [main([*command, "maps.safetensors"]) for _ in range(2)] == [0, 0]


def test_images_as_the_model_wants_them(place):
    model = deepvit.load_model(place / "self.pt")
    images = read_images(model, [place / "mixed"])
    assert [name.rsplit("/", 1)[1] for name in images.names] == ["0.png", "1.png"]
    assert len(images.refused) == 1 and images.x.shape == (2, 3, 32, 32) and images.pixels.dtype == torch.uint8
    torch.testing.assert_close(images.x, images.pixels / 127.5 - 1)
    assert [name for name in read_images(model, []).names] == ["china.jpg", "flower.jpg"]
    best = top_classes(torch.tensor([[0.0, math.log(3), 0.0]]), ["a", "b", "c"], count=2)
    assert best[0][0] == ("b", pytest.approx(0.6)) and len(best[0]) == 2


def test_a_hidden_file_that_is_no_image_is_not_worth_a_word(place, tmp_path, caplog):
    caplog.set_level("WARNING", "deepvit")
    shutil.copy(place / "0.png", tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    model = deepvit.load_model(place / "self.pt")
    assert read_images(model, [tmp_path]).names == [str(tmp_path / "0.png")] and not caplog.text
    (tmp_path / "notes.txt").write_text("x")
    read_images(model, [tmp_path])
    assert f"In {tmp_path} 1 is left out: 1 .txt." in caplog.text


def test_an_image_of_the_users_is_not_drawn_over(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="mine.png is there already"):
        refuse_strange(tmp_path / "mine.png")
    for name in ("ours.png", "ours.svg"):
        Figure().savefig(tmp_path / name, metadata=SIGNED)
        refuse_strange(tmp_path / name)


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan], [], [0.0, 3.0]])
def test_a_figure_of_ratios_is_drawn_whatever_was_measured(values):
    """A look at two blocks has one pair of maps, or none that is not flat."""
    figure = Figure()
    ax = figure.subplots()
    ax.plot(range(1, len(values) + 1), values)
    plots.scale(ax, "ratio", 2.0)
    figure.canvas.draw()
    assert all(map(math.isfinite, ax.get_ylim()))
