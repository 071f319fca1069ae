"""Where a run lives (a pure function of what changes its results, without a clock and however it was asked for), and
where its numbers come from: the command, the code, its libraries, the machine."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from deepvit.config import CONF
from deepvit.config.compare import comparable
from deepvit.errors import UserError

LONGEST = 120  # characters of a folder's name
IN_THE_PATH = ("recipe", "model")  # groups that are folders above it
UNNAMED_GROUPS = (*IN_THE_PATH, "engine", "sweep")


def run_folder(root: str, by_root: bool = False, *, _root_: DictConfig) -> str:
    """`<root>/<recipe>/<model>/<name>` of the config that OmegaConf hands in, for `hydra.run.dir` and, with an empty
    `root`, `hydra.sweep.subdir`; by the name that an earlier version gave if a run is there. `by_root`: the sweep is
    over `data.root`, so the name must distinguish the roots."""
    hydra = _root_.hydra
    above = [part for part in (root, *(str(hydra.runtime.choices.get(group)) for group in IN_THE_PATH)) if part]
    if "model" not in _root_:  # `--cfg hydra --resolve` shows this node alone
        return "/".join([*above, "..."])
    name = run_name(_root_, hydra, by_root)
    place = Path("" if root else hydra.sweep.dir, *above)
    typed = typed_name(as_typed(hydra.overrides.task))
    if not by_root and not (place / name / "config.yaml").exists() and (place / typed / "config.yaml").exists():
        name = typed
    return "/".join([*above, name])


def run_name(config: DictConfig, hydra: DictConfig, by_root: bool = False) -> str:
    """What differs in the unresolved settings from the composed default of the run's recipe and model: groups by name,
    then single settings, as sorted `key=value` in `[A-Za-z0-9._=-]`, values in normal form (3.0 is 3)."""
    choices = choices_of(hydra)["choices"]
    # A setting of Hydra's that decides what there is to compose:
    search = tuple(word for word in as_typed(hydra.overrides.hydra) if word.lstrip("+").startswith("hydra.searchpath="))
    chosen = tuple(f"{group}={choices[group]}" for group in IN_THE_PATH if choices.get(group))
    compose = partial(_composed, tuple(source.path for source in hydra.runtime.config_sources), hydra.job.config_name)
    usual = compose(search + chosen)
    usual_choices = usual.hydra.runtime.choices
    groups = {group: name for group, name in choices.items()
              if group not in UNNAMED_GROUPS and usual_choices.get(group) != name}
    added = tuple(f"{'' if group in usual_choices else '+'}{group}={name}" for group, name in groups.items())
    base = compose(search + chosen + added) if added else usual
    named = {**groups, **_differences(config, base)}
    if by_root:
        named["data.root"] = digest(str(Path(str(config.data.root)).resolve()))
    words = {name.replace("/", "-"): _text(value) for name, value in named.items()}  # a slash in a key is no loss
    exact = "-".join(sorted(f"{name}={value}" for name, value in words.items()))
    return _shortened(exact, exact, is_lossy=any("=" in value for value in words.values()))


@cache
def _composed(search_path: tuple[str, ...], config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    """What the running Hydra, which has this search path, composes (0.1 s)."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    return GlobalHydra.instance().config_loader().load_configuration(config_name, list(overrides), RunMode.RUN)


def _differences(config: DictConfig, base: DictConfig) -> dict[str, Any]:
    """Settings of `config` whose value is not what `base` would give there, compared before interpolations are resolved
    (or `model.img_size=16` would name `data.img_size` as well)."""
    written, usual = _values(config), _values(base)
    suspects = [name for name in {*written, *usual} if _text(written.get(name, ...)) != _text(usual.get(name, ...))]
    values = _values(config, resolve=True) if suspects else {}
    return {name: values.get(name, "none") for name in suspects
            if name not in usual or _text(values.get(name, ...)) != _text(_resolved(config, name, usual[name]))}


def _values(config: DictConfig, resolve: bool = False) -> dict[str, Any]:
    """The flat settings that can change a result."""
    return comparable(OmegaConf.to_container(_settings(config), resolve=resolve))


def _resolved(config: DictConfig, name: str, written: Any) -> Any:
    """The value of setting `name` if `written` stood there in `config`."""
    if "${" not in str(written):
        return written
    copy = _settings(config)
    OmegaConf.update(copy, name, written, force_add=True)
    return OmegaConf.select(copy, name)


def _settings(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [name for name in config if name != "hydra"])


def _text(value: Any) -> str:
    """A setting's normal form."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _shortened(text: str, exact: str, is_lossy: bool = False) -> str:
    """`text` as a folder's name, with a hash of `exact` where that would lose something or be too long."""
    name = re.sub(r"[^A-Za-z0-9._=-]", "-", text)
    if is_lossy or name != text or len(name) > LONGEST:
        name = f"{name[:LONGEST - 9]}-{digest(exact)}"
    return name or "default"


def digest(text: str) -> str:
    """Eight characters that tell texts apart."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def as_typed(words: ListConfig) -> list[str]:
    """Overrides as they were given, with the interpolations in them."""
    return OmegaConf.to_container(words, resolve=False)


def typed_name(overrides: Sequence[str]) -> str:
    """The name that earlier versions gave: the sorted overrides as typed, such as `model=vit16-seed=1`."""
    unnamed = ("data.root=", "data.workers=", "engine", "fresh=", "dry=", "hydra", "sweep=")
    named = sorted(word for word in (override.lstrip("+") for override in overrides)
                   if not word.lstrip("~").startswith(unnamed))
    parts = [word.partition("=") for word in named]
    return _shortened("-".join(key.replace("/", "-") + equals + value for key, equals, value in parts), "-".join(named))


def origin(config: DictConfig, hydra: DictConfig, folder: Path) -> dict[str, Any]:
    """What was chosen and typed for a run of the unresolved `config` in `folder`, and the command that repeats it."""
    chosen = choices_of(hydra)
    words = [word for word in chosen["overrides"] if not word.startswith(("fresh=", "dry="))]
    words += ["hydra.mode=RUN"] if chosen["sweep"] else []  # a sweep's file says MULTIRUN
    if config.engine.threads and not any(word.startswith("engine.threads=") for word in words):
        words.append(f"engine.threads={config.engine.threads}")  # a launcher's choice
    usual = Path("runs", *(str(chosen["choices"].get(group)) for group in IN_THE_PATH), run_name(config, hydra))
    if folder != usual:
        words.append(f"hydra.run.dir={folder}")
    searched = [word for source in hydra.runtime.config_sources if source.provider == "command-line"
                for word in ("--config-dir", source.path)]
    return {**chosen, **preregistration(hydra), "command": shlex.join(["deepvit", "train", *searched, *words])}


def preregistration(hydra: DictConfig) -> dict[str, Any]:
    """Name and sha256 of the file, here or where conf/ lies, that preregisters a sweep; UserError if unreadable."""
    path = ((hydra.callbacks.get("sweep") or {}).get("statistics") or {}).get("preregistered")
    if not path:
        return {}
    found = Path(path) if Path(path).exists() else CONF.resolve().parent / path
    try:
        return {"preregistered": {"file": path, "sha256": hashlib.sha256(found.read_bytes()).hexdigest()}}
    except OSError as error:
        raise UserError(f"The preregistration {path} cannot be read ({error.strerror}): give its path as "
                        f"hydra.callbacks.sweep.statistics.preregistered=...") from None


def choices_of(hydra: DictConfig) -> dict[str, Any]:
    """Recipe, sweep, the choice of every group of ours, and the overrides as typed."""
    choices = {group: name for group, name in hydra.runtime.choices.items() if not group.startswith("hydra/")}
    return {"recipe": choices.get("recipe"), "sweep": choices.get("sweep"), "choices": choices,
            "overrides": as_typed(hydra.overrides.task)}


def versions() -> dict[str, Any]:
    """Git revision, versions of the libraries, name of the machine."""
    import timm
    import torch
    return {"git": git_revision(), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                                "timm": timm.__version__}, "host": platform.node()}


@cache
def git_revision() -> str | None:
    """The code's when first asked for, at a run's start, with a + for uncommitted changes; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
