"""Where a run lives: a pure function of what changes its results, without a clock and however it was asked for."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepvit.config.compare import comparable

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

LONGEST = 120  # characters of a folder's name
IN_THE_PATH = ("recipe", "model")  # groups that are folders above it
UNNAMED_GROUPS = (*IN_THE_PATH, "engine", "sweep")


def run_folder(root: str, by_root: bool = False, *, _root_: "DictConfig") -> str:
    """`<root>/<recipe>/<model>/<name>`; the resolver behind `hydra.run.dir` and `hydra.sweep.subdir`.

    A run that an earlier version began under the name of its overrides is continued there.

    Args:
        root: `runs`, or empty for a path below `hydra.sweep.dir`.
        by_root: the sweep is over `data.root`, so the name must tell the roots apart.
        _root_: the run's whole config, handed in by OmegaConf.
    """
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


def run_name(config: "DictConfig", hydra: "DictConfig", by_root: bool = False) -> str:
    """What differs in the unresolved settings from the composed default of the run's recipe and model: groups by name,
    then single settings, as sorted `key=value` in `[A-Za-z0-9._=-]`.

    Values are compared and written in normal form (3.0 is 3), so a setting given at its default names nothing.
    """
    choices = own_choices(hydra)
    # A setting of Hydra's that decides what there is to compose:
    search = tuple(word for word in as_typed(hydra.overrides.hydra) if word.lstrip("+").startswith("hydra.searchpath="))
    chosen = tuple(f"{group}={choices[group]}" for group in IN_THE_PATH if choices.get(group))
    usual = _default(hydra.job.config_name, search + chosen)
    usual_choices = usual.hydra.runtime.choices
    groups = {group: name for group, name in choices.items()
              if group not in UNNAMED_GROUPS and usual_choices.get(group) != name}
    added = tuple(f"{'' if group in usual_choices else '+'}{group}={name}" for group, name in groups.items())
    base = _default(hydra.job.config_name, search + chosen + added) if added else usual
    named = {**groups, **_differences(config, base)}
    if by_root:
        named["data.root"] = _digest(str(Path(str(config.data.root)).resolve()))
    words = {name.replace("/", "-"): _text(value) for name, value in named.items()}  # a slash in a key is no loss
    exact = "-".join(sorted(f"{name}={value}" for name, value in words.items()))
    return _shortened(exact, exact, is_lossy=any("=" in value for value in words.values()))


def own_choices(hydra: "DictConfig") -> dict[str, str]:
    """The choice of every group but Hydra's own."""
    return {group: name for group, name in hydra.runtime.choices.items() if not group.startswith("hydra/")}


@cache
def _composed(search_path: tuple[str, ...], config_name: str, overrides: tuple[str, ...]) -> "DictConfig":
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    return GlobalHydra.instance().config_loader().load_configuration(config_name, list(overrides), RunMode.RUN)


def _default(config_name: str, overrides: tuple[str, ...]) -> "DictConfig":
    """What the running Hydra composes from `overrides` (0.1 s)."""
    from hydra.core.global_hydra import GlobalHydra
    sources = GlobalHydra.instance().config_loader().get_search_path().get_path()
    return _composed(tuple(str(source.path) for source in sources), config_name, overrides)


def _differences(config: "DictConfig", base: "DictConfig") -> dict[str, Any]:
    """Settings of `config` whose value is not what `base` would give there.

    Compared before interpolations are resolved, or `model.img_size=16` would name `data.img_size` as well.
    """
    written, usual = _values(config), _values(base)
    suspects = [name for name in {*written, *usual} if _text(written.get(name, ...)) != _text(usual.get(name, ...))]
    values = _values(config, resolve=True) if suspects else {}
    return {name: values.get(name, "none") for name in suspects
            if name not in usual or _text(values.get(name, ...)) != _text(_resolved(config, name, usual[name]))}


def _values(config: "DictConfig", resolve: bool = False) -> dict[str, Any]:
    """The flat settings that can change a result."""
    from omegaconf import OmegaConf
    return comparable(OmegaConf.to_container(_settings(config), resolve=resolve))


def _resolved(config: "DictConfig", name: str, written: Any) -> Any:
    """The value of setting `name` if `written` stood there in `config`."""
    from omegaconf import OmegaConf
    if "${" not in str(written):
        return written
    copy = _settings(config)
    OmegaConf.update(copy, name, written, force_add=True)
    return OmegaConf.select(copy, name)


def _settings(config: "DictConfig") -> "DictConfig":
    from omegaconf import OmegaConf
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
        name = f"{name[:LONGEST - 9]}-{_digest(exact)}"
    return name or "default"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def as_typed(words: "ListConfig") -> list[str]:
    """Overrides as they were given, with the interpolations in them."""
    from omegaconf import OmegaConf
    return OmegaConf.to_container(words, resolve=False)


def typed_name(overrides: Sequence[str]) -> str:
    """The name that earlier versions gave, under which their runs are continued: the sorted overrides as typed.

    >>> typed_name(["seed=1", "model=vit16", "engine.devices=2"])
    'model=vit16-seed=1'
    """
    unnamed = ("data.root=", "data.workers=", "engine", "fresh=", "dry=", "hydra", "sweep=")
    named = sorted(word for word in (override.lstrip("+") for override in overrides)
                   if not word.lstrip("~").startswith(unnamed))
    parts = [word.partition("=") for word in named]
    return _shortened("-".join(key.replace("/", "-") + equals + value for key, equals, value in parts), "-".join(named))
