"""Hands a model over: `deepvit export RUN_OR_CHECKPOINT --to safetensors|timm|hub-folder|onnx|deepvit [KEY=VALUE ...]`.

What was written is read back and must give the same logits; a model card lands beside it.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.models import VisionTransformer
from timm.models._hub import save_config_for_hf
from torch import Tensor

from deepvit import ops
from deepvit.analysis.images import evaluated_as
from deepvit.commands.model_card import is_card, write_card
from deepvit.data import norm_values
from deepvit.errors import DONE, Failure, UserError
from deepvit.importers import deepvit as published
from deepvit.importers import load_model, open_model
from deepvit.importers import timm as timm_dialect
from deepvit.importers.files import find_checkpoint
from deepvit.importers.save import save_model, save_tensors
from deepvit.importers.settings import as_keywords
from deepvit.importers.table import write
from deepvit.models import Attention, ReAttention, SelfAttention, ViT

HUB_FILES = ("model.safetensors", "config.json", "README.md")
ATOL = 1e-4  # logits of the exported thing against ours; ONNX runtimes reorder sums


class Exported(NamedTuple):
    """What `export` wrote: the file, its card, the largest difference of logits, how the check was done."""

    path: Path
    card: Path
    difference: float
    check: str


def export(source: str | Path, to: str, out: str | Path | None = None, weights: str = "auto",
           **keywords: Any) -> Exported:
    """Writes the model of a run or checkpoint in another form, reads it back and compares logits.

    Args:
        source: a run folder (its best checkpoint) or a weights file of any dialect.
        to: `safetensors` (our names, settings in the metadata), `timm` (a timm VisionTransformer's state dict),
            `hub-folder` (what timm's `local-dir:` and `hf-hub:` load), `onnx` (dynamic batch), `deepvit` (the
            published layout).
        out: the file to write; default: beside the source's.
        weights, **keywords: as `open_model`.
    Raises:
        UserError: an unreadable source, or a model that the form cannot hold.
        Failure: the exported file does not give the same logits.
    """
    if to not in WRITERS:
        raise UserError(f"--to {to} is not known: choose from {', '.join(WRITERS)}.")
    path, run = find_checkpoint(source)
    model = open_model(path, weights, **keywords)
    out = Path(out) if out else path.with_name(f"{path.name.split('.')[0]}.{SUFFIX[to]}")
    if out.resolve() == path.resolve():
        raise UserError(f"--out {out} is the source itself: choose another file.")
    card = out / "README.md" if to == "hub-folder" else out.with_name(out.name + ".md")
    images = _images(model)
    with torch.no_grad():
        try:
            _prove_writable(out, card, to)
            read_back, check, snippet = WRITERS[to](model, out)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{out} cannot be written ({reason}): choose another --out.") from None
        difference = max((read_back(x) - model(x)).abs().max().item() for x in (images[:1], images))
    if not difference <= ATOL:
        raise Failure(f"{out} gives logits that differ by {difference:.2g} (more than {ATOL:g}): do not use it.")
    write_card(card, model, out, to, f"{check}: largest difference of logits {difference:.1e}", snippet, run)
    return Exported(out, card, difference, check)


def _prove_writable(out: Path, card: Path, to: str) -> None:
    """An --out that cannot be written is refused before anything is computed; only an earlier export is replaced."""
    if to == "hub-folder" and out.is_dir():
        if strange := {path.name for path in out.iterdir()} - {*HUB_FILES}:
            raise UserError(f"--out {out} holds other files, such as {min(strange)}: name a new folder.")
        if not any(out.iterdir()):
            return
    elif out.is_dir():
        raise UserError(f"--out {out} is a folder: name the file to write in it.")
    strange = next((path for path in (out, card) if path.exists() and not is_card(card, out.name)), None)
    if strange:
        raise UserError(f"{strange} is there already and no earlier export: give another name with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        pass


def _images(model: ViT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, model.config["in_chans"], *model.img_size, generator=generator)


# Writers: (model, path) -> (what reads the file back and computes logits, a word on how, Python that
# loads it)

Reader = Callable[[Tensor], Tensor]


def _write_safetensors(model: ViT, path: Path) -> tuple[Reader, str, str]:
    save_model(model, path)
    return (load_model(path).eval(), "read back by deepvit.load_model",
            f'import deepvit\nmodel = deepvit.load_model("{path.name}").eval()')


def _write_deepvit(model: ViT, path: Path) -> tuple[Reader, str, str]:
    config = model.config
    _refuse(config, "the published DeepViT class", {
        "pool": "cls", "gelu": "erf", "norm_eps": 1e-6, "final_norm": "before_pool", "patch_norm": False,
        "head_dim": None, "block": "pre_norm", "feat_scale": False, "representation_size": None, "init_values": None,
        "share_maps": 1})
    for block in model.blocks:
        _refuse_attention(block.attn, config["attention"])
    arch = next((arch for arch, name in published.ARCHS.items() if published.is_named(name, model)), None)
    content = {"state_dict": write(published.ROWS, model.state_dict(), "deepvit"), "version": 2}
    with path.open("wb") as file:
        torch.save(content | ({"arch": arch} if arch else {}), file)
    scalars = {key: config[key] for key in ("num_heads", "residual_scale", "map_scale", "qk_scale")}
    return load_model(path, dialect="deepvit", img_size=config["img_size"], grid_size=model.grid_size,
                      **scalars).eval(), f"read back in the published layout{f' as {arch}' if arch else ''}", (
                          f'import deepvit\nmodel = deepvit.load_model("{path.name}", dialect="deepvit"'
                          + (")" if arch else "".join(f", {key}={value}" for key, value in scalars.items()) + ")"))


def _refuse_attention(attention: Attention, rule: Mapping[str, Any]) -> None:
    """What the published class computes: softmax attention, or mix and BatchNorm together and a factor of 1 or the
    scale of q k^T."""
    name, instead = rule.get("name", rule["class"]), "export to safetensors or onnx"
    if _is_plain(attention):
        if attention.map_scale != 1.0:
            raise UserError(f"The published DeepViT class has no map_scale={attention.map_scale:g} in plain attention: "
                            f"{instead}.")
        return
    if not isinstance(attention, ReAttention) or not attention.mix or not attention.norm or attention.qk_norm:
        raise UserError(f"The published DeepViT class has no attention '{name}': {instead}.")
    if attention.norm.eps != 1e-5:
        raise UserError(f"The published DeepViT class has no norm_eps={attention.norm.eps:g} in its attention (only "
                        f"1e-05): {instead}.")
    if not any(math.isclose(attention.map_scale, factor) for factor in (1.0, attention.scale)):
        raise UserError(f"The published DeepViT class has no map_scale={attention.map_scale:g} (only 1, or "
                        f"{attention.scale:g} as its q k^T): {instead}.")


def _is_plain(attention: Attention) -> bool:
    """Whether this is softmax attention and nothing else."""
    return (type(attention) is SelfAttention and ops.is_plain(attention.gain, attention.centre)
            and not any((attention.qk_norm, attention.contrast is not None, attention.mix, attention.norm)))


def _write_timm(model: ViT, path: Path) -> tuple[Reader, str, str]:
    arguments, state = _as_timm(model)
    save_tensors(path, state)
    theirs = VisionTransformer(**arguments, norm_layer=partial(torch.nn.LayerNorm, eps=model.config["norm_eps"]))
    theirs.load_state_dict(state)
    return theirs.eval(), "loaded strictly into timm's VisionTransformer", f"""import safetensors.torch, timm
model = timm.models.VisionTransformer({", ".join(f"{name}={value!r}" for name, value in arguments.items())},
                                      norm_layer=timm.layers.LayerNorm)  # eps {model.config["norm_eps"]:g}
model.load_state_dict(safetensors.torch.load_file("{path.name}"))"""


def _as_timm(model: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of timm's `VisionTransformer` and its state dict."""
    config, average = model.config, model.config["pool"] == "avg"
    _refuse(config, "timm's VisionTransformer", {
        "share_maps": 1, "gelu": "erf", "patch_norm": False, "head_dim": None, "qk_scale": None, "stem": "patch",
        "block": "pre_norm", "feat_scale": False, "representation_size": None, "residual_scale": 1.0, "map_scale": 1.0,
        "final_norm": "after_pool" if average else "before_pool"})
    if config["pool"] == "mean" or not all(_is_plain(block.attn) for block in model.blocks):
        what = "pooling over all tokens" if config["pool"] == "mean" else "re-attention or its like"
        raise UserError(f"timm's VisionTransformer has no {what}: export to safetensors, which "
                        f"timm.create_model takes for our registered names.")
    arguments = {name: config[name] for name in ("in_chans", "num_classes", "embed_dim", "depth", "num_heads",
                                                 "qkv_bias")}
    arguments |= {
        "img_size": model.img_size, "patch_size": model.patch_size, "mlp_ratio": config["mlp_ratio"] + 1e-6,
        "init_values": None if config["init_values"] is None else 1.0,  # its values are in the state; 0 is none to timm
        "global_pool": model.global_pool}
    rows = timm_dialect.AFTER_POOL + timm_dialect.ROWS if average else timm_dialect.ROWS
    return arguments, write(rows, model.state_dict(), "timm")


def _write_hub_folder(model: ViT, path: Path) -> tuple[Reader, str, str]:
    """The layout of timm's models on the Hugging Face hub, where the model is a ViT of timm's as one of these."""
    try:
        _refuse(model.config, "timm's models by name", {"norm_eps": 1e-6})
        arguments, state = _as_timm(model)
        named, first = timm.create_model("vit_base_patch16_224", **arguments), ""
        named.pretrained_cfg |= {"tag": None, "license": None}  # of timm's own weights
    except UserError:
        named, state, first = model, model.state_dict(), "import deepvit  # has this model\n"
    said, trained = model.load_report.said, evaluated_as(model)
    mean, std = norm_values(trained["norm"])
    path.mkdir(exist_ok=True)
    save_tensors(path / "model.safetensors", state)
    save_config_for_hf(named, path / "config.json", model_config={"label_names": said.get("classes")}, data_config={
        "mean": mean, "std": std, "interpolation": trained["interpolation"],
        **({"crop_pct": trained["crop_pct"]} if trained["crop_pct"] else {})})
    name = f"local-dir:{path}"
    return timm.create_model(name, pretrained=True).eval(), f"loaded by timm from {path.name}", f"""import timm
{first}model = timm.create_model("local-dir:{path.name}", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))"""


def _write_onnx(model: ViT, path: Path) -> tuple[Reader, str, str]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise UserError(f"Exporting to ONNX needs {error.name}: pip install 'deepvit[onnx]'.") from None
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(model, (_images(model)[:2],), path, dynamo=True, input_names=["pictures"],
                      output_names=["logits"], dynamic_shapes=({0: batch},), external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return (lambda x: torch.from_numpy(session.run(None, {"pictures": x.numpy()})[0]),
            "run by onnxruntime, batches of 1 and 3",
            f'import onnxruntime\nsession = onnxruntime.InferenceSession("{path.name}")\n'
            '(logits,) = session.run(None, {"pictures": x})  # float32 [B, 3, height, width]')


def _refuse(config: Mapping[str, Any], target: str, asked: Mapping[str, Any]) -> None:
    """Names the first setting that the target cannot hold."""
    for key, value in asked.items():
        if config.get(key, value) != value:
            raise UserError(f"{target} has no {key}={config[key]!r} (only {value!r}): export to safetensors or onnx.")


WRITERS: dict[str, Callable[[ViT, Path], tuple[Reader, str, str]]] = {
    "safetensors": _write_safetensors, "timm": _write_timm, "hub-folder": _write_hub_folder, "onnx": _write_onnx,
    "deepvit": _write_deepvit}
SUFFIX = {"safetensors": "safetensors", "timm": "timm.safetensors", "hub-folder": "hub", "onnx": "onnx",
          "deepvit": "pth.tar"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deepvit export", description=__doc__)
    parser.add_argument("source", type=Path, help="a run folder, or a checkpoint of any dialect")
    parser.add_argument("--to", required=True, choices=list(WRITERS), help="the form to write")
    parser.add_argument("--out", type=Path, help="the file to write (default: beside the checkpoint)")
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE",
                        help="what the file does not tell of its model, e.g. num_heads=12 or dialect=vit_pytorch")
    given = parser.parse_intermixed_args(arguments)
    done = export(given.source, given.to, given.out, given.weights, **as_keywords(given.settings))
    size = sum(file.stat().st_size for file in (done.path.iterdir() if done.path.is_dir() else [done.path]))
    print(f"{done.path} ({size / 2**20:.1f} MiB)\n{done.check}: largest difference of logits "
          f"{done.difference:.1e}\ncard: {done.card}")
    return DONE
