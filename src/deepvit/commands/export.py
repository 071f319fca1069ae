"""Hands a model over: `deepvit export RUN_OR_CHECKPOINT --to safetensors|timm|hub-folder|onnx|deepvit [KEY=VALUE ...]`
writes another form of it, `deepvit average RUN` the mean of its last weights."""

import json
import math
import re
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
from deepvit.commands import cli
from deepvit.commands.model_card import is_card, write_card
from deepvit.commands.main import add_weights, parser_of
from deepvit.commands.sweep import in_quotes
from deepvit.engine.folder import RunFolder
from deepvit.errors import DONE, Failure, UserError
from deepvit.importers import deepvit as published
from deepvit.importers import find_checkpoint, load_model, open_model, open_weights, save_model
from deepvit.importers import timm as timm_dialect
from deepvit.importers.dialect import write
from deepvit.importers.locate import IMAGES
from deepvit.importers.ours import described, origin_of, save_tensors
from deepvit.importers.ours import write as write_checkpoint
from deepvit.importers.settings import as_keywords
from deepvit.models import Attention, ReAttention, SelfAttention, ViT
from deepvit.run.measures import AUTO

HUB_FILES = ("model.safetensors", "config.json", "README.md")
USUAL = {  # settings that neither timm's nor the published class has
    "gelu": "erf", "patch_norm": False, "head_dim": None, "block": "pre_norm", "feat_scale": False,
    "representation_size": None, "share_maps": 1, "proj_bias": True}
ENDING = re.compile(r"(?<=.)(\.(pth?|bin|ckpt|npz|msgpack|safetensors))?(\.tar)?$", re.IGNORECASE)  # of weights
ATOL = 1e-4  # logits of the exported model against ours; ONNX runtimes reorder sums


class Exported(NamedTuple):
    """What `export` wrote: the file, its card, the largest difference of logits, how the check was done."""

    path: Path
    card: Path
    difference: float
    check: str


def export(source: str | Path, to: str, out: str | Path | None = None, weights: str = "auto",
           **keywords: Any) -> Exported:
    """Writes the model of a run folder or weights file as `to` (of `FORMS`), reads it back and compares logits. `out`
    is the file to write (default: beside the source's; of a name such as `timm:...`, in the working directory);
    `weights` and keywords are those of `open_model`. UserError for an unreadable source, or a model that the form
    cannot hold; Failure if the logits differ."""
    write_form, suffix = FORMS[to]
    path, run = find_checkpoint(source)
    model = open_model(path, weights, **keywords)
    if Path(source).exists():
        default = path.with_name(ENDING.sub("", path.name))
    else:  # a name, whose file lies in a cache under another, or in the package
        default = Path(str(source).partition(":")[2].replace("/", "-").strip(".-") or path.stem)
    out = Path(out or f"{default}.{suffix}")
    if out.resolve() == path.resolve():
        raise UserError(f"--out {out} is the source itself: choose another file.")
    card = out / "README.md" if to == "hub-folder" else out.with_name(out.name + ".md")
    images = _images(model)
    with torch.no_grad():
        try:
            _prove_writable(out, card, to)
            read_back, check, snippet = write_form(model, out)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{out} cannot be written ({reason}): choose another --out.") from None
        differences = [(read_back(x) - model(x)).abs().max() for x in (images[:1], images)]
        difference = torch.stack(differences).max().item()  # NaN where one is
    if not difference <= ATOL:
        for path in map(out.joinpath, HUB_FILES) if to == "hub-folder" else [out]:
            path.unlink(missing_ok=True)
        raise Failure(f"{out} gave logits that differ by {difference:.2g} (more than {ATOL:g}), and is not kept.")
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
    if strange := next((path for path in (out, card) if path.exists() and not is_card(card, out.name)), None):
        raise UserError(f"{strange} is there already and is not an earlier export: give another name with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent):
        pass


def _images(model: ViT) -> Tensor:
    return torch.randn(3, model.config["in_chans"], *model.img_size, generator=torch.Generator().manual_seed(0))


# Writers: (model, path) -> (what reads the file back and computes logits, how that was done, Python that loads it)

Written = tuple[Callable[[Tensor], Tensor], str, str]


def _write_safetensors(model: ViT, path: Path) -> Written:
    save_model(model, path)
    return (load_model(path).eval(), "read back by deepvit.load_model",
            f'import deepvit\nmodel = deepvit.load_model("{path.name}").eval()')


def _write_deepvit(model: ViT, path: Path) -> Written:
    config = _settings(model)
    _refuse(config, "The published DeepViT class", USUAL | {
        "pool": "cls", "norm_eps": 1e-6, "final_norm": "before_pool", "init_values": None})
    for block in model.blocks:
        _refuse_attention(block.attn, config["attention"])
    arch = next((arch for arch, name in published.ARCHS.items() if published.is_named(name, model)), None)
    content = {"state_dict": write(published.ROWS, model.state_dict(), "deepvit"), "version": 2, **origin_of(model)}
    with path.open("wb") as file:
        torch.save(content | ({"arch": arch} if arch else {}), file)
    told = {key: config[key] for key in ("num_heads", "residual_scale", "map_scale", "qk_scale", "img_size")}
    told["grid_size"] = model.grid_size
    again = load_model(path, dialect="deepvit", **told)
    needed = "" if arch else "".join(f", {key}={value}" for key, value in told.items())
    return (again.eval(), f"read back in the published layout{f' as {arch}' if arch else ''}",
            f'import deepvit\nmodel = deepvit.load_model("{path.name}", dialect="deepvit"{needed})')


def _refuse_attention(attention: Attention, rule: Mapping[str, Any]) -> None:
    """It has softmax attention, or mix and BatchNorm together and a factor of 1 or the scale of q k^T."""
    if _is_plain(attention):
        fits = attention.map_scale == 1.0
    else:
        fits = (isinstance(attention, ReAttention) and attention.mix and attention.norm and not attention.qk_norm
                and attention.norm.eps == 1e-5
                and any(math.isclose(attention.map_scale, factor) for factor in (1.0, attention.scale)))
    if not fits:
        eps = f" and norm_eps={attention.norm.eps:g}" if getattr(attention, "norm", None) else ""
        raise UserError(f"The published DeepViT class has no attention '{rule.get('name', rule['class'])}' with "
                        f"map_scale={attention.map_scale:g}{eps}: export to safetensors or onnx.")


def _is_plain(attention: Attention) -> bool:
    """Whether this is softmax attention and nothing else."""
    return (type(attention) is SelfAttention and ops.is_plain(attention.gain, attention.centre)
            and not any((attention.qk_norm, attention.contrast is not None, attention.mix, attention.norm)))


def _write_timm(model: ViT, path: Path) -> Written:
    arguments, state = _as_timm(model)
    save_tensors(path, state, {"deepvit": json.dumps(origin_of(model))})
    theirs = VisionTransformer(**arguments, norm_layer=partial(torch.nn.LayerNorm, eps=model.config["norm_eps"]))
    theirs.load_state_dict(state)
    return theirs.eval(), "loaded strictly into timm's VisionTransformer", f"""import safetensors.torch, timm
model = timm.models.VisionTransformer({", ".join(f"{name}={value!r}" for name, value in arguments.items())},
                                      norm_layer=timm.layers.LayerNorm)  # eps {model.config["norm_eps"]:g}
model.load_state_dict(safetensors.torch.load_file("{path.name}"))"""


def _as_timm(model: ViT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of timm's `VisionTransformer` and its state dict."""
    config, average = _settings(model), model.config["pool"] == "avg"
    _refuse(config, "timm's VisionTransformer", USUAL | {
        "qk_scale": None, "stem": "patch", "residual_scale": 1.0, "map_scale": 1.0, "pool": "avg" if average else "cls",
        "final_norm": "after_pool" if average else "before_pool"})
    if not all(_is_plain(block.attn) for block in model.blocks):
        raise UserError("timm's VisionTransformer has plain self-attention, no re-attention: export to safetensors.")
    same = ("in_chans", "num_classes", "embed_dim", "depth", "num_heads", "qkv_bias")
    arguments = {name: config[name] for name in same} | {
        "img_size": model.img_size, "patch_size": model.patch_size, "mlp_ratio": config["mlp_ratio"] + 1e-6,
        "init_values": None if config["init_values"] is None else 1.0,  # its values are in the state; 0 is none to timm
        "global_pool": model.global_pool}
    rows = timm_dialect.AFTER_POOL + timm_dialect.ROWS if average else timm_dialect.ROWS
    return arguments, write(rows, model.state_dict(), "timm")


def _write_hub_folder(model: ViT, path: Path) -> Written:
    """The layout of timm's models on the Hugging Face hub; as a ViT of timm's where the model is one, else as ours."""
    try:
        _refuse(model.config, "timm's models by name", {"norm_eps": 1e-6})
        arguments, state = _as_timm(model)
        named, first = timm.create_model("vit_base_patch16_224", **arguments), ""
        named.pretrained_cfg |= {"tag": None, "license": None}  # of timm's own weights
    except UserError:
        named, state, first = model, model.state_dict(), "import deepvit  # has this model\n"
    trained = evaluated_as(model)
    images = {name: trained[name] or model.pretrained_cfg[name] for name in IMAGES}
    path.mkdir(exist_ok=True)
    save_tensors(path / "model.safetensors", state)
    save_config_for_hf(named, path / "config.json", {"label_names": model.load_report.said.get("classes")},
                       data_config=images)
    return (timm.create_model(f"local-dir:{path}", pretrained=True).eval(), f"loaded by timm from {path.name}",
            f"""import timm
{first}model = timm.create_model("local-dir:{path.name}", pretrained=True).eval()  # or hf-hub:OWNER/NAME
transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))""")


def _write_onnx(model: ViT, path: Path) -> Written:
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
            '(logits,) = session.run(None, {"pictures": x})'
            f'  # float32 [B, {", ".join(map(str, model.input_size))}]')


def _settings(model: ViT) -> dict[str, Any]:
    """The model's; what its attention has of its own wins, but for the `norm_eps` of a head norm. UserError where the
    blocks that it is in have other heads than the rest."""
    if len({(block.attn.num_heads, block.attn.scale) for block in model.blocks}) > 1:
        raise UserError("The blocks of this model differ in their heads or in the scale of q k^T, which this form has "
                        "once for all blocks: export to safetensors or onnx.")
    own = model.config["attention"] or {}
    return model.config | {name: value for name, value in own.items() if name != "norm_eps"}


def _refuse(config: Mapping[str, Any], target: str, only: Mapping[str, Any]) -> None:
    """Names the first setting that the target cannot hold."""
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(f"{target} has no {key}={config[key]!r} (only {value!r}): export to safetensors or onnx.")


FORMS: dict[str, tuple[Callable[[ViT, Path], Written], str]] = {  # name -> its writer, suffix of the file
    "safetensors": (_write_safetensors, "safetensors"), "timm": (_write_timm, "timm.safetensors"),
    "hub-folder": (_write_hub_folder, "hub"), "onnx": (_write_onnx, "onnx"), "deepvit": (_write_deepvit, "pth.tar")}


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("export")
    parser.add_argument("source", type=Path, help="a run folder, or a checkpoint of any dialect")
    parser.add_argument("--to", required=True, choices=list(FORMS), help="the form to write")
    parser.add_argument("--out", type=Path, help="the file to write (default: beside the checkpoint; here, of a name "
                                                 "such as timm:...)")
    add_weights(parser)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE",
                        help="what the file does not say about its model, e.g. num_heads=12 or dialect=vit_pytorch")
    given = parser.parse_intermixed_args(arguments)
    done = export(given.source, given.to, given.out, given.weights, **as_keywords(given.settings))
    size = sum(file.stat().st_size for file in (done.path.iterdir() if done.path.is_dir() else [done.path]))
    print(f"{done.path} ({size / 2**20:.1f} MiB)\n{done.check}: largest difference of logits "
          f"{done.difference:.1e}\ncard: {done.card}")
    return DONE


# The average of several

def averaged(paths: Sequence[Path], weights: str = "auto") -> dict[str, Any]:
    """The content of a checkpoint of ours: the newest one's model, which is last in `paths`, with averaged weights, and
    where they came from. `weights`: see `open_model`, asked of the newest."""
    model = open_model(paths[-1], weights)
    which, state = model.load_report.weights, model.state_dict()
    files = [open_weights(path, ema=which == "ema") for path in paths]
    for file in files:
        if file.shapes != {name: tensor.shape for name, tensor in state.items()}:
            raise UserError(f"{file.path} and {paths[-1]} belong to different models: take the weights of one run.")
    model.load_state_dict({name: _mean([file.read(name) for file in files]) for name in state})
    return {**described(model), "averaged": [
        {"path": str(file.path), "step": file.said.get("step"), "weights": which} for file in files]}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """In float64; of counters the last."""
    if not tensors[-1].is_floating_point():
        return tensors[-1]
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[-1].dtype)


def _last_of(run: Path, count: int) -> list[Path]:
    """The last `count` checkpoints of a run, the newest last."""
    folder = RunFolder(run)
    files = (*folder.checkpoints.glob("step-*.pt"), folder.previous, folder.last)
    by_step: dict[int, Path] = {open_weights(path).said.get("step", -1): path for path in files if path.exists()}
    if not by_step:
        raise UserError(f"{run} has 0 checkpoints: give the folder of a run.")
    if len(by_step) < count:
        raise UserError(f"{run} has {len(by_step)} checkpoints and {count} are to be averaged: train with "
                        f"engine.keep_epochs=1, which keeps each epoch's weights, or give --last {len(by_step)}.")
    return [by_step[step] for step in sorted(by_step)[-count:]]


def average(arguments: Sequence[str]) -> int:
    parser = parser_of("average")
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder")
    parser.add_argument("--last", type=int, default=5, metavar="K", help="this many checkpoints (default: 5)")
    add_weights(parser)
    parser.add_argument("--out", type=Path, help="file to write, .pt or .safetensors (default: average.pt beside them)")
    parser.add_argument("--eval", action="store_true", help="then evaluate the newest and the average, each "
                        "with batch statistics of its own")
    given = parser.parse_args(arguments)
    if given.last < 2:
        raise UserError(f"--last {given.last}: an average is of two or more checkpoints, give 2 or more.")
    paths = _last_of(given.run, given.last)
    out = given.out or paths[-1].with_name("average.pt")
    if out.exists():
        raise UserError(f"{out} is there already: give another name with --out.")
    content = averaged(paths, given.weights)
    statistics = AUTO * any(name.endswith("running_var") for name in content["model"])
    write_checkpoint(out, content)
    print(f"{out}: the average of {', '.join(str(one['path']) for one in content['averaged'])}")
    both = ",".join(in_quotes(str(path)) for path in (paths[-1], out))
    return cli.evaluate([f"checkpoint=[{both}]", f"calibrate={statistics}"]) if given.eval else DONE
