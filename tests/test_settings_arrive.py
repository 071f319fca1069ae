"""Every setting arrives: each entry changes one setting of the real config and names what must change with it.

The table is complete by construction: a setting without an entry fails. Those of the model and of the attentions stand
in `test_settings_of_models`.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from typing import Any, NamedTuple, get_type_hints

import pytest
import setting_outcomes as see
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from setting_data import make_data
from setting_outcomes import DATA, Run

from deepvit.config.compose import compose
from deepvit.config.settings import Settings
from deepvit.errors import UserError

BASE = ["model=vit", "recipe=folder", "augment=none", "data.root=PHOTOS", "data.workers=0", "data.batch_size=6",
        "data.crop_pct=1", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "model.img_size=16",
        "model.patch_size=8", "model.drop_path_rate=0", "schedule.epochs=4", "schedule.warmup_epochs=1",
        "schedule.decay_from=warmup", "optimizer.lr=1e-2", "engine.accelerator=cpu", "probe.images=0"]
EPOCH = 3  # steps: 18 images in batches of 6


class Case(NamedTuple):
    """What `look` sees changes with `change`, beside what is `given`; to `wanted` (or what holds that), where told."""

    look: Callable[[Run], Any]
    change: str
    given: tuple[str, ...] = ()
    wanted: Any = None
    followed: bool = False  # by other settings, through conf's interpolations


ERASING, MIXING, STEPS = ("augment.random_erasing=1",), ("augment.mixup=1", "augment.cutmix=1"), (
    "schedule.epochs=null", "schedule.steps=10", "schedule.warmup_epochs=null", "schedule.warmup_steps=2",
    "schedule.eval_epochs=null", "schedule.eval_steps=4")
SHORT = ("schedule.epochs=2", "schedule.warmup_epochs=0")
FLIPPED_THERE, JITTERED = ("augment.hflip=0.5", "data.on_device=true"), ("augment.color_jitter=0.4",)
NORM = ("model/attention=norm_only", "model.attention.norm_batch=6")
INIT, SGD = ("init=WEIGHTS",), ("optimizer=sgd",)
TARS = ("data=timm", "data.root=TARS", "data.workers=0", "data.batch_size=6")
CASES: dict[str, Case | list[Case]] = {
    "data.source": Case(see.classes, "digits", ("data.root=null",), [str(digit) for digit in range(10)]),
    "data.root": Case(see.classes, "OTHER", wanted=["one", "two"]),
    "data.img_size": Case(see.shapes, "32", ("model.img_size=32", "data.img_size=16"),  # which is refused
                          [(6, 3, 32, 32), (6, 3, 32, 32)]),
    "data.batch_size": [Case(see.plan("batch_size"), "9", wanted=9), Case(see.shapes, "9")],
    "data.eval_batch_size": Case(see.shapes, "4", wanted=[(6, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]),
    "data.workers": Case(see.workers, "2", wanted=2),
    "data.norm": [Case(see.inputs, "imagenet"), Case(see.evaluated, "imagenet"),
                  Case(see.images, "imagenet", ("augment.auto_augment=rand-m9-n6",))],  # fills the corners
    "data.crop_pct": [Case(see.images, "0.5"), Case(see.evaluated, "0.5")],
    "data.interpolation": Case(see.evaluated, "bilinear"),
    "data.hflip": Case(see.images, "1", ("augment=light", "augment.crop_scale=null"), followed=True),
    "data.fraction": Case(see.sizes, "0.5", wanted=(9, 6)),
    "data.classes": Case(see.classes, "2", wanted=["a", "b"]),
    "data.val_fraction": Case(see.sizes, "0.5", ("data.root=FLAT", "data.val_fraction=0.2"), wanted=(4, 4)),
    "data.decoder": Case(see.decoders, "pil", wanted=("pil", "pil")),
    "data.max_bad": Case(see.trained, "0", ("data.root=BAD",)),
    "data.on_error": Case(see.evaluated, "report", ("data.root=BAD",)),
    "data.in_memory_mb": [Case(see.in_memory, "0", wanted=False), Case(see.images, "0", FLIPPED_THERE),  # refused
                          Case(see.kept_batches, "0", ("recipe=digits", "data.root=null"), wanted=False)],
    "data.on_device": [Case(lambda run: type(next(run.built.make_batches(0, 1))[0].erasures).__name__, "true",
                            wanted="Rectangles"),
                       Case(see.images, "true", ("augment.hflip=0.5",)), Case(see.images, "true", JITTERED)],
    "data.exclude": Case(see.sizes, "UNUSED", wanted=(17, 6)),
    "data.name": Case(see.classes, "wds", TARS),
    "data.train_split": Case(see.sizes, "more", TARS, wanted=(8, 4)),
    "data.val_split": Case(see.sizes, "more", TARS, wanted=(6, 8)),
    "augment.crop_scale": Case(see.images, "[0.2,0.5]"),
    "augment.crop_ratio": Case(see.images, "[0.3,0.4]", ("augment.crop_scale=[0.5,1]",)),
    "augment.interpolation": [Case(see.images, "bilinear"),
                              Case(see.images, "bilinear", ("augment.crop_scale=[0.5,1]",))],
    "augment.hflip": Case(see.images, "1"),
    "augment.vflip": Case(see.images, "1"),
    "augment.color_jitter": Case(see.images, "0.8"),
    "augment.auto_augment": Case(see.images, "rand-m9"),
    "augment.grayscale_prob": Case(see.images, "1"),
    "augment.gaussian_blur_prob": Case(see.images, "1"),
    "augment.random_erasing": Case(see.inputs, "1"),
    "augment.erasing_mode": Case(see.inputs, "const", ERASING),
    "augment.erasing_count": Case(see.inputs, "9", ERASING),
    "augment.repeats": [Case(see.indices, "2"), Case(see.plan("epoch_size"), "5", ("data.batch_size=5",), 15),
                        Case(see.rates, "5", ("data.batch_size=5",))],
    "augment.mixup": [Case(see.inputs, "1"), Case(lambda run: run.built.stepper.unit, "1", wanted=2)],  # pairs
    "augment.cutmix": Case(see.inputs, "1"),
    "augment.mix_prob": Case(see.inputs, "0", MIXING),
    "augment.switch_prob": Case(see.inputs, "1", MIXING),
    "augment.label_smoothing": Case(see.inputs, "0.1"),
    "optimizer.opt": Case(lambda run: type(run.built.state.optimizer).__name__, "lion", wanted="Lion"),
    "optimizer.lr": Case(see.rates, "0.5"),
    "optimizer.weight_decay": Case(see.trained, "0.5"),
    "optimizer.momentum": Case(see.trained, "0.5", SGD),
    "optimizer.betas": Case(see.trained, "[0.5,0.6]"),
    "optimizer.eps": Case(see.trained, "0.1"),
    "optimizer.kwargs": Case(see.trained, "{maximize: true}"),
    "optimizer.layer_decay": Case(see.trained, "0.5"),
    "optimizer.clip_grad": Case(see.trained, "0.01", SGD),
    "schedule.kind": Case(see.rates, "linear"),
    "schedule.epochs": Case(see.plan("total"), "5", wanted=5 * EPOCH),
    "schedule.steps": Case(see.plan("total"), "11", STEPS, 11),
    "schedule.warmup_epochs": Case(see.rates, "2"),
    "schedule.warmup_steps": Case(see.rates, "3", STEPS),
    "schedule.cooldown_epochs": Case(see.plan("total"), "2", wanted=6 * EPOCH),
    "schedule.warmup_lr": Case(see.rates, "0.005"),
    "schedule.min_lr": Case(see.rates, "0.005"),
    "schedule.decay_from": Case(see.rates, "start"),
    "schedule.eval_epochs": Case(see.plan("eval_every"), "2", wanted=2 * EPOCH),
    "schedule.eval_steps": [Case(see.plan("eval_every"), "3", STEPS, 3),
                            Case(see.whole, "5", STEPS, {"evaluated": [5, 10]})],
    "precision.dtype": [Case(see.trained, "bfloat16"), Case(see.evaluated, "bfloat16")],
    "precision.tf32": Case(see.tf32, "true", SHORT, (True, True)),
    "precision.scale_gradients": Case(lambda run: run.built.state.scaler.is_enabled(), "true", wanted=True),
    "engine.devices": Case(see.launched, "2", wanted=(2, 3)),
    "engine.accelerator": Case(see.joined, "auto", wanted=("auto", 1800)),
    "engine.device_batch": Case(lambda run: len(next(run.batches())), "2", wanted=3),
    "engine.threads": Case(see.threads, "3", SHORT, 3),
    "engine.log_every": Case(see.whole, "4", SHORT, {"logged": [4, 6]}),
    "engine.save_every": Case(see.plan("save_every"), "2", wanted=2),
    "engine.keep_epochs": [Case(see.plan("keep_every"), "2", wanted=2 * EPOCH),
                           Case(see.whole, "1", SHORT, {"kept": ["step-3.pt", "step-6.pt"]})],
    "engine.grad_checkpointing": Case(see.blocks_passed, "true", wanted=2),
    "engine.deterministic": Case(see.deterministic, "true", SHORT, (True, ":4096:8")),
    "engine.compile": Case(lambda run: type(run.built.stepper.network).__name__, "true", wanted="OptimizedModule"),
    "engine.timeout_s": Case(see.joined, "60", wanted=("cpu", 60)),
    "engine.max_restarts": Case(see.launched, "1", ("engine.devices=2",), (2, 1)),
    "engine.keep": Case(see.whole, "best", SHORT),
    "engine.profile": Case(see.whole, "1", SHORT),
    "engine.max_skipped": Case(see.plan("max_skipped"), "7", wanted=7),
    "ema.decay": [Case(see.trained, "0.5"), Case(see.trained, "0.5", ("ema.decay=0.9",))],
    "ema.warmup": Case(see.trained, "true", ("ema.decay=0.999",)),
    "loss.kind": Case(see.trained, "bce"),
    "loss.cosine_blocks": Case(see.trained, "1"),
    "loss.cosine_weight": Case(see.trained, "9", ("loss.cosine_blocks=1",)),
    "probe.images": Case(see.whole, "5", (*SHORT, "probe.images=2")),
    "probe.every_epochs": Case(see.whole, "1", (*SHORT, "probe.images=2"), {"probed": [0, 3, 6]}),
    "seed": [Case(see.initial, "1"), Case(see.images, "1", FLIPPED_THERE), Case(see.indices, "1"),
             Case(see.mixing, "1", MIXING), Case(see.branch_masks, "1", ("model.drop_path_rate=0.5",)),
             Case(lambda run: run.built.stepper.seed, "1", wanted=1)],  # of dropout
    "init": Case(see.initial, "WEIGHTS"),
    "dialect": Case(see.initial, "google", INIT),
    "freeze": Case(lambda run: sum(p.requires_grad for p in run.built.model.parameters()), "backbone", INIT, 2),
    "head": Case(lambda run: run.built.model.head.weight.abs().sum().item(), "zero", INIT, 0),
    "calibrate": [Case(see.evaluated, "12", NORM), Case(see.evaluated, "12", (*NORM, "ema.decay=0.9"))],
    "logger": Case(see.whole, "null", SHORT),
    "fresh": Case(see.made_again, "true", SHORT, True),
    "origin": Case(see.recorded_origin, "{recipe: ours}", SHORT, {"recipe": "ours"}),
    "dry": Case(see.whole, "true", SHORT, {"files": []}),
}



@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    DATA.update(make_data(tmp_path_factory.mktemp("data")), TMP=tmp_path_factory.mktemp("runs"))
    DATA["WEIGHTS"] = see.finished(Run(composed("schedule.epochs=1"))) / "checkpoints" / "best.pt"


def placed(word: str) -> str:
    """Names in capitals become the paths of what they name."""
    key, _, value = word.partition("=")
    return f"{key}={DATA.get(value, value)}"


@cache
def composed(*overrides: str) -> dict[str, Any]:
    return compose([placed(word) for word in (*BASE, *overrides)])


def config_of(given: tuple[str, ...], change: str | None, followed: bool) -> dict[str, Any]:
    """As composed; a change that no other setting follows is made afterwards, as composing takes 0.1 s."""
    if change is None or followed:
        return composed(*given, *([change] if change else []))
    config = copy.deepcopy(composed(*given))
    override = OverridesParser.create().parse_override(placed(change))
    *groups, key = override.key_or_group.split(".")
    reduce(dict.__getitem__, groups, config)[key] = override.value()
    return config


@cache
def outcome(look: Callable[[Run], Any], given: tuple[str, ...], change: str | None = None, followed: bool = False
            ) -> Any:
    """What is seen of a run; of one that is refused, the sentence."""
    threads = torch.get_num_threads()
    try:
        return look(Run(config_of(given, change, followed)))
    except UserError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


EACH = [pytest.param(name, case, id=f"{name}-{number}") for name, cases in CASES.items()
        for number, case in enumerate(cases if isinstance(cases, list) else [cases])]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_it_arrives(name, case):
    before = outcome(case.look, case.given)
    after = outcome(case.look, case.given, f"{name}={case.change}", case.followed)
    assert after != before
    wanted = after if case.wanted is None else case.wanted
    assert after == wanted if not isinstance(wanted, dict) else wanted.items() <= after.items()


def names(settings: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(settings)
    return {name for field in fields(settings) for name in (
        names(hints[field.name], f"{field.name}.") if is_dataclass(hints[field.name]) else {prefix + field.name})}


def test_every_setting_has_an_entry():
    assert set(CASES) == names(Settings) - {"model"}
