"""`train.py`, `eval.py` and friends as a user runs them, in this process: what they print, write and return."""

import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from deepvit.commands.main import COMMANDS, main
from deepvit.run.launch import BAD_INPUT, DONE

ROOT = Path(__file__).parent.parent
TINY = ["model=vit", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "data.batch_size=256",
        "schedule.epochs=2", "engine.log_every=4", "probe.images=4", "logger=null"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_evaluate_predict_and_again(run, tmp_path):
    shown = TINY[:-1]  # with the default logger
    code, said, _ = run("train", *shown)
    folder = next(tmp_path.glob("runs/digits/vit/*"))
    assert code == DONE and "Starting in runs/digits/vit/" in said and "Finished" in said
    result, metrics = json.loads((folder / "metrics.json").read_text()), lines(folder / "metrics.jsonl")
    logged = [line for line in metrics if "lr" in line]
    assert {"step", "epoch", "loss", "lr"} <= logged[0].keys() and logged[-1]["step"] == result["steps"] == 12
    evaluated = [line for line in metrics if "top1" in line]
    assert {"step", "top1", "top5", "loss", "n"} <= evaluated[-1].keys() and evaluated[-1]["n"] == 360
    assert {"top1", "top5", "loss", "n", "params", "flops", "depth", "attention", "seed", "epochs", "steps",
            "images_per_s", "git", "versions"} <= result.keys()
    assert result["depth"] == 2 and result["attention"] == "self" and result["probe_initial"]["blocks"] == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["depth"] == 2
    assert [line["event"] for line in lines(folder / "events.jsonl")] == ["start", "finished"]
    assert (folder / "checkpoints" / "last.pt").exists() and list(folder.glob("events.out.tfevents.*"))

    code, said, _ = run("train", *reversed(TINY))  # the order of overrides is no other run
    assert code == DONE and "is finished" in said and lines(folder / "metrics.jsonl") == metrics

    best = max(evaluated, key=lambda line: line["top1"])
    code, said, _ = run("eval")  # every best checkpoint under runs/
    assert code == DONE and f"{best['top1']:.2f}" in said
    found = json.loads((folder / "eval" / "best-raw-digits" / "metrics.json").read_text())
    assert (found["top1"], found["top5"], found["n"]) == (best["top1"], best["top5"], 360)
    assert found["loss"] == pytest.approx(best["loss"], abs=1e-6)
    rows = list(csv.DictReader((folder / "eval" / "best-raw-digits" / "predictions.csv").open()))
    assert sum(row["target"] == row["prediction"] for row in rows) / 3.6 == pytest.approx(best["top1"])

    code, said, _ = run("eval", f"checkpoint=[{folder}/checkpoints/last.pt,{folder}/checkpoints/best.pt]", "out=both")
    assert code == DONE and "McNemar" in said

    image = ROOT / "tests" / "data" / "no-such.png"
    assert main(["predict", str(folder / "checkpoints" / "best.pt"), str(image)]) == BAD_INPUT


def test_a_slow_run_tells_the_time_to_go_before_its_first_line_is_due(run, monkeypatch):
    monkeypatch.setattr("deepvit.engine.fit.PATIENCE", 0)
    code, said, _ = run("train", *TINY, "schedule.epochs=1", "engine.log_every=5")
    assert code == DONE
    assert re.findall(r"step (\d+)/6  ", said) == ["1", "5", "6"]
    assert re.search(r"step 1/6  [\d.]+ img/s  left 0:0", said)


def test_a_result_tells_the_decoder_and_how_often_it_refused(run, tmp_path):
    """One image of eight is CMYK, which PIL reads: once in each of four epochs."""
    for at in range(16):
        file = tmp_path / "images" / ("train", "val")[at // 8] / "ab"[at % 2] / f"{at}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("CMYK" if at == 3 else "RGB", (20, 20)).save(file)
    code, *_ = run("train", *TINY, "recipe=folder", "data.root=images", "model.img_size=8", "model.patch_size=4",
                   "schedule.epochs=4", "data.batch_size=4", "engine.log_every=3", "data.workers=1",
                   "data.in_memory_mb=0", "schedule.warmup_epochs=0", "schedule.cooldown_epochs=0")
    folder = next(tmp_path.glob("runs/folder/vit/*"))
    result, events = json.loads((folder / "metrics.json").read_text()), lines(folder / "events.jsonl")
    assert code == DONE and result["steps"] == 8
    assert (result["decoder"], result["decoder_refused"], events[0]["decoder"]) == ("torchvision", 4, "torchvision")
    _, said, _ = run("train", *TINY, "data=folder", "data.root=images", "data.batch_size=4", "dry=true")
    assert "recipe=folder" in said


def test_a_sweep_goes_on_past_a_failed_cell_and_names_it(run, tmp_path):
    sweep = ["-m", *TINY, "model.num_heads=2,3"]
    code, said, _ = run("train", *sweep)
    assert code == BAD_INPUT and "1 of 2 cells are done" in said
    assert "failed: " in said and "model.num_heads=3" in said and "does not divide into 3 heads" in said
    assert len(list(tmp_path.glob("runs/digits/vit/*/metrics.json"))) == 1
    assert len(list(tmp_path.glob("runs/digits/vit/*"))) == 1  # the refused cell leaves no folder
    code, said, _ = run("train", *sweep)
    assert "is finished" in said  # only what is unfinished is done again


def test_a_dry_sweep_forecasts_and_writes_nothing(run, tmp_path):
    code, said, _ = run("train", "-m", *TINY, "dry=true", "model.depth=1,2")
    assert code == DONE and said.count("Dry run:") == 2 and "device-hours" in said.splitlines()[-3]
    assert re.search(r" s a step, \d+:\d\d:\d\d to train \([\d.e-]+ device-hours\)", said)  # whatever the length
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["dry=true", "hydra.run.dir=mine/new/run"], ["model.depth=0", "hydra.run.dir=mine"],
                                   ["-m", "dry=true", "seed=0,1", "hydra.sweep.dir=mine/new"],
                                   ["-m", "dry=true", "seed=0,1", "hydra.sweep.dir=mine"]], ids=" ".join)
def test_empty_folders_of_the_users_stay(run, tmp_path, words):
    (tmp_path / "mine").mkdir()
    assert run("train", *TINY, *words)[0] in (DONE, BAD_INPUT)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_sweep_over_the_images_of_batch_statistics_trains_each_or_says_so(run, tmp_path):
    """`engine` is in no run's name, as it is of no consequence but here."""
    code, said, _ = run("train", *TINY, "model/attention=reattention", "model.attention.norm_batch=null", "-m",
                        "engine.device_batch=256,128", "schedule.epochs=1", "calibrate=0")
    assert code == BAD_INPUT and "1 of 2 cells are done" in said
    assert "finished with other settings: engine.device_batch was 256 and is now 128" in said


def test_a_continued_run_keeps_its_model_and_data_and_names_a_changed_rate(run, tmp_path):
    where = f"hydra.run.dir={tmp_path}/here"
    assert run("train", *TINY, where)[0] == DONE
    code, _, sentence = run("train", *TINY, where, "schedule.epochs=9")
    assert code == BAD_INPUT and "finished with other settings: schedule.epochs was 2 and is now 9" in sentence
    (tmp_path / "here" / "metrics.json").unlink()  # as if it had been cut before its last words
    code, _, sentence = run("train", *TINY, where, "model.depth=3")
    assert code == BAD_INPUT and "model.depth was 2 and is now 3" in sentence and "fresh=true" in sentence
    code, _, sentence = run("train", *TINY, where, "data.classes=5")
    assert code == BAD_INPUT and "data.classes" in sentence
    code, _, sentence = run("train", *TINY, where, "optimizer.weight_decay=0.9")
    assert code == BAD_INPUT and "optimizer.weight_decay was 0.05 and is now 0.9" in sentence
    code, said, _ = run("train", *TINY, where)
    assert code == DONE and "Continuing from step 12" in said
    result = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert result["steps"] == 12 and result["images_per_s"] is None  # no step was timed
    (tmp_path / "here" / "metrics.json").unlink()
    code, _, sentence = run("train", *TINY, where, "schedule.epochs=1")
    assert code == BAD_INPUT and "at step 12 already and would now end at 6" in sentence
    code, said, _ = run("train", *TINY, where, "optimizer.lr=0.0001", "schedule.epochs=3")
    assert code == DONE and "optimizer.lr=0.0001 (was 0.002)" in said and "Continuing from step 12" in said
    code, said, _ = run("train", *TINY, where, "model.depth=3", "fresh=true")
    assert code == DONE and "Starting in" in said


def test_weights_of_other_classes_are_refused_unless_the_head_is_reset(run, tmp_path):
    assert run("train", *TINY, f"hydra.run.dir={tmp_path}/ten")[0] == DONE
    start = [*TINY, f"init={tmp_path}/ten/checkpoints/best.pt", "data.classes=5", "schedule.epochs=1"]
    code, _, sentence = run("train", *start)
    assert code == BAD_INPUT and "10" in sentence and "5" in sentence and "head=reset" in sentence
    code, said, _ = run("train", *start, "head=zero")
    assert code == DONE and "head=zero" in said


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("train", "eval")])
def test_help_ends_with_uses_whose_options_exist(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    options, _, uses = capsys.readouterr().out.partition("examples:")
    assert not ended.value.code and len(uses.strip().splitlines()) >= 3
    for use in re.findall(rf"deepvit {command} (.*)", uses):
        assert all(re.search(rf"{option}\b", options) for option in re.findall(r"--[a-z-]+", use)), use


def test_the_version_is_ours(capsys):
    assert main(["--version"]) == DONE and re.fullmatch(r"deepvit \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(("words", "expected"), [
    (["checkpoint=gone.pt"], "gone.pt"),
    (["checkpoint={torn}"], "torn.pt"),
    (["checkpoint={torn}", "weights=best"], "weights is 'best'"),
    ([], "no checkpoint under runs/"),
    (["checkpoint=[a"], "checkpoint=[a does not exist"), (["check point=a"], "'check point=a' cannot be read"),
    (["chekpoint=x"], "Did you mean 'checkpoint'"), (["checkpoint=[[${oc.env:UNSET}]]"], "UNSET"),
        (["schedule.epochs=3"], "'schedule.epochs' is a setting of another program"),
    (["data.img_size=16"], "model.img_size"), (["knn=3", "calibrate=64"], "calibrate=64 has no effect"),
        (["--config-name", "train", "labels=real"], "--config-dir"),
])
def test_bad_input_to_eval_is_one_sentence(run, tmp_path, words, expected):
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    code, _, sentence = run("eval", *(word.replace("{torn}", "torn.pt") for word in words))
    assert code == BAD_INPUT and expected in sentence and len(sentence.splitlines()) == 1


def test_a_config_of_the_users_own_is_evaluated(run, tmp_path):
    assert run("train", *TINY, "schedule.epochs=1", f"hydra.run.dir={tmp_path}/run")[0] == DONE
    (tmp_path / "mine.yaml").write_text("defaults: [eval, _self_]\nweights: raw\n")
    own = ["--config-dir", str(tmp_path), "--config-name", "mine"]
    assert run("eval", *own, f"checkpoint={tmp_path}/run")[0] == DONE


@pytest.mark.parametrize(("words", "expected"), [
    (["hydra/launcher=parallel", "hydra.launcher.cells_per_device=two"], "hydra.launcher.cells_per_device=two"),
    (["hydra/launcher=parallel", "hydra.launcher.cells_per_device=0"], "hydra.launcher.cells_per_device=0"),
    (["sweep=digits_depth,beyond_32"], "one sweep=NAME at a time"),
    (["+hydra.callbacks.sweep.statistic.margin=1"], "statistic"),
    (["hydra.run.dir=mine"], "give hydra.sweep.dir=..."),
])
def test_bad_input_to_a_sweep_is_one_sentence(run, tmp_path, words, expected):
    code, _, sentence = run("train", "-m", *TINY, "seed=0,1", *words)
    assert code == BAD_INPUT and expected in sentence and len(sentence.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("words", "expected"), [
    (["recipe=imagenet"], "data.root"),
    (["recipe=imagenet", "data.root=gone"], "gone"),
    (["data.root=somewhere"], "recipe=imagenet"),
    (["data=as_trained"], "data.source"),
    (["engine.accelerator=cuda"], "cuda"),
    (["init=gone.pt"], "gone.pt"),
    (["model.img_size=9"], "9x9"),
    (["data.batch_size=63", "augment.mixup=0.5"], "data.batch_size=63"),
    (["loss.cosine_blocks=2"], "loss.cosine_blocks=2"),
    (["optimizer.opt=adamm"], "Did you mean 'adam"),
    (["hydra.run.dir={file}/run"], "hydra.run.dir="),
    (["hydra.sweep.dir=mine"], "add -m, or give hydra.run.dir=..."),
    (["epochs=2"], "'schedule.epochs'"),
    (["lr=0.1"], "'optimizer.lr'"),
    (["seed=1,2"], "add -m"),
    (["batch_size=8"], "'data.batch_size'"),
    (["receipe=cifar10"], "'recipe'"), (["swep=dose"], "'sweep'"),
    (["--lr", "0.1"], "no option --lr: write settings as key=value. Did you mean 'optimizer.lr'?"),
    (["--data-dir=/images", "--model", "vit"], "Did you mean 'data.root'?"), (["-b", "128"], "'data.batch_size'"),
    (["--cfg"], "--cfg/-c: invalid choice"),
    (["pretrained=true"], "'init'"),
    (["hflip=1"], "'augment.hflip' or 'data.hflip'"),
    (["hydra/launcher=submitit_slurm"], "pip install hydra-submitit-launcher"),
    (["~data"], "no setting 'data.interpolation'"),
    (["data.root=${data.rooot}"], "no setting 'data.rooot'"),
])
def test_bad_input_to_train_is_one_sentence(run, tmp_path, words, expected):
    (tmp_path / "file").write_text("in the way")
    code, _, sentence = run("train", *TINY, *(word.replace("{file}", str(tmp_path / "file")) for word in words))
    assert code == BAD_INPUT and expected in sentence and len(sentence.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_config_that_lacks_settings_is_one_sentence(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {depth: 3}\n")
    code, _, sentence = run("train", "--config-path", str(tmp_path), "--config-name", "mine")
    assert code == BAD_INPUT and "'engine'" in sentence and "--config-name" in sentence


def test_a_sweep_with_hydras_glob_and_its_own_record_of_each_cell(run, tmp_path):
    words = ["model/attention=glob(norm_only)", "hydra.output_subdir=.hydra"]
    code, said, _ = run("train", "-m", *TINY, "schedule.epochs=1", *words)
    assert code == DONE and "1 of 1 cells are done" in said
    assert len(list(tmp_path.glob("runs/digits/vit/*/.hydra/overrides.yaml"))) == 1


@pytest.mark.parametrize("words", [["hydra.output_subdir=.hydra"], [], [
    "-m", "hydra.sweep.dir=.", "hydra.sweep.subdir=theirs", "seed=0,1", "hydra.output_subdir=.hydra"]], ids=" ".join)
def test_another_hydra_programs_record_is_left_alone(run, tmp_path, words):
    theirs = tmp_path / "theirs/.hydra"
    theirs.mkdir(parents=True)
    (tmp_path / "multirun.yaml").write_text("${run_folder:''}\n")  # of a sweep of ours
    for name in ("config", "hydra", "overrides"):
        (theirs / f"{name}.yaml").write_text("theirs: 1\n")
    code, _, sentence = run("train", *TINY, *words, *([] if "-m" in words else ["hydra.run.dir=theirs"]))
    assert code == BAD_INPUT and "theirs" in sentence and "hydra.run.dir=..." in sentence
    assert {path.read_text() for path in theirs.iterdir()} == {"theirs: 1\n"}
    assert [*theirs.parent.iterdir()] == [theirs]


def test_a_run_says_what_it_leaves_and_is_cut_down_to_its_best(run, tmp_path):
    words = [*TINY, "model.embed_dim=64", f"hydra.run.dir={tmp_path}/here"]
    code, said, _ = run("train", *words)
    folder = tmp_path / "here" / "checkpoints"
    sizes = {name: (folder / f"{name}.pt").stat().st_size for name in ("last", "previous", "best")}
    found = re.search(r"([\d,]+) KiB each, best of ([\d,]+) KiB", said)
    whole, best = (int(size.replace(",", "")) * 2**10 for size in found.groups())
    assert code == DONE and sizes["last"] == pytest.approx(sizes["previous"], rel=0.01)
    assert sizes["last"] == pytest.approx(whole, rel=0.1) and sizes["best"] == pytest.approx(best, rel=0.1)
    (folder / "mine.pt").touch()
    code, said, _ = run("train", *words, "engine.keep=best")  # also of a run that is finished
    assert code == DONE and "is finished" in said
    assert {path.name for path in folder.iterdir()} == {"best.pt", "best.pt.sha256", "mine.pt"}
    assert run("train", *words)[0] == DONE  # and it stays finished


def test_a_profile_tells_where_a_step_goes(run, tmp_path):
    words = [*TINY, "schedule.epochs=1", "engine.device_batch=128", f"hydra.run.dir={tmp_path}/here"]
    code, said, _ = run("train", *words, "engine.profile=3")
    table = (tmp_path / "here" / "profile" / "steps-4-6.txt").read_text()  # of 6 steps, the third a warm-up
    assert code == DONE and table in said
    assert all(re.search(rf"^ *{part} ", table, re.MULTILINE) for part in ("forward", "backward"))
    trace = json.loads(gzip.decompress((tmp_path / "here" / "profile" / "steps-4-6.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("forward") == 6 and names.count("optimizer") == 3  # two micro-batches in each of three steps


@pytest.mark.parametrize("words", [
    ["train", "recipe=imagenet", "data.root=gone"], ["train", "init=gone"], ["eval", "checkpoint=gone"]])
def test_a_path_to_nothing_is_refused_before_torch_is_imported(tmp_path, words):
    program = (f"import sys; from deepvit.commands.main import main; code = main({words}); "
               f"sys.exit('torch' if 'torch' in sys.modules else code)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == BAD_INPUT and f"{words[-1]} does not exist" in done.stderr, done.stderr
    assert not [*tmp_path.iterdir()]
