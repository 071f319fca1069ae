"""From settings to objects."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from deepvit import data as pictures
from deepvit.config import settings as asked
from deepvit.config.settings import Augment, Data, Optimizer, PrecisionSettings, Settings
from deepvit.config.signature import check_arguments
from deepvit.engine.fit import Plan
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState
from deepvit.engine.step import Objective, Precision, Stepper
from deepvit.errors import UserError, did_you_mean
from deepvit.models import ViT, build_model
from deepvit.models.registry import check_model

FUSED = ("adam", "adamw", "momentum", "sgd")  # torch's own, which update all parameters in one kernel
log = logging.getLogger(__name__)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """`config.settings.read_settings`, with the model's own settings checked as well."""
    settings = asked.read_settings(config)
    check_model(settings.model)
    return settings


def check(settings: Settings, ranks: Ranks) -> None:
    """Builds all that needs no data: what can be refused is refused before anything is read or written.

    Raises:
        UserError: settings that build nothing.
    """
    _check_images(settings.data.img_size, settings.model["img_size"], settings.model["in_chans"])
    train_transform(settings.data, settings.augment)
    eval_transform(settings.data)
    prepare(settings.data, 2, settings.augment)
    accumulation(settings, ranks.world)
    objective(settings)
    with torch.device("meta"):
        _check_memory(build_model({**settings.model, "num_classes": 2}))
    _try_out(optimizer(nn.Linear(1, 1, device=ranks.device), settings.optimizer), settings.optimizer)


def _check_images(read: Any, wanted: Any, channels: int) -> None:
    if channels != 3:
        raise UserError(f"model.in_chans={channels}, but images are read with 3 channels: leave it at 3.")
    if len({tuple(size) if isinstance(size, Sequence) else (size, size) for size in (read, wanted)}) > 1:
        raise UserError(f"data.img_size={read} is not model.img_size={wanted}: set the latter alone.")


def _check_memory(network: ViT) -> None:
    needed = sum(parameter.nbytes for parameter in network.parameters())
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(f"The weights of this model take {needed / 2**30:.0f} GiB, more than this machine has: lower "
                        f"model.embed_dim, model.depth or model.mlp_ratio.")


def _try_out(made: torch.optim.Optimizer, chosen: Optimizer) -> None:
    """Some optimizers refuse their settings, or gradients without a graph, only at the first step."""
    for group in made.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        made.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(chosen, error) from error


# Data

def splits(data: Data) -> pictures.Splits:
    """The data set that `data` names."""
    if data.source == "digits" and data.root is not None:
        raise UserError(f"data.root={data.root} is given, but the digits are built in: to train on your pictures add "
                        f"recipe=imagenet (train/ and val/ folders of classes), recipe=cifar10 or recipe=folder.")
    return pictures.load(data.source, root=data.root, fraction=data.fraction, classes=data.classes,
                         val_fraction=data.val_fraction, decoder=data.decoder, in_memory_mb=data.in_memory_mb,
                         name=data.name, train_split=data.train_split, val_split=data.val_split)


def train_transform(data: Data, augment: Augment) -> pictures.Transform:
    mixing = ("repeats", "mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
    options = {name: value for name, value in vars(augment).items() if name not in mixing}
    mean, _ = pictures.norm_values(data.norm)
    return pictures.train_transform(data.img_size, crop_pct=data.crop_pct, mean=mean, **options)


def eval_transform(data: Data) -> pictures.Transform:
    return pictures.eval_transform(data.img_size, data.crop_pct, data.interpolation)


def prepare(data: Data, num_classes: int, augment: Augment | None = None, seed: int = 0) -> pictures.Prepare:
    """Normalisation, and in training the mixing that `augment` names."""
    mixing = {} if augment is None else {name: getattr(augment, name) for name in (
        "mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")}
    return pictures.Prepare(*pictures.norm_values(data.norm), num_classes, seed=seed, **mixing)


def accumulation(settings: Settings, world: int) -> int:
    """Micro-batches of an update: the fewest that fit `engine.device_batch` and divide the global batch.

    Raises:
        UserError: the global batch does not divide over the devices, or mixing finds no pairs in a micro-batch.
    """
    batch, most = settings.data.batch_size, settings.engine.device_batch
    if batch % world:
        raise UserError(f"data.batch_size={batch} (of all devices together) does not divide over {world} devices.")
    share = batch // world
    mixes = settings.augment.mix_prob > 0 and (settings.augment.mixup > 0 or settings.augment.cutmix > 0)
    for parts in range(math.ceil(share / (most or share)), share + 1):
        if share % parts == 0 and not (mixes and share // parts % 2):
            return parts
    raise UserError(f"mixup and cutmix pair neighbours in a micro-batch: data.batch_size={batch} on {world} devices "
                    f"must leave each an even number of pictures.")


def draw(settings: Settings, train: pictures.ImageSet, ranks: Ranks):
    """`(start, count) -> iterator` over the micro-batches of `count` global batches from number `start`."""
    transform = train_transform(settings.data, settings.augment)
    parts = accumulation(settings, ranks.world)

    def batches(start: int, count: int) -> Iterator[list[pictures.Batch]]:
        steps = pictures.train_batches(
            train, transform, seed=settings.seed, batch_size=settings.data.batch_size, steps=start + count,
            start_step=start, rank=ranks.rank, world=ranks.world, accumulation=parts, workers=settings.data.workers,
            repeats=settings.augment.repeats, max_bad=settings.data.max_bad, pin=ranks.device.type == "cuda")
        return pictures.ahead(steps, ranks.device)

    return batches


def eval_batches(data: Data, images: pictures.ImageSet, ranks: Ranks) -> Callable[[], Iterator[pictures.Batch]]:
    """Called for each evaluation: this rank's batches."""
    return pictures.eval_batches_again(
        images, eval_transform(data), batch_size=data.eval_batch_size, rank=ranks.rank, world=ranks.world,
        workers=data.workers, on_error=data.on_error, pin=ranks.device.type == "cuda", in_memory_mb=data.in_memory_mb,
        device=ranks.device)


# Model and optimizer

def model(settings: Settings, num_classes: int, continued: bool = False) -> ViT:
    """The model of `settings.model` for `num_classes`, initialised from `settings.seed` and `settings.init` alone; of
    a run that is `continued` the latter is not read again."""
    asked = settings.model.get("num_classes")
    if asked is not None and asked != num_classes:
        raise UserError(f"model.num_classes={asked}, but the data has {num_classes} classes: leave it null.")
    torch.manual_seed(settings.seed)
    built = build_model({**settings.model, "num_classes": num_classes})
    built.set_grad_checkpointing(settings.engine.grad_checkpointing)
    if settings.init is not None and not continued:
        from deepvit.importers import load_weights
        load_weights(built, settings.init, dialect=settings.dialect, head=settings.head)
    return built


def optimizer(network: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """By timm's factory: no decay on biases, norms and the embeddings that the model names.

    A layer-wise decay gives each group its `lr_scale`.

    Raises:
        UserError: timm has no such optimizer, or that one does not take these settings.
    """
    if chosen.opt not in list_optimizers():
        raise UserError(f"optimizer.opt={chosen.opt} is not one of timm's."
                        f"{did_you_mean(chosen.opt, list_optimizers())}")
    try:
        return create_optimizer_v2(network, chosen.opt, lr=chosen.lr, weight_decay=chosen.weight_decay,
                                   layer_decay=chosen.layer_decay, **_optimizer_keywords(chosen))
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:  # as the optimizer has it
        raise _refused(chosen, error) from error


def _refused(chosen: Optimizer, error: Exception) -> UserError:
    further = f" with optimizer.kwargs={dict(chosen.kwargs)}" if chosen.kwargs else ""
    return UserError(f"optimizer.opt={chosen.opt} does not work here{further}: {error}.")


OWN = {"lr", "weight_decay", "momentum", "betas", "eps"}  # an optimizer's keywords that are settings by themselves


def _optimizer_keywords(chosen: Optimizer) -> dict[str, Any]:
    """The keywords that are given, each of which the optimizer must take: timm drops some that it does not."""
    info, cls = get_optimizer_info(chosen.opt), get_optimizer_class(chosen.opt, bind_defaults=False)
    given = {name: value for name in ("momentum", "betas", "eps") if (value := getattr(chosen, name)) is not None}
    for name in given:
        if not getattr(info, f"has_{name}"):
            raise UserError(f"optimizer.{name}={given[name]} has no effect with optimizer.opt={chosen.opt}: set it to "
                            f"null.")
    if "betas" in given and len(chosen.betas) != info.num_betas:
        raise UserError(f"optimizer.betas={chosen.betas} must be a list of {info.num_betas}.")
    further = dict(chosen.kwargs or {})
    for name in OWN & further.keys():
        raise UserError(f"optimizer.kwargs.{name} is a setting of its own: give optimizer.{name}.")
    check_arguments(cls, further, "optimizer.kwargs", ignore_missing={"params", *OWN})
    return given | ({"fused": True} if chosen.opt in FUSED else {}) | further


def state(settings: Settings, network: ViT, ranks: Ranks) -> TrainState:
    network.to(ranks.device)
    ema = settings.ema
    # Buffers are copied: a head norm's variance starts at 1 and is truly near 1e-6, so its average would stay wrong.
    average = ModelEmaV3(network, ema.decay, use_warmup=ema.warmup, exclude_buffers=True) if ema.decay else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision.scale_gradients)
    return TrainState(network, optimizer(network, settings.optimizer), scaler, average)


def stepper(settings: Settings, network: ViT, schedule: Schedule, num_classes: int, ranks: Ranks) -> Stepper:
    called = torch.compile(network) if settings.engine.compile else network
    return Stepper(ranks.wrap(called), prepare(settings.data, num_classes, settings.augment, settings.seed),
                   objective(settings), schedule, precision(settings.precision), ranks, settings.seed,
                   settings.optimizer.clip_grad)


def precision(chosen: PrecisionSettings) -> Precision:
    dtype = getattr(torch, chosen.dtype)
    return Precision(None if dtype is torch.float32 else dtype, chosen.scale_gradients, chosen.tf32)


def objective(settings: Settings) -> Objective:
    """Cross-entropy over hard or soft targets, with the published regularisation of adjacent maps if asked for."""
    blocks, weight = settings.loss.cosine_blocks, settings.loss.cosine_weight
    if blocks < 0 or blocks >= settings.model["depth"]:
        raise UserError(f"loss.cosine_blocks={blocks} compares pairs of adjacent blocks: give 0 (off) to "
                        f"{settings.model['depth'] - 1} for a model of {settings.model['depth']} blocks.")

    def cross_entropy(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(network(x).float(), y)

    if not blocks:
        return cross_entropy
    from deepvit.models.cosine_reg import cosine_regularisation, record_maps

    def regularised(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with record_maps(network, first=blocks + 1) as maps:
            loss = cross_entropy(network, x, y)
        return loss + weight * cosine_regularisation(maps, blocks)

    return regularised


# Durations: epochs become steps here and nowhere else

def schedule_and_plan(settings: Settings, epoch_size: int) -> tuple[Schedule, Plan]:
    chosen, batch = settings.schedule, settings.data.batch_size
    per_epoch = pictures.epoch_steps(epoch_size, batch, settings.augment.repeats)
    counted = epoch_size // settings.augment.repeats * settings.augment.repeats
    if not counted:
        raise UserError(f"augment.repeats={settings.augment.repeats} is more than the {epoch_size} training images.")

    def steps(epochs: float | None, given: int | None) -> int:
        return given if epochs is None else math.ceil(epochs * per_epoch)

    schedule = Schedule(
        lr=settings.optimizer.lr, steps=steps(chosen.epochs, chosen.steps), kind=chosen.kind,
        warmup_steps=steps(chosen.warmup_epochs, chosen.warmup_steps),
        cooldown_steps=math.ceil(chosen.cooldown_epochs * per_epoch), warmup_lr=chosen.warmup_lr,
        min_lr=chosen.min_lr, decay_from=chosen.decay_from)
    if schedule.warmup_steps > schedule.steps:
        raise UserError(f"The warm-up ({schedule.warmup_steps} steps) is longer than the run ({schedule.steps}): lower "
                        f"schedule.warmup_epochs or schedule.warmup_steps.")
    engine, epoch = settings.engine, math.ceil(per_epoch)
    plan = Plan(total=schedule.total, batch_size=batch, epoch_size=counted, log_every=engine.log_every,
                save_every=engine.save_every or epoch,
                eval_every=max(1, steps(chosen.eval_epochs, chosen.eval_steps)),
                keep_every=engine.keep_epochs and engine.keep_epochs * epoch,
                probe_every=settings.probe.every_epochs and settings.probe.every_epochs * epoch,
                max_skipped=engine.max_skipped)
    return schedule, plan


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config in today's settings: what had no effect, and was accepted then, is left out."""
    optimizer, schedule = config["optimizer"], config["schedule"]
    info = get_optimizer_info(optimizer["opt"])
    idle = {name: None for name in ("momentum", "betas", "eps") if not getattr(info, f"has_{name}")}
    rest = {"cooldown_epochs": 0} if schedule["steps"] is not None else {}
    return {**config, "optimizer": {"kwargs": None, **optimizer, **idle}, "schedule": {**schedule, **rest}}


def changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings that differ: dotted key -> (before, now)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences |= changed(old, new, f"{prefix}{name}.")
        elif old != new:
            differences[prefix + name] = (old, new)
    return differences
