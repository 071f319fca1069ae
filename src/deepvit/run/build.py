"""From settings to objects."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from deepvit import data as inputs
from deepvit.config import settings as asked
from deepvit.config.settings import Augment, Data, Optimizer, PrecisionSettings, Settings, idle_settings
from deepvit.config.signature import check_arguments, parameters_of
from deepvit.engine.device import has_bf16, sharing
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Plan, Schedule
from deepvit.engine.state import TrainState
from deepvit.engine.step import OBJECTIVES, Objective, Precision, Stepper, allocate_moments, is_out_of_memory
from deepvit.errors import UserError, did_you_mean
from deepvit.models import ViT, build_model
from deepvit.models.blocks import BranchMasks, cosine_regularisation, record_maps
from deepvit.models.registry import check_model, without_effect
from deepvit.run.micro_batches import advice, allowed, unit
from deepvit.run.micro_batches import choose as choose_micro_batch

MIXING = ("mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")  # settings of the augmentation in `prepare`
FUSED = ("adam", "adamw", "momentum", "sgd")  # torch's own, which update all parameters in one kernel
OWN = {"lr", "weight_decay", "momentum", "betas", "eps"}  # keywords of optimizers that are settings by themselves
log = logging.getLogger(__name__)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """`config.settings.read_settings`, with the model's own settings checked as well."""
    settings = asked.read_settings(config)
    check_model(settings.model, "model")
    if settings.model.get("pool") == "":
        raise UserError("model.pool='' gives logits of every token, which no loss here takes: choose cls, mean or avg.")
    return settings


def check(settings: Settings, ranks: Ranks) -> None:
    """Builds all that needs no data, so that its UserErrors come, on every rank alike, before anything is written."""
    with ranks.sync_errors():
        _check_model(settings.model, settings.data.img_size)
        train_transform(settings.data, settings.augment)
        eval_transform(settings.data)
        prepare(settings.data, 2, settings.augment)
        objective(settings)
        with torch.device("meta"):
            network = build_model({**settings.model, "num_classes": 2})
        if settings.freeze is not None:
            network.freeze(settings.freeze)
        allowed(settings, network.norm_batches, ranks.world)
        sharing()
        needed = sum(parameter.nbytes for parameter in network.parameters())
        if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise UserError(f"The weights of this model take {needed / 2**30:.0f} GiB, more than this machine has: "
                            f"lower model.embed_dim, model.depth or model.mlp_ratio.")
        try_out(settings.optimizer, ranks.device)
    if not ranks.is_main:
        return
    for sentence in (*without_effect(settings.model), *idle_settings(settings)):
        log.warning(sentence)
    if settings.data.source != "digits" and (settings.origin or {}).get("recipe") == "digits":
        log.warning("recipe=digits, the default, is for images of 8 pixels: choose recipe=folder, cifar10 or imagenet.")


def _check_model(model: Mapping[str, Any], img_size: int | Sequence[int]) -> None:
    for name in parameters_of(ViT)[0]:
        if name not in model or (name, model[name]) == ("attention", None):
            raise UserError(f"model.{name} is missing: leave it as its model= and model/attention= have it.")
    if model["in_chans"] != 3:
        raise UserError(f"model.in_chans={model['in_chans']}, but images are read with 3 channels: leave it at 3.")
    sizes = {tuple(size) if isinstance(size, Sequence) else (size, size) for size in (img_size, model["img_size"])}
    if len(sizes) > 1:
        raise UserError(f"data.img_size={img_size} is not model.img_size={model['img_size']}: set the latter alone.")


@dataclass(frozen=True)
class Built:
    """What a run is made of, on one rank."""

    settings: Settings
    ranks: Ranks
    splits: inputs.Splits
    plan: Plan
    model: ViT
    state: TrainState
    stepper: Stepper
    make_batches: Callable[[int, int], Iterator[list[inputs.Batch]]]
    micro_batch: int  # images that a device takes at once
    memory: str  # what they take of it, in words, where that was measured

    @cached_property
    def prepare(self) -> inputs.Prepare:
        """What evaluation does to a batch; training's is the stepper's."""
        return prepare(self.settings.data, len(self.splits.class_ids))


def build(settings: Settings, ranks: Ranks, begun: Mapping[str, Any] | None = None) -> Built:
    """Everything that a run needs; UserError on every rank alike. `begun`: content of the checkpoint that is resumed,
    if any; `settings.init` is not read then."""
    found = shared_splits(settings.data, ranks)
    classes, seed, mode = found.class_ids, settings.seed, settings.engine.compile
    with ranks.sync_errors():
        schedule, plan = schedule_and_plan(settings, len(found.train))
        network = model(settings, len(classes), continued=begun is not None, classes=classes)
        made = state(settings, network, ranks)
        # A run begun before masks belonged to images draws them on each rank, as it began.
        masks = BranchMasks(network, seed, ranks.device) if begun is None or begun.get("masks") == "image" else None
        # CUDA graphs can replay only sizes that stay the same: half a micro-batch is compiled anew.
        called = torch.compile(network, mode="default" if mode is True else mode, dynamic=False) if mode else network
        stepper = Stepper(called, prepare(settings.data, len(classes), settings.augment, seed), schedule,
                          precision(settings.precision, ranks.device), ranks, seed, objective(settings),
                          settings.optimizer.clip_grad, masks, unit(settings, network.norm_batches))
        make_batches = batch_maker(settings, found.train, ranks)
    ranks.broadcast([tensor for tensors in made.weights().values() for tensor in tensors.values()])
    stepper.advice = lambda state, count: advice(settings, state, stepper, count)
    micro_batch, memory = choose_micro_batch(settings, made, stepper, begun)
    if None in network.norm_batches:
        stepper.unit = micro_batch  # half of it would have other statistics
    return Built(settings, ranks, found, plan, network, made, stepper, partial(make_batches, micro_batch=micro_batch),
                 micro_batch, memory)


# Data

def shared_splits(data: Data, ranks: Ranks) -> inputs.Splits:
    """The images; where they may have to be downloaded, the first rank of each machine goes first."""
    with ranks.sync_errors():
        source = inputs.source_of(data)
    is_first = not source.may_download or ranks.world == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    for mine in (is_first, not is_first):
        with ranks.sync_errors():
            if mine:
                found = source.splits()
    return found


def train_transform(data: Data, augment: Augment) -> inputs.Transform:
    options = {name: value for name, value in vars(augment).items() if name not in ("repeats", *MIXING)}
    mean, _ = inputs.norm_values(data.norm)
    return inputs.train_transform(data.img_size, crop_pct=data.crop_pct, mean=mean, **options)


def eval_transform(data: Data) -> inputs.Transform:
    return inputs.eval_transform(data.img_size, data.crop_pct, data.interpolation)


def prepare(data: Data, num_classes: int, augment: Augment | None = None, seed: int = 0) -> inputs.Prepare:
    """Normalisation, and in training the mixing that `augment` names."""
    mixing = {name: getattr(augment, name) for name in MIXING} if augment else {}
    return inputs.Prepare(*inputs.norm_values(data.norm), num_classes, seed=seed, **mixing)


def batch_maker(settings: Settings, train: inputs.ImageSet, ranks: Ranks
                ) -> Callable[[int, int, int], Iterator[list[inputs.Batch]]]:
    """`(start, count, micro_batch) -> iterator` over the micro-batches of `count` global batches from batch `start`."""
    data, seed, transform = settings.data, settings.seed, train_transform(settings.data, settings.augment)
    on_device = data.on_device and inputs.OnDevice(train, transform, seed=seed, device=ranks.device,
                                                   max_mb=data.in_memory_mb)

    def batches(start: int, count: int, micro_batch: int) -> Iterator[list[inputs.Batch]]:
        share = {"start_step": start, "steps": start + count, "batch_size": data.batch_size, "rank": ranks.rank,
                 "world": ranks.world, "max_bad": data.max_bad, "repeats": settings.augment.repeats,
                 "accumulation": data.batch_size // ranks.world // micro_batch}
        if on_device:
            return on_device.train_batches(**share)
        steps = inputs.train_batches(train, transform, seed=seed, workers=data.workers,
                                     pin=ranks.device.type == "cuda", **share)
        return inputs.prefetch(steps, ranks.device)

    return batches


def eval_batches(data: Data, images: inputs.ImageSet, ranks: Ranks) -> Callable[[], Iterator[inputs.Batch]]:
    """Makes this rank's batches, once for each evaluation."""
    where = {"rank": ranks.rank, "world": ranks.world, "device": ranks.device, "pin": ranks.device.type == "cuda"}
    return inputs.cached_eval_batches(images, eval_transform(data), batch_size=data.eval_batch_size, **where,
                                      workers=data.workers, on_error=data.on_error, in_memory_mb=data.in_memory_mb)


# Model and optimizer

def model(settings: Settings, num_classes: int, continued: bool = False, classes: Sequence[str] | None = None) -> ViT:
    """The model of `settings.model`, initialised from `settings.seed` and, unless the run is `continued`, from
    `settings.init` (its average where it has one). A kept head must agree with `classes`, the names in order."""
    asked = settings.model.get("num_classes")
    if asked is not None and asked != num_classes:
        raise UserError(f"model.num_classes={asked}, but the data has {num_classes} classes: leave it null.")
    torch.manual_seed(settings.seed)
    built = build_model({**settings.model, "num_classes": num_classes})
    built.set_grad_checkpointing(settings.engine.grad_checkpointing)
    if settings.init is not None and not continued:
        from deepvit.importers import load_weights
        load_weights(built, settings.init, settings.dialect, ema=None, head=settings.head, classes=classes)
    if settings.freeze is not None:
        built.freeze(settings.freeze)
    return built


def state(settings: Settings, network: ViT, ranks: Ranks) -> TrainState:
    network.to(ranks.device)
    ema = settings.ema
    # Buffers are copied: a head norm's variance starts at 1 and is truly near 1e-6, so its average would stay wrong.
    average = ModelEmaV3(network, ema.decay, use_warmup=ema.warmup, exclude_buffers=True) if ema.decay else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision.scale_gradients)
    chosen = optimizer(network, settings.optimizer)
    try:
        allocate_moments(chosen)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"The weights of this model and the moments of optimizer.opt={settings.optimizer.opt} do not "
                        f"fit into the memory of this device: take a smaller model or another optimizer.") from error
    return TrainState(network, chosen, scaler, average)


def optimizer(network: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """By timm's factory: no decay on biases, norms and the embeddings that the model names; a layer-wise decay gives
    each group its `lr_scale`. UserError where timm has no such optimizer, or it does not take these settings, each of
    which it must know: timm drops some that it does not."""
    if chosen.opt not in list_optimizers():
        raise UserError(f"timm has no optimizer.opt={chosen.opt}.{did_you_mean(chosen.opt, list_optimizers())}")
    info = get_optimizer_info(chosen.opt)
    given = {name: value for name in ("momentum", "betas", "eps") if (value := getattr(chosen, name)) is not None}
    for name, value in given.items():
        if not getattr(info, f"has_{name}"):
            raise UserError(f"optimizer.{name}={value} has no effect with optimizer.opt={chosen.opt}: set it to null.")
    if "betas" in given and len(chosen.betas) != info.num_betas:
        raise UserError(f"optimizer.betas={chosen.betas} must be a list of {info.num_betas}.")
    further = dict(chosen.kwargs or {})
    for name in OWN & further.keys():
        raise UserError(f"optimizer.kwargs.{name} is a setting of its own: give optimizer.{name}.")
    fused = {"fused": True} if chosen.opt in FUSED else {}
    with _refusals(chosen):
        check_arguments(get_optimizer_class(chosen.opt, bind_defaults=False), further, "optimizer.kwargs",
                        ignore_missing={"params", *OWN})
        return create_optimizer_v2(network, chosen.opt, lr=chosen.lr, weight_decay=chosen.weight_decay,
                                   layer_decay=chosen.layer_decay, **given, **fused | further)


def try_out(chosen: Optimizer, device: torch.device) -> None:
    """Makes a step: some optimizers refuse their settings, or gradients without a graph, only then (UserError)."""
    network = nn.Linear(1, 1, device=device)
    made = optimizer(network, replace(chosen, layer_decay=None))  # one layer has none
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with _refusals(chosen):
        made.step()


@contextmanager
def _refusals(chosen: Optimizer) -> Iterator[None]:
    """What an optimizer raises over its arguments, as a `UserError`."""
    try:
        yield
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        further = f" with optimizer.kwargs={dict(chosen.kwargs)}" if chosen.kwargs else ""
        raise UserError(f"optimizer.opt={chosen.opt} does not work here{further}: {error}.") from error


def with_precision(config: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """`config` with `precision=auto` decided by the device, also in the record of its choices."""
    precision = vars(_decided(asked.read_group("precision", config["precision"]), device))
    origin = config.get("origin")
    if origin and origin.get("choices", {}).get("precision") == "auto":
        name = {"bfloat16": "bf16", "float16": "fp16"}.get(precision["dtype"], "tf32" if precision["tf32"] else "fp32")
        origin = {**origin, "choices": {**origin["choices"], "precision": name}}
    return {**config, "precision": precision, "origin": origin}


def _decided(chosen: PrecisionSettings, device: torch.device) -> PrecisionSettings:
    """`auto` is bf16 on a GPU that has it, else fp32."""
    has = has_bf16(device)
    dtype = {"auto": "bfloat16" if has else "float32"}.get(chosen.dtype, chosen.dtype)
    return replace(chosen, dtype=dtype, tf32=has if chosen.tf32 == "auto" else chosen.tf32)


def precision(chosen: PrecisionSettings, device: torch.device) -> Precision:
    chosen = _decided(chosen, device)
    return Precision(None if chosen.dtype == "float32" else getattr(torch, chosen.dtype), chosen.tf32)


def objective(settings: Settings) -> Objective:
    """The loss over hard or soft targets, with the published regularisation of adjacent maps if asked for."""
    blocks, weight = settings.loss.cosine_blocks, settings.loss.cosine_weight
    if blocks >= settings.model["depth"]:
        raise UserError(f"loss.cosine_blocks={blocks} pairs adjacent blocks: give 0 to {settings.model['depth'] - 1}.")
    plain = OBJECTIVES[settings.loss.kind]
    if not blocks:
        return plain

    def regularised(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with record_maps(network, first=blocks + 1) as maps:
            loss = plain(network, x, y)
        return loss + weight * cosine_regularisation(maps)

    return regularised


def schedule_and_plan(settings: Settings, epoch_size: int) -> tuple[Schedule, Plan]:
    """Epochs become steps here and nowhere else."""
    chosen, batch = settings.schedule, settings.data.batch_size
    per_epoch = inputs.epoch_steps(epoch_size, batch, settings.augment.repeats)
    counted = epoch_size // settings.augment.repeats * settings.augment.repeats
    if not counted:
        raise UserError(f"augment.repeats={settings.augment.repeats} is more than the {epoch_size} training images.")

    def steps(epochs: float | None, given: int | None = None) -> int:
        if epochs is None:
            return given
        exact = epochs * per_epoch
        return math.ceil(round(exact, 6)) or math.ceil(exact)  # 15 * (800 / 96) is above 125

    schedule = Schedule(
        steps=steps(chosen.epochs, chosen.steps), warmup_steps=steps(chosen.warmup_epochs, chosen.warmup_steps),
        cooldown_steps=steps(chosen.cooldown_epochs), lr=settings.optimizer.lr, min_lr=chosen.min_lr,
        warmup_lr=chosen.warmup_lr, kind=chosen.kind, decay_from=chosen.decay_from)
    if schedule.warmup_steps > schedule.steps:
        raise UserError(f"The warm-up ({schedule.warmup_steps} steps) is longer than the run ({schedule.steps}): lower "
                        f"schedule.warmup_epochs or schedule.warmup_steps.")
    engine, probes = settings.engine, settings.probe.every_epochs
    plan = Plan(total=schedule.total, batch_size=batch, epoch_size=counted, log_every=engine.log_every,
                save_every=engine.save_every or steps(1), eval_every=steps(chosen.eval_epochs, chosen.eval_steps),
                keep_every=engine.keep_epochs and steps(engine.keep_epochs), max_skipped=engine.max_skipped,
                probe_every=probes and steps(probes), profile=engine.profile)
    return schedule, plan
