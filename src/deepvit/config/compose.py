"""Hydra's compose without a command line."""

from collections.abc import Sequence
from typing import Any

from deepvit.config import CONF


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> dict[str, Any]:
    """The resolved config of a command line, as plain values: `compose(["model=deepvit32", "data=cifar10"])`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return OmegaConf.to_container(hydra_compose(config_name, overrides=list(overrides)), resolve=True)
