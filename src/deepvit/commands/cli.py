"""`deepvit train` and `deepvit eval`: Hydra's outermost layer, and its errors in a user's words."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit.config import CONF
from deepvit.config.run_name import run_folder
from deepvit.config.suggest import PLUGINS, setting_meant
from deepvit.errors import DONE, STOPPED, UserError, did_you_mean
from deepvit.run.console import say
from deepvit.run.launch import Job, Outcome, eval_job, launch, train_job, unexpected

OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

_outcomes: list[tuple[str, Outcome]] = []  # of the jobs of this process, a sweep's cells in order


def run_job(job: Job, config: DictConfig) -> None:
    """One job of Hydra's: the only one, or a cell of a sweep, which goes on whatever becomes of it."""
    job_config = HydraConfig.get()
    folder = Path(job_config.runtime.output_dir)
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    is_cell = job_config.mode is RunMode.MULTIRUN
    if is_cell and "RANK" in os.environ:
        raise UserError("Start a sweep with `python train.py -m ...`, which starts the ranks of each cell itself, "
                        "not under torchrun.")
    name = ", ".join(job_config.overrides.task) or "default"
    if any(outcome.code == STOPPED for _, outcome in _outcomes):
        _remove_if_empty(folder)
        _outcomes.append((name, Outcome(STOPPED, "Not started.")))
        return
    if is_cell:
        say(f"\n[{len(_outcomes) + 1}] {name}")
    try:
        outcome = launch(job, OmegaConf.to_container(config, resolve=True), folder)
    except Exception as error:  # a defect in one cell must not end the others; its traceback is printed
        outcome = unexpected(error)
    if outcome.code != DONE:
        _remove_if_empty(folder)
    if is_cell and outcome.message:
        say(outcome.message)
    _outcomes.append((name, outcome))


@hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="train")
def _train(config: DictConfig) -> None:
    run_job(train_job, config)


@hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="eval")
def _evaluate(config: DictConfig) -> None:
    run_job(eval_job, config)


def train(arguments: Sequence[str]) -> int:
    """`deepvit train SETTING=VALUE ...`; returns the exit code."""
    return _start(_train, arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """`deepvit eval SETTING=VALUE ...`; returns the exit code."""
    return _start(_evaluate, arguments)


def _start(program: Callable[[], Any], arguments: Sequence[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's errors through to us
    if "OMP_WAIT_POLICY" not in os.environ:  # spin between two operations, not so long as to starve other programs
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    sys.argv[1:] = flags_first(map(quoted, arguments))
    _outcomes.clear()
    try:
        with sentences():
            program()
    except OSError as error:  # a job's own are caught in `launch`: this is the folder that Hydra makes for it
        if error.filename is None:
            raise
        raise UserError(f"The run folder {error.filename} cannot be made ({error.strerror}): choose another with "
                        f"hydra.run.dir=...") from None
    if len(_outcomes) > 1:
        return _sum_up()
    for _, outcome in _outcomes:
        if outcome.message:
            say(outcome.message, sys.stderr if outcome.code else sys.stdout)
        return outcome.code
    return DONE


@contextmanager
def sentences() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as a `UserError` in a user's words."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(hydra_error(error)) from None
    except ValueError as error:  # Hydra's own, of a group set to null
        if "Config group override" not in str(error):
            raise
        raise UserError("A group of settings cannot be null: choose one of `--help`'s, or leave it out.") from None


def flags_first(words: Iterable[str]) -> list[str]:
    """Hydra takes its flags (`-m`, `--cfg job`) only in front of the settings."""
    words = list(words)
    settings = [word for word in words if re.match(r"~|\+{0,2}[\w/.@:]+=", word)]
    return [word for word in words if word not in settings] + settings


def _sum_up() -> int:
    """A sweep's end: what did not work, by name, and the cost of a dry one."""
    troubled = [(name, outcome) for name, outcome in _outcomes if outcome.code != DONE]
    hours = [outcome.value["device_hours"] for _, outcome in _outcomes if outcome.value]  # of dry runs
    if hours:
        say(f"\nAll {len(hours)} cells together: {sum(hours):.3g} device-hours.")
    say(f"\n{len(_outcomes) - len(troubled)} of {len(_outcomes)} cells are done.")
    for sentence, alike in groupby(troubled, lambda one: one[1].message or "The same command continues it."):
        for name, outcome in alike:
            say(f"  {'stopped' if outcome.code == STOPPED else 'failed'}: {name}")
        say(f"    {sentence}")
    codes = {outcome.code for _, outcome in troubled}
    return STOPPED if STOPPED in codes else min(codes, default=DONE)


def quoted(word: str) -> str:
    """`init=runs/seed=1/last.pt` as Hydra's grammar wants it, `init='runs/seed=1/last.pt'`: our folders have a =.

    In a list or a sweep each part is quoted by itself; what is quoted already, and everything else, stays as it is.
    """
    key, _, value = word.partition("=")
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if word.startswith("-") or "=" not in value or any(sign in value for sign in "'\"(){}$"):
        return word
    parts = ",".join(f"'{part.strip()}'" if "=" in part else part for part in inner.split(","))
    return f"{key}=[{parts}]" if inner != value else f"{key}={parts}"


def _unreadable(words: list[str]) -> str:
    """The word of a command line that Hydra cannot parse, in a sentence."""
    parser = OverridesParser.create()
    for word in words:
        try:
            parser.parse_override(word)
        except HydraException:
            return (f"'{word}' cannot be read as a setting: write key=value, and quote a value with special signs, "
                    f"key='a, b'.")
    return "The command line cannot be read: write settings as key=value."


def hydra_error(error: Exception) -> str:
    """Hydra's or OmegaConf's complaint in one sentence that names the setting and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _unreadable([word for word in sys.argv[1:] if not word.startswith("-")])
    group = re.search(r"(?:In '.*?': )?Could not find '([^']+?)/([^'/]+)'", text)
    if group:
        return _unknown_choice(*group.groups(), text)
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        return f"There is no setting '{override[1]}'.{setting_meant(override[1])} `--cfg job` lists them all."
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _unknown_choice(group: str, name: str, text: str) -> str:
    if group.startswith("hydra/") and name in PLUGINS:
        return f"{group}={name} is a plugin that is not installed: pip install {PLUGINS[name]}"
    choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
    return (f"There is no {group}={name}.{did_you_mean(name, choices)} "
            f"The choices of {group} are: {', '.join(choices)}.")


def _remove_if_empty(folder: Path) -> None:
    """Hydra makes the folder before the job; a refused job leaves none behind."""
    for path in (folder, *list(folder.parents)[:3]):
        try:
            path.rmdir()
        except OSError:
            return
