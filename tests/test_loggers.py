"""Where a run's numbers go: viewers get what changes, go on where a run is resumed, and never stop it."""

import itertools
import json
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import soak
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from test_programs import TINY

from deepvit.config.compose import compose
from deepvit.config.records import read_json_lines
from deepvit.engine import loggers
from deepvit.engine.folder import RunFolder
from deepvit.engine.loggers import LoggedRun, Loggers, TensorBoard, chosen
from deepvit.errors import BAD_INPUT, DONE, UserError

RECORDED = Path(__file__).parent / "data" / "report" / "digits" / "vit" / "16-reattention"  # 16 blocks
ONE_EPOCH = [word for word in TINY if not word.startswith(("schedule.epochs", "logger"))] + ["hydra.run.dir=here"]


def told(folder: Path, viewers, step: int = 0, until: int = 10**9) -> Loggers:
    """What a recorded run told its loggers, up to a step; the caller closes them."""
    logged = Loggers(LoggedRun(RunFolder(folder), "id", step, compose(["model=deepvit32"])), viewers)
    for line in read_json_lines(RECORDED / "metrics.jsonl"):
        values = {name: value for name, value in line.items() if name not in ("step", "epoch")}
        group = "attention" if "probe" in values else "val" if "top1" in values else "train"
        if step <= line["step"] <= until:
            logged.log_scalars(group, values.get("probe", values), line["step"], line["epoch"])
    return logged


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_few_curves_settings_and_a_row_in_the_hparams_tab(tmp_path):
    logged = told(tmp_path, [TensorBoard])
    logged.log_images(lambda: {"attention/by_block": np.zeros((4, 6, 3), np.uint8)}, 0)
    logged.log_result({"top1": 77.5, "params": 670000}, 230)
    logged.close()
    found = read(tmp_path)
    last = [line for line in read_json_lines(RECORDED / "metrics.jsonl") if "probe" in line][-1]
    tags = found.Tags()["scalars"]
    assert 20 < len(tags) <= 60 and {"train/loss", "val/top1", "result/top1"} <= {*tags}
    left_out = {"images", "tokens", "heads", "blocks", "norm_eps", "n", "adjacent"}
    assert not left_out & {tag.split("/")[-1] for tag in tags}
    assert found.Scalars("attention/entropy")[-1].value == pytest.approx(np.mean(last["probe"]["entropy"]))
    assert found.Images("attention/by_block")[0].width == 6
    assert b"depth: 32" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]

    def hparams(name: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(found.summary_metadata[f"_hparams_/{name}"].plugin_data.content)

    assert hparams("session_start_info").session_start_info.hparams["model.depth"].number_value == 32
    shown = {info.name.tag for info in hparams("experiment").experiment.metric_infos}
    assert shown == {"result/top1", "result/params"} <= {*tags}


def test_tensorboard_forgets_what_was_logged_beyond_the_step_of_a_resumed_run(tmp_path, monkeypatch):
    # A reader takes files of one second in the order of this number, by its digits: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    steps = [line["step"] for line in read_json_lines(RECORDED / "metrics.jsonl") if "lr" in line]
    told(tmp_path, [TensorBoard]).close()
    told(tmp_path, [TensorBoard], step=steps[2], until=steps[3]).close()
    assert sorted({event.step for event in read(tmp_path).Scalars("train/loss")}) == steps[:4]


def test_a_viewer_that_cannot_be_written_leaves_the_others_and_the_record(tmp_path, monkeypatch):
    class Full(TensorBoard):
        def log_scalars(self, *_):
            raise OSError(28, "No space left on device")

    warnings, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: warnings.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("deepvit.engine.loggers"), "handlers", [handler])
    told(tmp_path, [Full, TensorBoard]).close()
    assert len(read(tmp_path).Scalars("train/loss")) > 3
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == len(read_json_lines(RECORDED / "metrics.jsonl"))
    assert len(warnings) == 1 and "Full cannot be written (No space left on device)" in warnings[0]


def test_a_logger_is_one_class_and_a_line_and_is_told_where_a_run_resumes(run, monkeypatch):
    seen = []

    class Mine:
        needs = "json"

        def __init__(self, logged: LoggedRun):
            self.first = logged.step
            seen.append(("begin", logged.id, logged.step, logged.settings["model"]["depth"]))

        def __getattr__(self, method):
            return lambda *arguments: seen.append((method, *arguments))

    monkeypatch.setitem(loggers.LOGGERS, "mine", Mine)
    assert run("train", *ONE_EPOCH, "logger=mine", "schedule.epochs=1")[0] == DONE
    Path("here/metrics.json").unlink()  # as if it had been cut before its last words
    assert run("train", *ONE_EPOCH, "logger=[mine]", "schedule.epochs=2")[0] == DONE
    assert not [*Path("here").glob("events.out*")]
    begun, resumed = (event for event in seen if event[0] == "begin")
    assert begun[1] == resumed[1] and begun[2:] == (0, 2) and resumed[2:] == (6, 2)
    groups = [event[1] for event in seen if event[0] == "log_scalars"]
    assert [group for group, _ in itertools.groupby(groups)] == [
        "attention", "train", "val", "attention", "train", "val", "attention"]
    assert [event[0] for event in seen if event[0] in ("log_result", "close")] == ["log_result", "close"] * 2
    Path("here/events.jsonl").unlink()  # as `fresh=true` does
    assert RunFolder(Path("here")).run_id() != begun[1]


@pytest.mark.parametrize(("names", "expected"), [
    ("tensorbord", "Did you mean 'tensorboard'"), (["tensorboard", "nowhere"], "pip install no_such_package")])
def test_a_logger_that_is_not_there_is_one_sentence(monkeypatch, names, expected):
    nowhere = type("Nowhere", (TensorBoard,), {"needs": "no_such_package"})
    monkeypatch.setitem(loggers.LOGGERS, "nowhere", nowhere)
    with pytest.raises(UserError, match=expected):
        chosen(names)
    assert chosen(None) == [] and chosen("tensorboard") == [TensorBoard]


def records_of(path: Path) -> list:
    """The records of a .wandb file: after 7 bytes LevelDB's log format, blocks of 32 KiB of (crc, length, type)."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*ONE_EPOCH, "logger=wandb"]
    assert run("train", *words, "schedule.epochs=1")[0] == DONE
    Path("here/metrics.json").unlink()
    assert run("train", *words, "schedule.epochs=2")[0] == DONE
    files = sorted(Path("here/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name
    logged = [line for line in soak.lines(Path("here/metrics.jsonl")) if "lr" in line]
    shown = {}
    for record in itertools.chain.from_iterable(map(records_of, files)):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            shown[items["step"]] = items["train/loss"]
    assert shown == {line["step"]: line["loss"] for line in logged}


@pytest.mark.slow
def test_wandb_without_an_account_is_one_sentence_and_nothing_is_written(run, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    code, _, sentence = run("train", *ONE_EPOCH, "logger=wandb", "schedule.epochs=1")
    assert code == BAD_INPUT and "WANDB_MODE=offline" in sentence and not Path("here/config.yaml").exists()
