"""Hydra's compose without a command line, and what was meant by a setting or a plugin that it does not find."""

import difflib
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import hydra
from omegaconf import OmegaConf

from deepvit.config import CONF
from deepvit.config.compare import flat

ELSEWHERE = {  # as other trainers, or older versions, call it -> our setting
    "accum_iter": "engine.device_batch", "amp": "precision", "attention": "model/attention", "b": "data.batch_size",
    "bs": "data.batch_size", "data_dir": "data.root", "data_path": "data.root", "device": "engine.accelerator",
    "dropout": "model.drop_rate", "fp16": "precision", "gpus": "engine.devices", "grad_accum": "engine.device_batch",
    "image_size": "model.img_size", "img_size": "model.img_size", "input_size": "model.img_size",
    "model.attention.sync_norm": "model.attention.norm_batch", "num_workers": "data.workers",
    "output": "hydra.run.dir", "output_dir": "hydra.run.dir", "pretrained": "init", "warmup": "schedule.warmup_epochs",
    "wd": "optimizer.weight_decay"}
PLUGINS = {  # of hydra/launcher and hydra/sweeper -> the package that brings it
    "joblib": "hydra-joblib-launcher", "ray": "hydra-ray-launcher", "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher", "ax": "hydra-ax-sweeper", "nevergrad": "hydra-nevergrad-sweeper",
    "optuna": "hydra-optuna-sweeper"}


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> dict[str, Any]:
    """The resolved config of a command line, as plain values: `compose(["model=deepvit32", "data=cifar10"])`."""
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(config_name, overrides=list(overrides)), resolve=True)


def setting_meant(word: str) -> str:
    """`" Did you mean 'schedule.epochs'?"` for `epochs`, or an empty string where nothing is near."""
    settings = (name for config in ("train", "eval") for name, _ in flat(compose(config_name=config)))
    names = ("recipe", "sweep", *settings)
    keys = sorted({key for name in names for key in accumulate(name.split("."), "{}.{}".format)})  # groups too
    by_last = defaultdict(list)
    for key in keys:
        by_last[key.rpartition(".")[2]].append(key)
    near = difflib.get_close_matches(word, [*keys, *by_last], n=1, cutoff=0.6)
    last = word if word in by_last else near[0] if near else ""
    meant = [ELSEWHERE[word]] if word in ELSEWHERE else by_last.get(last, near)
    return f" Did you mean {' or '.join(repr(key) for key in meant)}?" if meant else ""
