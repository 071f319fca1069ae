"""`deepvit train` and `deepvit eval`: Hydra's outermost layer, and its errors in a user's words."""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit.commands.sweep import Recorder, Refused, in_quotes, record_of, sum_up
from deepvit.config import CONF
from deepvit.config.compose import PLUGINS, setting_meant
from deepvit.config.provenance import as_typed, choices_of, origin, run_folder, typed_name
from deepvit.config.records import remove_empty
from deepvit.errors import BAD_INPUT, DONE, FAILED, STOPPED, UserError, did_you_mean, first_line
from deepvit.run.console import say
from deepvit.run.launch import Job, Outcome, launcher, unexpected

OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)

PATHS = ("checkpoint", "data.exclude", "data.root", "hydra.run.dir", "hydra.sweep.dir", "init", "out")
PARTS = re.compile(  # of a list or a sweep: between commas, of which those within quotes are none
    r"""(?:^|,)(\s*'(?:\\.|[^'\\])*'\s*(?=,|$)|\s*"(?:\\.|[^"\\])*"\s*(?=,|$)|[^,]*)""")
_outcomes: list[Outcome] = []  # of the jobs that this process ran


def run_job(job: Job, config: DictConfig) -> Any:
    """One job of Hydra's: the only one, or a cell of a sweep, which goes on whatever becomes of it. Returns the top-1
    of a training, for sweepers that look for the best."""
    settings = HydraConfig.get()
    if settings.mode is RunMode.RUN and not settings.run.dir:
        raise UserError("hydra.run.dir is empty: name a folder, or leave it out.")
    folder = Path(settings.runtime.output_dir)
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    outcome = Outcome(STOPPED, "Not started.")
    if all(before.code != STOPPED for before in _outcomes):  # who stops a cell means the cells after it, too
        if record_of(settings):
            say(f"\n[{settings.job.num + 1}] {', '.join(as_typed(settings.overrides.task)) or 'default'}")
        try:
            plain = OmegaConf.to_container(config, resolve=True)
            asked = origin(config, settings, folder) if job == "train" else choices_of_cell(settings)
            plain = {**plain, "origin": asked}
            outcome = launcher(plain, folder)(job, plain, folder)
        except UserError as error:
            outcome = Outcome(BAD_INPUT, str(error))
        except OmegaConfBaseException as error:  # a reference to nothing, such as ${oc.env:UNSET}
            outcome = Outcome(BAD_INPUT, hydra_error(error))
        except Exception as error:  # a defect in one cell must not end the others; its traceback is printed
            outcome = unexpected(error)
    if outcome.code == STOPPED and "TORCHELASTIC_RUN_ID" in os.environ:
        outcome = replace(outcome, code=DONE)  # or torchrun would restart all ranks; events.jsonl says PREEMPTED
    _outcomes.append(outcome)
    remove_empty(_made_for(settings, folder))  # a job that is refused, or dry, leaves none behind
    if record_of(settings):
        _note(outcome, settings, folder)
    return outcome.value.get("top1")


def _made_for(settings: DictConfig, folder: Path) -> Sequence[Path]:
    """The folders that Hydra made for a job: of a cell those below the sweep's."""
    if not record_of(settings):
        return Recorder.made
    top = Path(settings.sweep.dir).resolve()
    return [one for one in (folder.resolve(), *folder.resolve().parents) if top in one.parents]


def _note(outcome: Outcome, settings: DictConfig, folder: Path) -> None:
    record, overrides = record_of(settings), as_typed(settings.overrides.task)
    if outcome.code != STOPPED and outcome.message:
        say(outcome.message)
    try:
        record.add(settings.job.num, overrides, outcome.code, outcome.message, folder, outcome.value)
    except OSError as error:
        say(f"{record.path} cannot be written ({error.strerror}): the summary will lack this cell.", sys.stderr)


def choices_of_cell(settings: DictConfig) -> dict[str, Any]:
    """`choices_of` for an evaluation. In a sweep `cell` names it by the settings that its results are not named by."""
    chosen = choices_of(settings)
    words = [word for word in chosen["overrides"] if not word.startswith(("checkpoint=", "data=", "out=", "also="))]
    return chosen | ({"cell": typed_name(words)} if words and record_of(settings) else {})


def evaluate(arguments: Sequence[str]) -> int:
    """`deepvit eval SETTING=VALUE ...`; returns the exit code."""
    return _start("eval", [of_the_model(word) for word in arguments])


def of_the_model(word: str) -> str:
    """`num_heads=3` as `++model.num_heads=3`: Hydra asks for the signs where conf/eval.yaml does not list a setting."""
    name, equals, value = word.partition("=")
    name = re.sub(r"^\+*(?:model[./])?", "", name)
    known = {*yaml.safe_load((CONF / "model/vit.yaml").read_text()), "attention", "arch", "grid_size", "head"}
    return f"++model.{name}={value}" if equals and name in known else word


def _start(job: Job, arguments: Sequence[str]) -> int:
    task = update_wrapper(partial(run_job, job), run_job)  # the job, whatever --config-name the user gives
    program = hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name=job)(task)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's errors through to us
    if "OMP_WAIT_POLICY" not in os.environ:  # spin between two operations, not so long as to starve other programs
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    is_setting = re.compile(r"~|\+{0,2}[\w/.@:]+=").match  # Hydra takes its flags (`-m`, `--cfg job`) only in front
    sys.argv[1:] = sorted(map(quoted, arguments), key=lambda word: is_setting(word) is not None)
    parser = get_args_parser()
    parser.error = _refuse_option
    parser.parse_args()
    _outcomes.clear()
    Recorder.opened = None
    try:
        with sentences():
            program()
    except OSError as error:  # a job's own are caught in `launch`: this is the folder that Hydra makes for it
        if error.filename is None:
            raise
        raise UserError(f"{error.filename} cannot be created ({error.strerror}): give another hydra.run.dir=... "
                        f"(of a sweep: hydra.sweep.dir).") from None
    except Exception as error:
        if not Recorder.opened or isinstance(error, UserError):
            raise
        unexpected(error)  # of the sweeper or the launcher: what its cells did is in the record
        return sum_up(Recorder.opened) or FAILED
    if Recorder.opened:
        return sum_up(Recorder.opened)
    outcome = _outcomes[0] if _outcomes else Outcome(DONE)  # `--cfg job` and its like run none
    if outcome.message:
        say(outcome.message, sys.stderr if outcome.code else sys.stdout)
    return outcome.code


def _refuse_option(complaint: str) -> None:
    """UserError for argparse's `complaint`; who writes `--lr 0.1` or `-b 128` knows another trainer's options."""
    if found := re.match("unrecognized arguments: (-+([^ =]*))", complaint):
        meant = setting_meant(found[2].replace("-", "_"))
        raise UserError(f"There is no option {found[1]}: write settings as key=value.{meant}")
    raise UserError(f"{complaint}: `--hydra-help` lists the options.")


train = partial(_start, "train")  # `deepvit train SETTING=VALUE ...`; returns the exit code


@contextmanager
def sentences() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as a `UserError` in a user's words."""
    try:
        try:
            yield
        except Refused as refused:
            raise refused.args[0] from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(hydra_error(error)) from None
    except (TypeError, ValueError) as error:  # Hydra's own, of a group set to null or to a list of numbers
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name != "defaults_list.py":
            raise
        raise UserError("A group of settings is set to null or a list: choose a name that `--help` lists.") from None


def quoted(word: str) -> str:
    """`init=runs/seed=1/last.pt` as Hydra's grammar wants it, `init='runs/seed=1/last.pt'`: quotes what the grammar
    refuses and, in a setting that is a path, what exists by this name; in a list or a sweep each part by itself."""
    key, _, value = word.partition("=")
    if word.startswith("-") or not value or not _is_readable(f"{key}="):
        return word
    if key in PATHS and os.path.exists(value):
        return f"{key}={in_quotes(value)}"
    readable, inner = _is_readable(word), value[1:-1] if value[0] == "[" and value[-1] == "]" else value
    parts = ",".join(
        in_quotes(part.strip()) if key in PATHS and os.path.exists(part.strip())
        or not (readable or _is_readable(f"{key}={part}")) else part for part in PARTS.findall(inner))
    return f"{key}=[{parts}]" if inner != value else f"{key}={parts}"


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def hydra_error(error: Exception) -> str:
    """Hydra's or OmegaConf's complaint in one sentence that names the setting and what was probably meant."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        word = error.override
        return f"'{word}' cannot be read: write key=value, and quote special characters twice, \"key='a, b'\"."
    if sweep := re.match(r"Ambiguous value for argument '((.+?)=(.*))'", text):
        return f"{sweep[1]} is several values: add -m to sweep over them, or write the list {sweep[2]}=[{sweep[3]}]."
    if group := re.search(r"(?:In '.*?': )?Could not find '([^']+?)/([^'/]+)'", text):
        return _unknown_choice(*group.groups(), text)
    if override := re.search(r"Could not override '([^']+)'", text):
        return _unknown_setting(override[1])
    if text.startswith("Error merging override") and error.__cause__:
        text = f"{text}: {first_line(error.__cause__)}"
    elif missing := re.search(r"Interpolation key '([^']+)'|in struct\s+full_key: (\S+)", text):
        return (f"The config has no setting '{missing[1] or missing[2]}', which is needed: check references such as "
                f"${{...}}, settings deleted with ~, and the file given by --config-name.")
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _unknown_setting(name: str) -> str:
    meant = setting_meant(name)
    if f"'{name}'" not in meant:
        return f"There is no setting '{name}'.{meant} `--cfg job` lists them all."
    if any(word.startswith(("--config-path", "--config-name", "-cp", "-cn")) for word in sys.argv):
        return (f"The config that --config-path and --config-name give has no setting '{name}': leave them out, and "
                f"add your own files with --config-dir FOLDER.")
    if name.startswith("model.attention."):
        return f"'{name}' is not in the file of this model/attention: choose another, or add it as +{name}=..."
    return f"'{name}' is a setting of another program. `--cfg job` lists those of this one."


def _unknown_choice(group: str, name: str, text: str) -> str:
    if group.startswith("hydra/") and name in PLUGINS:
        return f"{group}={name} is a plugin that is not installed: pip install {PLUGINS[name]}"
    choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
    return f"There is no {group}={name}.{did_you_mean(name, choices)} Choose from {', '.join(choices)}."
