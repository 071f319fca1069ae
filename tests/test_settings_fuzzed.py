"""Any value for any setting: everything that a run is built of can be built, or one sentence says why not."""

import copy
import io
import json
import socket
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit.commands.main import main
from deepvit.config import CONF
from deepvit.config.compare import flat
from deepvit.config.compose import compose
from deepvit.config.settings import read_evaluation
from deepvit.engine.ranks import Ranks
from deepvit.errors import BAD_INPUT, DONE, STOPPED, UserError
from deepvit.run import build, evaluate, launch, measures

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["model=vit", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "data.workers=0", "probe.images=0"]
NUMBERS = ["0", "1", "2", "3", "7", "-1", "-2", "0.5", "1.5", "-0.5", "1e-300", "1e300", "-1e300", "1e999", "nan",
           "inf", "-inf", "2147483648", "-9223372036854775809", "18446744073709551616", "1" + "0" * 40]
WORDS = ["null", "true", "false", "abc", "''", "' '", "é", "a.b", "[", "{", "${seed}", "${nope}", "${oc.env:NOPE}",
         "???", "auto", "/", "\\\\", "a=b", "1:2", "-2:", "'1'", "0x10", "1,2", "choice(1,2)", "range(3)", "x" * 5000,
         "'a\\nb'", "."]
MAPPINGS = ["{}", "{a: 1}", "{1: 2}", "{name: conv}", "{name: [patch]}", "{name: conv, norm_batch: -1}",
            "{name: hybrid, layers: [1], width: 7}", "{class: SelfAttention}", "{class: abc}", "{nesterov: true}"]
ADDED = [f"model.attention.{name}" for name in (
    "mix", "norm", "norm_eps", "norm_batch", "theta_init", "attn_drop", "proj_drop", "first", "last", "head_dim",
    "qk_norm", "norm_layer", "depth")] + ["model.stem.name", "model.stem.norm_batch", "model.nope", "data.nope",
                                          "optimizer.kwargs.nesterov", "optimizer.kwargs.amsgrad", "nope", "weights"]
GROUPS: dict[str, list[str]] = {}  # "model/attention" -> its choices
USED: dict[str, set[str]] = {}  # a setting -> values that it has somewhere in conf/
for path in CONF.rglob("*.yaml"):
    *above, name = path.relative_to(CONF).with_suffix("").parts
    if above:
        GROUPS.setdefault("/".join(above), []).append(name)
    for key, value in flat(yaml.safe_load(path.read_text()) or {}):
        place = ".".join([*(above if above not in (["recipe"], ["sweep"]) else ()), key])
        USED.setdefault(place, set()).add(value if isinstance(value, str) else json.dumps(value))

numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(-10, 70).map(str))
scalars = st.one_of(numbers, st.sampled_from(WORDS))
lists = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5).map(lambda parts: f"[{','.join(parts)}]"),
                     max_leaves=6)
values = st.one_of(numbers, scalars, lists, st.sampled_from(MAPPINGS))


def overrides(config_name: str) -> st.SearchStrategy[str]:
    """One word of a command: a setting, a group, a whole group's settings, one that is added or taken away."""
    keys = sorted(name for name, _ in flat(compose(config_name=config_name)))
    known = sorted((name, value) for name in keys for value in USED.get(name, ()))
    above = sorted({key.rpartition(".")[0] for key in keys} - {""})

    def words(names: list[str], given: st.SearchStrategy[str], form: str) -> st.SearchStrategy[str]:
        return st.builds(form.format, st.sampled_from(names), given)

    setting, valid = words(keys, values, "{}={}"), st.sampled_from([f"{name}={value}" for name, value in known])
    choice = st.sampled_from([f"{group}={name}" for group in sorted({*GROUPS} - {"sweep"}) for name in GROUPS[group]])
    odd = st.one_of(words(sorted(GROUPS), values, "{}={}"), words(above, values, "{}={}"),
                    words(ADDED, values, "+{}={}"), st.sampled_from(keys).map("~{}".format), choice)
    return st.integers(0, 9).flatmap(lambda kind: setting if kind < 6 else valid if kind < 8 else odd)


def commands(config_name: str) -> st.SearchStrategy[list[str]]:
    return st.lists(overrides(config_name), min_size=1, max_size=3, unique_by=lambda word: word.partition("=")[0])


def checked(config: Mapping[str, Any], ranks: Ranks, stop: Any) -> dict[str, Any]:
    """A dry run up to its first update."""
    chosen = build.read_settings(config)
    build.check(chosen, ranks)
    splits = build.shared_splits(chosen.data, ranks)
    build.schedule_and_plan(chosen, len(splits.train))
    return {}


def asked_to_stop(*_: Any) -> None:
    raise launch.Stopped


def fuzzed(first: int, count: int):
    """`count` commands drawn from seed `first`, the same ones each time."""
    return lambda test: seed(first)(settings(max_examples=count, deadline=None, database=None,
                                             phases=[Phase.generate], suppress_health_check=list(HealthCheck))(test))


# Many commands, whose single settings are put into a composed config as Hydra puts them

@cache
def base(config_name: str) -> DictConfig:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra_compose(config_name, overrides=SMALL if config_name == "train" else [])


def composed(config_name: str, words: list[str]) -> dict[str, Any] | None:
    """None: Hydra's grammar or an interpolation refuses it, or Hydra alone can tell."""
    config = copy.deepcopy(base(config_name))
    try:
        for word in words:
            override = OverridesParser.create().parse_override(word)
            if override.is_sweep_override() or override.key_or_group in GROUPS:
                return None
            group, _, key = override.key_or_group.rpartition(".")
            if override.is_delete():
                (OmegaConf.select(config, group) if group else config).pop(key)
            else:
                OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
        return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError):
        return None


def outcome(config_name: str, words: list[str]) -> str:
    """`built`, or the sentence that refuses it."""
    config = composed(config_name, words)
    if config is None:
        return "Hydra's"
    try:
        if config_name == "train":
            checked(config, ALONE, None)
        else:
            read_evaluation(config)
    except UserError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_config_is_built_or_refused_in_a_sentence(count):
    seen = Counter()

    def one(config_name: str, words: list[str]) -> None:
        found = outcome(config_name, words)
        assert "\n" not in found and len(found) < 1500, words
        seen[found] += 1

    fuzzed(count, count * 4 // 5)(given(st.just("train"), commands("train"))(one))()
    fuzzed(count, count // 5)(given(st.just("eval"), commands("eval"))(one))()
    assert seen.total() == count and len(seen) > count / 5 and seen["built"] > count / 20


# The programs themselves, up to the first update or the first batch of an evaluation

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    GlobalHydra.instance().clear()
    assert main(["train", *SMALL, "data.fraction=0.1", "schedule.epochs=1", "schedule.warmup_epochs=0",
                 f"hydra.run.dir={folder}"]) == DONE
    return folder / "checkpoints" / "best.pt"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 4))
def test_a_command_is_run_or_refused_in_a_sentence(first, checkpoint, tmp_path, monkeypatch):
    def unconnected(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measures, "forecast", checked)
    monkeypatch.setattr(evaluate, "_evaluate", asked_to_stop)
    monkeypatch.setattr(launch, "_run_ranks", lambda job, config, folder, devices: launch.run_rank(job, config, folder))
    monkeypatch.setattr(socket.socket, "connect", unconnected)
    codes = Counter()

    def check(words: list[str], good: int) -> None:
        GlobalHydra.instance().clear()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = main(words)
        torch.set_num_threads(1)
        sentence = said.getvalue().strip()
        assert code in (good, BAD_INPUT) and "Traceback" not in sentence, (words, code, sentence)
        assert code == good or sentence and len(sentence.splitlines()) == 1, (words, sentence)
        codes[code] += 1

    @fuzzed(first, 110)
    @given(commands("train"))
    def trains(words):
        check(["train", *SMALL, *words, "dry=true"], DONE)
        assert not [*tmp_path.iterdir()], words

    @fuzzed(first, 20)
    @given(commands("eval"))
    def evaluates(words):
        check(["eval", f"checkpoint={checkpoint}", *words], STOPPED)

    trains()
    evaluates()
    assert codes.total() == 130 and min(codes[DONE], codes[BAD_INPUT]) > 1
