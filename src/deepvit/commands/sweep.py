"""What a sweep does around its cells: opens its record before Hydra writes anything, and sums up from it."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from deepvit.config.compare import flat
from deepvit.config.provenance import as_typed, choices_of, digest, preregistration
from deepvit.config.records import FOLDER, SweepRecord, missing, remove_empty, written_for_us
from deepvit.errors import DONE, FAILED, STOPPED, UserError, did_you_mean
from deepvit.report.statistics import WHERE, Plan, read_plan
from deepvit.run.console import say
from deepvit.run.launch import joined

BASIC = f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
UNHASHED = ("data.workers=", "engine", "fresh=", "dry=", "hydra")  # the same sweep with others


class Refused(BaseException):
    """Carries a callback's error past Hydra, which only warns of an `Exception`."""


class Recorder(Callback):
    """Hydra's callback in the process that starts a sweep. Its `record` (path and session) reaches each cell through
    the config, wherever it runs; its `statistics` are contrasts, which the record keeps for the report."""

    opened: ClassVar["OpenSweep | None"] = None  # by this process
    made: ClassVar[Sequence[Path]] = ()  # by Hydra for this process's run or sweep, the innermost first

    def __init__(self, record: Sequence[str] | None = None, statistics: DictConfig | None = None):
        """Takes what Hydra gives, so that it refuses any other key; both are read from the config."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            _refuse_typed(config, "hydra.sweep.dir", "a sweep's, and this is one run: add -m, or give hydra.run.dir")
            run = Path(config.hydra.run.dir or "")
            Recorder.made = missing(run)
            _refuse_strange_output(run, config.hydra.output_subdir)
        except Exception as error:
            raise Refused(error) from None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            _refuse_typed(config, "hydra.run.dir", "one run's, and this is a sweep: give hydra.sweep.dir")
            Recorder.made = missing(Path(config.hydra.sweep.dir, "multirun.yaml"))
            Recorder.opened = _open(config)
        except Exception as error:
            raise Refused(error) from None


@dataclass(frozen=True)
class OpenSweep:
    """A sweep under way."""

    record: SweepRecord
    cells: int  # that it is to run, 0 where its sweeper decides as it goes
    is_kept: bool  # not of a forecast or an evaluation, which leave no run behind


def _open(config: DictConfig) -> OpenSweep:
    if joined():
        raise UserError("Start a sweep with `deepvit train -m ...`, not under torchrun: it starts the ranks itself.")
    hydra, folder = config.hydra, Path(config.hydra.sweep.dir)
    share = hydra.launcher.get("cells_per_device", 1)
    if not isinstance(share, int) or share < 1:
        raise UserError(f"hydra.launcher.cells_per_device={share}: give a whole number, 1 or more.")
    _refuse_strange(folder)
    params = OmegaConf.to_container(hydra.sweeper).get("params") or {}
    typed = [*(f"{key}={value}" for key, value in params.items()), *as_typed(hydra.overrides.task)]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # glob() asks it for a group's choices
    if any(parser.parse_override(word).is_sweep_override() for word in typed if word.startswith(("sweep=", "+sweep="))):
        raise UserError("A sweep's cells are its own, so two need two commands: give one sweep=NAME at a time.")
    sweep, session, is_kept = hydra.runtime.choices.get("sweep"), uuid4().hex[:8], config.get("dry") is False
    same = digest("\n".join(sorted(word for word in typed if not word.startswith(UNHASHED))))
    name = f"{sweep or 'cells'}-{same if is_kept else session}.jsonl"
    record = SweepRecord(folder / FOLDER / name, session)
    statistics = OmegaConf.to_container(hydra.callbacks.sweep).get("statistics")
    plan = read_plan(statistics) if statistics else None
    preregistration(hydra)  # refused before anything is written
    with open_dict(config):
        hydra.overrides.hydra.append(
            f"hydra.callbacks.sweep.record=[{in_quotes(str(record.path.absolute()))},'{session}']")
        roots = [parser.parse_override(word) for word in typed if word.startswith("data.root=")]
        subdir = str(OmegaConf.to_container(hydra.sweep)["subdir"])
        if any(root.is_sweep_override() for root in roots) and subdir.startswith("${run_folder:"):
            hydra.overrides.hydra.append("hydra.sweep.subdir=${run_folder:'',true}")
    cells = []
    if hydra.sweeper._target_ == BASIC:
        cells = BasicSweeper.split_arguments(parser.parse_overrides(typed), max_batch_size=None)[0]
    shared, described = _described(config, cells) if is_kept or hydra.output_subdir else ({}, [])
    for cell in described:
        _refuse_strange_output(folder / cell["folder"], hydra.output_subdir)
    if plan and described:
        _check_arms(plan, [{**shared, **cell["settings"]} for cell in described])
    record.open(shlex.join(["deepvit", hydra.job.config_name, *sys.argv[1:]]), sweep, described, shared, statistics)
    return OpenSweep(record, len(cells), is_kept)


def _refuse_typed(config: DictConfig, name: str, why: str) -> None:
    if any(word.lstrip("+").startswith(f"{name}=") for word in as_typed(config.hydra.overrides.hydra)):
        raise UserError(f"{name} is {why}=...")


def _refuse_strange(folder: Path) -> None:
    """Hydra writes multirun.yaml there before any of us runs."""
    from deepvit.engine.folder import MARK, RunFolder
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    multirun = folder / "multirun.yaml"
    if multirun.exists() and not written_for_us(multirun):
        raise UserError(f"{multirun} is not from a deepvit sweep: choose another folder with hydra.sweep.dir=...")
    known = (multirun, *(path for pattern in (f"{FOLDER}/*.jsonl", "eval/*/predictions.csv", "eval/*/knn.json")
                         for path in folder.glob(pattern)))
    runs = (path.parent for depth in range(5) for name in (MARK, "events.jsonl")  # 4: of a sweep's own folder
            for path in folder.glob("*/" * depth + name))
    if not any(path.exists() for path in known) and not any(RunFolder(path).is_ours() for path in runs):
        raise UserError(f"{folder} has other files, such as {min(folder.iterdir()).name}: give a new hydra.sweep.dir.")


def _refuse_strange_output(folder: Path, name: str | None) -> None:
    """Hydra writes `hydra.output_subdir` there before any of us runs."""
    if name and (folder / name).exists() and not written_for_us(folder / name / "hydra.yaml"):
        raise UserError(f"{folder / name} is not from a deepvit run: give another hydra.run.dir=... (hydra.sweep.dir "
                        f"of a sweep) or hydra.output_subdir=...")


def _described(config: DictConfig, cells: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that all cells share, and of each its overrides, folder and other settings (0.1 s a cell)."""
    settings, folders = [], []
    for number, overrides in enumerate(cells):
        with composed_cell(config, number, overrides) as (cell, folder):
            with open_dict(cell):
                origin = choices_of(cell.pop("hydra"))
            folders.append(folder)
            settings.append(dict(flat({**OmegaConf.to_container(cell, resolve=True), "origin": origin})))
    shared = {name: value for name, value in (settings or [{}])[0].items()
              if all(other.get(name, ...) == value for other in settings)}
    return shared, [{"overrides": own.pop("origin.overrides"), "folder": folder,
                     "settings": {name: value for name, value in own.items() if name not in shared}}
                    for folder, own in zip(folders, settings)]


def _check_arms(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a contrast of unknown settings, and says which values no cell has (the sweep may be cut on purpose)."""
    for contrast, name, value in ((one, *setting) for one in plan.contrasts for _, arm in one.arms
                                  for setting in arm.items()):
        found = [cell.get(name, cell.get(f"origin.choices.{name}", ...)) for cell in cells]
        if all(one is ... for one in found):
            known = {key.removeprefix("origin.choices.") for cell in cells for key in cell}
            raise UserError(f"{WHERE}.contrasts.{contrast.name} names {name}, which this sweep does not have."
                            f"{did_you_mean(name, known)}")
        if value not in found:
            say(f"No cell of this sweep has {name}={value}, which the contrast {contrast.name} names.")


@contextmanager
def composed_cell(config: DictConfig, number: int, overrides: Sequence[str]) -> Iterator[tuple[DictConfig, str]]:
    """Cell `number` as Hydra composes it, and its folder below the sweep's."""
    state = HydraConfig.instance()
    before, cell = state.cfg, GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
    with open_dict(cell):
        cell.hydra.job.id = cell.hydra.job.num = number
    try:
        state.set_config(cell)
        yield cell, str(OmegaConf.select(cell, "hydra.sweep.subdir"))
    finally:
        state.cfg = before


def in_quotes(text: str) -> str:
    """As a value in Hydra's grammar that is nothing but this text."""
    return QuotedString(text, Quote.single).with_quotes()


def record_of(hydra: DictConfig) -> SweepRecord | None:
    """The record that this job is a cell of; None for a job alone."""
    path, session = (hydra.callbacks.get("sweep") or {}).get("record") or (None, None)
    return path and SweepRecord(Path(path), session)


def sum_up(sweep: OpenSweep) -> int:
    """Prints which cells did not work, and the cost of a dry sweep. Returns the exit code."""
    outcomes = sweep.record.outcomes()
    if not sweep.is_kept:
        sweep.record.remove()
        if not sweep.record.path.parent.exists():  # it holds no other sweep's record
            remove_empty(Recorder.made)
    troubled = [line for line in outcomes if line["code"] != DONE]
    total = max(sweep.cells, len(outcomes))
    hours = [line["value"]["device_hours"] for line in outcomes if "device_hours" in line["value"]]
    if hours:
        say(f"\nTogether {sum(hours):.3g} device-hours ({len(hours)} of {total} cells).")
    say(f"\n{len(outcomes) - len(troubled)} of {total} cells are done.")
    for sentence, alike in groupby(troubled, lambda line: line["sentence"] or "The same command continues it."):
        for line in alike:
            say(f"  {'stopped' if line['code'] == STOPPED else 'failed'}: {', '.join(line['overrides'])}")
        say(f"    {sentence}")
    codes = {line["code"] for line in troubled}
    if len(outcomes) < total:
        say(f"  {total - len(outcomes)} reported nothing: their processes died or were never started.")
        codes.add(FAILED)
    return STOPPED if STOPPED in codes else min(codes, default=DONE)
