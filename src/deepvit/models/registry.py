"""The named models: the YAML files of `conf/model` are their one truth, read here without hydra."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from deepvit.config import CONF
from deepvit.config.signature import ABOVE_ZERO, check_arguments, check_ranges
from deepvit.errors import UserError, did_you_mean
from deepvit.models.attention import ATTENTIONS
from deepvit.models.stem import stem_of
from deepvit.models.vit import ViT

MODELS = CONF / "model"


def list_models() -> list[str]:
    """Names that `create_model` and `model=` take."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def list_attentions() -> list[str]:
    """Names that `attention=` and `model/attention=` take."""
    return sorted(path.stem for path in (MODELS / "attention").glob("*.yaml"))


def create_model(name: str, **overrides: Any) -> ViT:
    """Builds a model of `conf/model`; keywords override its settings (see `ViT`).

    Args:
        name: one of `list_models()`.
        **overrides: keywords of `ViT`; `attention` may be a name of `model/attention` or a mapping.
    Returns:
        a freshly initialised `ViT` with `.config`, the plain settings that rebuild it.
    Raises:
        UserError: an unknown name or keyword, a value of the wrong type, sizes that do not fit together.
    """
    return build_model({**model_config(name), **overrides})


def build_model(config: Mapping[str, Any]) -> ViT:
    """The model of a complete mapping of settings, such as `model_config` gives or a checkpoint holds."""
    config = dict(config)
    if isinstance(config.get("attention"), str):
        config["attention"] = attention_config(config["attention"])
    if config.get("num_classes") is None:
        config["num_classes"] = 1000
    for size in ("img_size", "patch_size"):
        if isinstance(config.get(size), tuple):
            config[size] = list(config[size])
    check_model(config)
    model = ViT(**config)
    model.config = config
    model.pretrained_cfg = model.default_cfg = _timm_cfg(model, config)
    return model


RANGES = {
    **dict.fromkeys(("img_size", "patch_size", "in_chans", "embed_dim", "num_heads", "head_dim",
                     "representation_size"), (1, 2**16)),
    **dict.fromkeys(("norm_eps", "qk_scale", "residual_scale"), (ABOVE_ZERO, math.inf)),
    "mlp_ratio": (ABOVE_ZERO, 1000), "depth": (1, 10_000),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "attn_drop_rate", "drop_path_rate", "attn_drop", "proj_drop"),
                    (0, 1)),
    **dict.fromkeys(("num_classes", "init_values"), (0, math.inf))}


def check_model(config: Mapping[str, Any]) -> None:
    """Refuses settings that `ViT` or its attention would not take, naming what was meant."""
    known = {name: value for name, value in config.items() if (name, value) != ("num_classes", None)}  # the data's
    check_arguments(ViT, known, "model")
    check_ranges(known, RANGES, "model")
    stem, options = stem_of(known.get("stem", "patch"))
    _refuse_own(("in_chans", "embed_dim", "patch_size", "norm", "norm_eps"), options, "model.stem")
    check_arguments(stem, {"in_chans": 1, "embed_dim": 1, "patch_size": (1, 1), **options}, "model.stem")
    attention = dict(config.get("attention") or {"class": "SelfAttention"})
    attention.pop("name", None)
    cls = ATTENTIONS.get(str(attention.pop("class", None)))
    if cls is None:
        raise UserError(f"model.attention.class must be one of {', '.join(ATTENTIONS)}.")
    _refuse_own(("dim", "block_index", "depth", "norm_layer", "device", "dtype"), attention, "model.attention")
    check_arguments(cls, {"dim": 1, **attention}, "model.attention")
    check_ranges(attention, RANGES, "model.attention")


def _refuse_own(own: Collection[str], options: Mapping[str, Any], where: str) -> None:
    """Refuses options of a part that the model itself gives it."""
    if taken := [name for name in own if name in options]:
        raise UserError(f"{where}.{taken[0]} is not a setting: the model decides it.")


def model_config(name: str) -> dict[str, Any]:
    """The settings of `conf/model/<name>.yaml`, its defaults list followed."""
    if name not in list_models():
        raise UserError(f"There is no model '{name}'.{did_you_mean(name, list_models())} "
                        f"The models are: {', '.join(list_models())}.")
    own = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    config: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, Mapping):  # {attention: self} or {override attention: reattention}
            config["attention"] = attention_config(*entry.values())
        elif entry != "_self_":
            config |= model_config(entry)
    return config | own


def attention_config(name: str) -> dict[str, Any]:
    """The settings of `conf/model/attention/<name>.yaml`."""
    if name not in list_attentions():
        raise UserError(f"There is no attention '{name}'.{did_you_mean(name, list_attentions())} "
                        f"The attentions are: {', '.join(list_attentions())}.")
    return yaml.safe_load((MODELS / "attention" / f"{name}.yaml").read_text())


def register_with_timm() -> None:
    """Makes every named model known to `timm.create_model`; names that timm has already stay timm's."""
    from timm.models import is_model, register_model
    for name in list_models():
        if not is_model(name):
            register_model(_entrypoint(name))


def _entrypoint(name: str):
    def create(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        if pretrained:
            raise UserError(f"There are no weights of '{name}' to download: use deepvit.load_model(PATH).")
        return create_model(name, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`{name}` of deepvit; keywords as `deepvit.create_model`."
    create.__module__ = __name__
    return create


def _timm_cfg(model: ViT, config: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing as published (mean = std = 0.5; crop 0.9 at 224, 1.0 above), in timm's words."""
    half = (0.5, 0.5, 0.5)
    return {"num_classes": model.num_classes, "input_size": (config.get("in_chans", 3), *model.img_size),
            "crop_pct": 0.9 if max(model.img_size) <= 224 else 1.0, "interpolation": "bicubic", "mean": half,
            "std": half, "first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
