"""The bench runs and says what it measured; how fast anything is, no test asks."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from gpu_session import read
from test_data_sets import IMAGES
from torch import nn

from deepvit.bench import models, rows, timing
from deepvit.bench.models import TrainStep
from deepvit.bench.rows import TARGETS, against_targets
from deepvit.commands.bench import BENCHES
from deepvit.commands.main import main
from deepvit.errors import UserError

KEPT = Path(__file__).parent.parent / "docs" / "results" / "bench-cpu.json"
PEERS = ["timm ViT, fused attention", "deepvit, self-attention", "deepvit, re-attention",
         "re-attention, published form", "re-attention, vit-pytorch's form"]


@pytest.fixture
def bench(tmp_path, capsys):
    def run(*words: str):
        code = main(["bench", *words, "--device", "cpu", "--json", str(tmp_path / "b.jsonl")])
        return code, capsys.readouterr(), read(tmp_path / "b.jsonl")

    return run


def test_rows_are_added_to_rows_alone(tmp_path):
    (tmp_path / "b.jsonl").write_text("mine\n")
    assert main(["bench", "ceilings", "--json", str(tmp_path / "b.jsonl")]) == 2
    assert (tmp_path / "b.jsonl").read_text() == "mine\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence(capsys):
    assert main(["bench", "ceilings", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.slow
def test_models_stand_beside_their_peers(bench):
    code, said, results = bench("train-step", "eval", "memory", "--depth", "1", "--batch", "1", "--seconds", "0.1")
    assert code == 0
    found = {name: bench["rows"] for name, bench in results.items()}
    for name in ("train-step", "eval", "memory"):
        made = results[name]["provenance"]
        assert {"cores", "threads", "caches", "versions", "date", "driver", "triton"} < made.keys()
        assert made["instructions"].keys() == {"torch", "matrices", "kernel"}
        assert {row["on"] for row in found[name]} == {rows.made_on("cpu")}
        assert [row["name"] for row in found[name]] == PEERS and found[name][0]["ratio"] == 1
    for target in TARGETS["cpu"]:
        if target.on in (None, rows.made_on("cpu")):
            assert (target.what in said.out) == (target.bench in ("train-step", "eval", "memory")), target
    kept, maps = ({row["name"]: row[field] for row in found["memory"]} for field in ("kept_mib", "maps_mib"))
    assert kept["deepvit, re-attention"] < 1.08 * kept[PEERS[0]] < kept["re-attention, published form"]
    one = 12 * 197**2 * 4 / 2**20  # a block's maps of one image, MiB
    assert [maps[name] for name in PEERS] == pytest.approx([0, 0, 0, 3 * one, 3 * one])


def test_a_contestant_that_fails_is_a_row_and_one_that_does_not_fit_gets_half_the_batch(bench, monkeypatch):
    class Hungry(nn.Linear):
        def forward(self, x):
            if x.device.type != "meta" and len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return super().forward(x.mean((2, 3)))

    def fail():
        raise TypeError("no such thing\nand more")

    monkeypatch.setattr(models, "contestants", lambda *sizes: {
        PEERS[0]: lambda: Hungry(3, 1000), "broken": fail, "ours": lambda: Hungry(3, 1000)})
    code, said, results = bench("train-step", "--batch", "8", "--seconds", "0")
    broken, *others = results["train-step"]["rows"]
    assert code == 1 and "TypeError: no such thing" in said.err and broken["failed"] == "TypeError: no such thing"
    assert [row["name"] for row in others] == [PEERS[0], "ours"]
    for row in others:
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"]) and "at batch 2, 8 does not fit" in row["note"]


def test_a_contestant_without_memory_beside_the_others_is_left_out():
    def hungry():
        raise torch.OutOfMemoryError("CUDA out of memory")

    steps = {"small": lambda: None, "hungry": hungry}
    times = timing.interleaved(steps, "cpu", 0)
    assert times.keys() == {"small"} and len(times["small"]) == timing.MIN_ROUNDS
    assert timing.left_out(steps, times) == [{"name": "hungry", "failed": "out of memory beside the others"}]


def test_a_bench_that_ends_early_leaves_its_rows(bench, monkeypatch):
    def rows_until():
        yield {"case": "a case", "name": "known"}
        raise RuntimeError("the device is gone")

    monkeypatch.setitem(BENCHES, "eval", rows_until)
    code, said, results = bench("eval")
    assert code == 1 and [row["name"] for row in results["eval"]["rows"]] == ["known", "all that was to follow"]
    assert "the device is gone" in results["eval"]["rows"][1]["failed"] and "the device is gone" in said.err


def test_calls_on_a_gpu_are_queued_between_two_marks(monkeypatch):
    """Twenty short ones behind one that is not counted; of long ones as many as take 0.2 s."""
    class Mark:
        clock = 0.0  # ms

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Mark.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def step(name, ms):
        made[name] += 1
        Mark.clock += ms

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    made = {"short": 0, "long": 0}
    times = timing.interleaved({"short": partial(step, "short", 1.0), "long": partial(step, "long", 50.0)}, "cuda", 0)
    assert made == {"short": 2 + 5 * 21, "long": 2 + 5 * 5}
    for name, seconds in (("short", 0.001), ("long", 0.05)):
        assert [call.wall for call in times[name]] == pytest.approx([seconds] * 5)
        assert timing.paired(times[name], times["short"])["waited"] == 0  # the clock is the GPU's own


def test_what_is_waited_for_is_told_from_what_is_computed():
    idle, busy = timing.timed(partial(time.sleep, 0.05), "cpu"), timing.timed(partial(sum, range(10**6)), "cpu")
    assert idle.computed < 0.01 < 0.05 <= idle.wall and busy.computed <= 1.01 * busy.wall
    base = [timing.Call(1.0, 1.0), timing.Call(1.0, 0.5), timing.Call(2.0, 2.0)]
    ours = [timing.Call(3.0, 2.0), timing.Call(3.0, 3.0), timing.Call(6.0, 5.5)]
    found = timing.paired(ours, base, size=2)  # of twice the images
    assert found == {"ratio": 1.5, "pairs": (1.5, 1.5), "waited": pytest.approx(16 / 14 - 1)}


@pytest.mark.parametrize("field, value, decided", [("waited", 0.099, True), ("waited", 0.1, False),
                                                   ("pairs", (0.98, 1.029), True), ("pairs", (0.98, 1.03), False)])
def test_a_busy_machine_decides_nothing(field, value, decided):
    row = {"case": "train step, 32", "on": "AVX512", "name": PEERS[2], "ratio": 1.0, "pairs": (1.0, 1.0), "waited": 0.0}
    judged, = against_targets({"train-step": [row | {field: value}]}, "cpu")
    assert judged["met"] == "yes" if decided else judged["met"].startswith("undecided")


def test_a_stand_in_is_judged_by_the_same_bound_under_its_own_name():
    found = {"AVX512": 1.05, "AVX2": 1.09, "AVX2 (stand-in)": 1.11, "AVX2 (stand-in), no compiler": 1.19, "SVE256": 1}
    rows = [{"case": "train step", "on": on, "name": PEERS[2], "ratio": ratio} for on, ratio in found.items()]
    judged = against_targets({"train-step": rows}, "cpu")
    assert [(row["on"], row["target"], row["met"]) for row in judged] == [
        ("AVX512", "<= 1.05", "yes"), ("AVX2", "<= 1.1", "yes"), ("AVX2 (stand-in)", "<= 1.1", "no"),
        ("AVX2 (stand-in), no compiler", "<= 1.2", "yes")]


@pytest.mark.parametrize("torch_has, flags, kernel, held_back, on", [
    ("AVX512", "avx2 avx512f", "AVX512", {}, "AVX512"), ("AVX2", "avx avx2 fma", "AVX2", {}, "AVX2"),
    ("AVX2", "avx2 avx512f", "AVX2", rows.HELD_BACK, "AVX2 (stand-in)"),
    ("AVX2", "avx2 avx512f", None, rows.HELD_BACK, "AVX2 (stand-in), no compiler"),
    ("AVX2", "avx2 avx512f", "AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}, UserError)])
def test_rows_say_what_they_were_made_on(monkeypatch, tmp_path, torch_has, flags, kernel, held_back, on):
    for name in rows.HELD_BACK:
        monkeypatch.setenv(name, held_back[name]) if name in held_back else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_has)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A 9000\nflags\t\t: fpu {flags} clzero\n")
    monkeypatch.setattr(rows, "PROCESSOR", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr(rows.native, "instructions", lambda: kernel)
    if on is UserError:
        with pytest.raises(UserError, match="MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2"):
            rows.made_on("cpu")
    else:
        assert rows.made_on("cpu") == on


def test_the_floor_is_the_larger_of_two_times():
    best = timing.Ceilings(bytes_per_s=1e12, flops_per_s=1e15)
    assert (best.floor_ms(2e12, 1e9), best.floor_ms(2e12, 5e9)) == pytest.approx((2.0, 5.0))
    step = TrainStep(partial(nn.Conv2d, 3, 1000, 8, bias=False), 2, 8, "cpu")
    step.loss = lambda network: network(step.x).sum()
    assert step.flops() == 3 * 2 * (2 * 1000 * 3 * 8 * 8) and step.moved() == 7 * 4 * 1000 * 3 * 8 * 8


def test_ceilings_are_of_the_threads_in_use(monkeypatch):
    """Small shapes are measured on one thread, and what all threads reach is not their floor."""
    monkeypatch.setitem(timing.COPY_AND_PRODUCT, "cpu", (64, 2))
    monkeypatch.setattr(timing, "timed", lambda *_: timing.Call(1 / torch.get_num_threads(), 0))
    usual, found = torch.get_num_threads(), []
    try:
        for threads in (5, 3):
            torch.set_num_threads(threads)
            found.append(timing.ceilings("cpu").flops_per_s)
    finally:
        torch.set_num_threads(usual)
    assert found == [16 * 5, 16 * 3]


def test_a_small_model_trains_end_to_end(bench):
    code, said, results = bench("small", "--depth", "1", "--batch", "8")
    row, = results["small"]["rows"]
    assert code == 0 and row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 and "on digits" in row["case"]


def test_the_loader_stands_beside_timms(bench):
    code, said, results = bench("loader", "--data", str(IMAGES / "train"), "--seconds", "0.1")
    assert code == 0
    assert {row["case"] for row in results["loader"]["rows"]} == {"decode + crop + flip", "full recipe", "evaluation"}


@pytest.mark.parametrize(("words", "said"), [
    (["loader"], "give --data FOLDER"), (["loader", "--data", "nowhere"], "--data nowhere"),
    (["small", "--cifar10", "nowhere"], "--cifar10 nowhere"), (["eval", "--seconds", "-1"], "--seconds"),
    (["eval", "--seconds", "nan"], "--seconds"), (["eval", "--depth", "0"], "--depth"),
    (["eval", "--batch", "-3"], "--batch")], ids=str)
def test_options_are_refused_before_the_machine_is_measured(words, said, monkeypatch, capsys):
    monkeypatch.setattr("deepvit.bench.rows.provenance", None)
    assert main(["bench", *words, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_options_that_a_bench_does_not_take_are_said(bench, monkeypatch):
    monkeypatch.setitem(BENCHES, "attention", lambda device: [])
    _, said, _ = bench("attention", "--depth", "3", "--compile")
    assert "No effect on attention: --depth, --compile." in said.err
    assert "No effect" not in bench("attention")[1].err


@pytest.mark.parametrize(("device", "number"), [(device, number) for device in TARGETS
                                                for number in range(len(TARGETS[device]))])
def test_a_target_is_met_up_to_its_bound_and_no_further(device, number):
    target = TARGETS[device][number]
    beyond = (0.01 if target.at_most else -0.01) * (target.bound or 1)
    for value, met in ((target.bound, "yes"), (target.bound + beyond, "no")):
        row = {"case": f"{target.case} and more", "on": target.on, "name": target.name, target.field: value}
        judged = against_targets({target.bench: [row]}, device)
        assert [one["met"] for one in judged if one["what"] == target.what] == [met]


def test_every_target_finds_its_row_in_the_figures_of_the_docs():
    """A bench whose rows were renamed would be judged by nothing."""
    for on in {target.on for target in TARGETS["cpu"]}:
        results = {name: [{**row, "on": on} for row in bench["rows"]]
                   for name, bench in json.loads(KEPT.read_text()).items()}
        assert [row["what"] for row in against_targets(results, "cpu")] == [
            target.what for target in TARGETS["cpu"] if target.on in (None, on) and "one thread" not in target.what]
