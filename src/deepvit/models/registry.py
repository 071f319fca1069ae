"""The named models, defined by the YAML files of `conf/model` alone (read here without hydra), and what they cost."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepvit.config import CONF
from deepvit.config.signature import ABOVE_ZERO, check_arguments, check_ranges, parameters_of
from deepvit.errors import UserError, choose, did_you_mean
from deepvit.models.attention import ATTENTIONS
from deepvit.models.stem import plain, stem_of
from deepvit.models.vit import PLAIN, ViT, pool_of

MODELS = CONF / "model"


def list_models() -> list[str]:
    """Names that `create_model` and `model=` take."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def list_attentions() -> list[str]:
    """Names that `attention=` and `model/attention=` take."""
    return sorted(path.stem for path in (MODELS / "attention").glob("*.yaml"))


def create_model(name: str, **overrides: Any) -> ViT:
    """Builds a model of `list_models()`, freshly initialised, with `.config`, the plain settings that rebuild it.
    `overrides` are keywords of `ViT`; `attention` may be a name of `model/attention` or a mapping, `global_pool` is
    `pool` in timm's terms ("token", "avg", "" for none). Raises UserError for an unknown name or keyword, a value of
    the wrong type, sizes that do not fit together."""
    if "global_pool" in overrides:
        overrides["pool"] = pool_of(overrides.pop("global_pool"))
    model = build_model({**model_config(name), **overrides})
    model.pretrained_cfg["architecture"] = name
    return model


def build_model(config: Mapping[str, Any]) -> ViT:
    """The model of a complete mapping of settings, such as `model_config` gives or a checkpoint holds."""
    config = dict(config)
    if isinstance(config.get("attention"), str):
        config["attention"] = attention_config(config["attention"])
    if config.get("num_classes") is None:
        config["num_classes"] = 1000
    for name in ("img_size", "patch_size"):
        if isinstance(config.get(name), tuple):
            config[name] = plain(config[name])
    check_model(config)
    model = ViT(**config)
    model.pretrained_cfg = model.default_cfg = {"architecture": "vit", **_timm_cfg(model.config)}
    return model


RANGES = {
    **dict.fromkeys(("img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "head_dim",
                     "representation_size"), (1, 2**16)),
    **dict.fromkeys(("norm_eps", "qk_scale", "residual_scale", "first", "last", "init_std"), (ABOVE_ZERO, math.inf)),
    "mlp_ratio": (ABOVE_ZERO, 1000), "depth": (1, 10_000), "share_maps": (1, 10_000), "norm_batch": (1, math.inf),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate", "attn_drop", "proj_drop"),
                    (0, 1)),
    **dict.fromkeys(("num_classes", "init_values", "gain"), (0, math.inf)), "centre": (0, 1)}
SWITCHED = ("norm", "norm_eps"), ("mix", "theta_init")  # of an attention: a switch, what it needs when it is on
OWN = {"attn_drop_rate": "attn_drop", "qk_scale": "qk_scale", "head_dim": "head_dim",
       "map_scale": "map_scale"}  # of a model -> of an attention, which wins


def check_model(config: Mapping[str, Any], where: str = "") -> None:
    """Refuses what `ViT`, its stem or its attention would not take; `where`: "model" names `model.depth`."""
    known = {name: value for name, value in config.items() if (name, value) != ("num_classes", None)}  # the data's
    prefix, attention = f"{where}." if where else "", config.get("attention")
    if where and isinstance(attention, str):
        raise UserError(f"{where}.attention={attention} is a group of settings: choose one as {where}/attention=NAME.")
    check_arguments(ViT, known, where)
    check_ranges(known, RANGES, where)
    stem, options = stem_of(known.get("stem", "patch"))
    _check_options(stem, options, f"{prefix}stem", ("img_size", "patch_size", "in_chans", "embed_dim", "norm_eps"))
    attention = dict(attention or PLAIN)
    attention.pop("name", None)
    cls = choose(f"{prefix}attention.class", str(attention.pop("class", None)), ATTENTIONS)
    _check_options(cls, attention, f"{prefix}attention", ("dim", "block_index", "depth", "norm_layer", "device",
                                                          "dtype"))


def without_effect(config: Mapping[str, Any]) -> list[str]:
    """A sentence for each of a model's settings that the others leave without effect."""
    rule, path = config["attention"], "model.attention"
    usual, of_model = (parameters_of(cls)[0] for cls in (ATTENTIONS[rule["class"]], ViT))
    found = [(f"{path}.{name}", f"{path}.{switch}=false") for switch, name in SWITCHED
             if rule.get(switch) is False and rule.get(name, usual[name].default) != usual[name].default]
    if config["reattention_blocks"] is None:
        found += [(f"model.{name}", f"{path}.{own}={rule[own]}") for name, own in OWN.items()
                  if own in rule and config[name] != of_model[name].default]
    if config["reattention_blocks"] is not None and {**rule, "name": ""} == {**PLAIN, "name": ""}:
        found.append(("model.reattention_blocks", "model/attention=self"))
    return [f"{name} has no effect beside {other}." for name, other in found]


def _check_options(cls: type, options: Mapping[str, Any], where: str, given: Collection[str]) -> None:
    """Checks the options of a part against its constructor, all but the arguments `given` by the model."""
    for name in options:
        if name in given:
            raise UserError(f"{where}.{name} cannot be set: the model gives it.")
    check_arguments(cls, options, where, ignore_missing=given)
    check_ranges(options, RANGES, where)


def model_config(name: str) -> dict[str, Any]:
    """The settings of `conf/model/<name>.yaml`, its defaults list followed."""
    own = _settings("model", name, MODELS, list_models())
    config: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, Mapping):  # {attention: self} or {override attention: reattention}
            config["attention"] = attention_config(*entry.values())
        elif entry != "_self_":
            config |= model_config(entry)
    return config | own


def attention_config(name: str) -> dict[str, Any]:
    """The settings of `conf/model/attention/<name>.yaml`."""
    return _settings("attention", name, MODELS / "attention", list_attentions())


def _settings(kind: str, name: str, folder: Path, known: Sequence[str]) -> dict[str, Any]:
    if name not in known:
        raise UserError(f"There is no {kind} '{name}'.{did_you_mean(name, known)} The {kind}s are: {', '.join(known)}.")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def count_flops(model: ViT) -> int:
    """Floating-point operations of one image's forward pass in eval mode: matrix products and convolutions only, a
    multiply-add as two (the published tables count one "MAC"). Counted on the meta device, at no cost."""
    return forward_flops(lambda: build_model(model.config), model.input_size)


def forward_flops(make: Callable[[], nn.Module], shape: Sequence[int]) -> int:
    """The same of any model that `make()` builds, for an image of `shape` (channels, height, width)."""
    with torch.device("meta"), torch.no_grad():
        model, image = make().eval(), torch.empty(1, *shape)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def register_with_timm() -> None:
    """Makes every named model known to `timm.create_model`; names that timm has already stay timm's."""
    for name in list_models():
        if not is_model(name):
            register_model(_entrypoint(name))


def _entrypoint(name: str):
    def create(pretrained=False, pretrained_cfg_overlay=None, device=None, dtype=None, **kwargs) -> nn.Module:
        first_conv = {"first_conv": _first_conv(kwargs["stem"])} if "stem" in kwargs else {}
        model = build_model_with_cfg(partial(create_model, name), name, pretrained, **kwargs,
                                     pretrained_cfg_overlay=first_conv | (pretrained_cfg_overlay or {}),
                                     pretrained_filter_fn=_fit_positions,
                                     feature_cfg={"out_indices": 3, "feature_cls": "getter"})
        vit = getattr(model, "model", model)  # the one inside a feature extractor
        model.pretrained_cfg["input_size"] = vit.input_size  # timm leaves the published one
        return model.to(device=device, dtype=dtype)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`{name}` of deepvit; keywords as `deepvit.create_model`."
    create.__module__ = __name__
    return create


def _fit_positions(state: dict[str, Tensor], model: ViT) -> dict[str, Tensor]:
    """Resamples the positions of a checkpoint that timm loads, from the image size in its metadata."""
    height, width = model.pretrained_cfg["input_size"][1:]
    old = [height // model.patch_size[0], width // model.patch_size[1]]
    if state["pos_embed"].shape[1] == 1 + old[0] * old[1]:
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(model.grid_size), old)
    return state


def _timm_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing as published (mean = std = 0.5; crop 0.9 at 224, 1.0 above), under timm's names."""
    size, half = to_2tuple(config["img_size"]), (0.5,) * config["in_chans"]
    classes = 1000 if config["num_classes"] is None else config["num_classes"]
    return {"num_classes": classes, "input_size": (config["in_chans"], *size), "pool_size": None,
            "crop_pct": 0.9 if max(size) <= 224 else 1.0, "interpolation": "bicubic", "mean": half, "std": half,
            "first_conv": _first_conv(config["stem"]), "classifier": "head", "fixed_input_size": True}


def _first_conv(stem: str | Mapping[str, Any]) -> str:
    return f"patch_embed.{stem_of(stem)[0].first_conv}"


default_cfgs = generate_default_cfgs({name: _timm_cfg(model_config(name)) for name in list_models()})  # timm reads it
