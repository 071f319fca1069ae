"""The compiled form: its tasks, and everything that may keep it from being built."""

import multiprocessing
import subprocess

import pytest
import torch
from attention_problems import problem

from deepvit.ops import native, tiles

needs_compiler = pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])


@pytest.fixture(params=["all of this processor's", "avx2"])
def instructions(request, monkeypatch):
    """Those that the kernel is built for."""
    if request.param == "avx2":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        native.load.cache_clear()
    yield
    monkeypatch.undo()
    native.load.cache_clear()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("batch, width, threads, tasks", [(1, 8, 2, 3), (3, 19, 2, 2), (5, 16, 1, 1)])
def test_tasks_cover_every_row(instructions, batch, width, threads, tasks):
    """A sample may be cut into several tasks, whose sums come together in a fixed order."""
    (q, k, v), leaves, _ = problem(batch, 3, 130, width, torch.float32)
    arguments = (q, k, v, leaves["mix"].detach(), 0.5)
    torch.set_num_threads(threads)
    assert native._sizes(q, 0.5).chunks == tasks
    try:
        out = native.centred_mix(*arguments, True)
        seeds = torch.ones_like(q), torch.ones(batch, 3), torch.ones(batch, 3, width)
        grads = native.centred_mix_backward(*seeds, *arguments)
        again = native.centred_mix_backward(*seeds, *arguments)
    finally:
        torch.set_num_threads(1)
    want = (*tiles.centred_mix(*arguments, True), *tiles.centred_mix_backward(*seeds, *arguments))
    for a, b in zip((*out, *grads), want, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


@needs_compiler
@torch.no_grad()
def test_takes_extreme_logits():
    """Attention on one key (logits of hundreds), and a lost value that must stay visible."""
    (q, k, v), leaves, _ = problem(1, 3, 19, 8, torch.float32, std=40.0)
    got = native.centred_mix(q, k, v, leaves["mix"], 1.0, True)
    for a, b in zip(got, tiles.centred_mix(*[x.double() for x in (q, k, v, leaves["mix"])], 1.0, True)):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-2)
    q = q.clone()
    q[0, 1, 2, 3] = float("nan")
    assert native.centred_mix(q, k, v, leaves["mix"], 1.0, True)[0][0, :, 2].isnan().all()


@pytest.mark.parametrize("name, value, why", [("DEEPVIT_NATIVE", "0", "DEEPVIT_NATIVE=0"), ("PATH", "", "no g++"),
                                              ("XDG_CACHE_HOME", "/proc/none", "not built")])
def test_says_why_it_is_not_there(monkeypatch, name, value, why):
    """Switched off, without a compiler, with a cache that cannot be written."""
    monkeypatch.setenv(name, value)
    library, said = native.load.__wrapped__()
    assert library is None and why in said


@pytest.mark.parametrize("script, why", [
    ("exit 1", "g++ failed"), ("exit 0", "not built"), ('for last; do :; done; echo garbage > "$last"', "not built")],
    ids=["fails", "writes nothing", "writes garbage"])
def test_a_broken_compiler_leaves_nothing_behind(monkeypatch, tmp_path, script, why):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library, said = native.load.__wrapped__()
    assert library is None and why in said and not list(tmp_path.glob("**/*.so"))


def test_a_library_is_for_one_kind_of_processor(monkeypatch):
    """A home may be shared: what AVX-512 was compiled for must not be found by a machine without it."""
    mine = native._signature()
    assert mine == native._signature()
    monkeypatch.setattr(native, "_processor", lambda: ["x86_64", "flags: fpu sse2 avx2", "model name: another"])
    other = native._signature()
    monkeypatch.setattr(native, "_processor", lambda: ["x86_64", "flags: fpu sse2", "model name: another"])
    least = native._signature()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert len({mine, other, least, native._signature()}) == 4


@needs_compiler
def test_the_compiler_is_held_back_where_torch_is(monkeypatch):
    for held_back in (False, True):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2") if held_back else None
        told = subprocess.run(["g++", *native._flags(), "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True,
                              text=True, check=True).stdout
        assert "__AVX512" not in told or not held_back and native.instructions() == "AVX512"


@needs_compiler
def test_processes_that_build_at_once_all_get_it(monkeypatch, tmp_path):
    """From a source that compiles in no time."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" { int deepvit_forward() { return 1; } int deepvit_backward() { return 2; } }')
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    starting, results = context.Barrier(10), context.Queue()
    ranks = [context.Process(target=_load, args=(starting, results)) for _ in range(10)]
    for rank in ranks:
        rank.start()
    assert [results.get(timeout=60) for _ in ranks] == 10 * [(3, "")]
    for rank in ranks:
        rank.join()
    assert [path.suffix for path in (tmp_path / "cache" / "deepvit").iterdir()] == [".so"]


def _load(starting, results):
    starting.wait()
    library, why = native.load.__wrapped__()
    results.put((library and library.deepvit_forward() + library.deepvit_backward(), why))
