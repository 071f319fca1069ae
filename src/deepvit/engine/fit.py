"""The training loop: steps, and what is due after each of them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from deepvit.engine import checkpoint
from deepvit.engine.evaluate import Evaluation
from deepvit.engine.folder import RunFolder
from deepvit.engine.progress import Display, Meter, clock
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import is_due
from deepvit.engine.signals import StopRequest
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper
from deepvit.errors import Failure, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """When what is due, in optimizer steps (None: only after the last).

    Args:
        total: steps of the run.
        batch_size, epoch_size: pictures of a global batch and of an epoch.
        max_skipped: updates skipped in a row (loss or gradient not finite) after which the run stops.
    """

    total: int
    batch_size: int
    epoch_size: int
    log_every: int = 50
    save_every: int | None = None
    eval_every: int | None = None
    keep_every: int | None = None
    probe_every: int | None = None
    max_skipped: int = 20


@dataclass
class Fit:
    """A run from wherever `state` stands to its end, or to a request to stop.

    Args:
        draw: `(start, count) -> iterator` over the micro-batches of global batches start, start + 1, ...
        evaluate: `(state, display) -> Evaluation`, or None if it was told to stop.
        probe: `(model) -> plain values` looked at before the first step and every `plan.probe_every`; None: never.
        identity: what a checkpoint holds beside the state: the model's config, class names, the run's settings.
    """

    state: TrainState
    stepper: Stepper
    plan: Plan
    draw: Callable[[int, int], Iterator[Sequence[Any]]]
    evaluate: Callable[[TrainState, Display], Evaluation | None]
    folder: RunFolder
    ranks: Ranks
    stop: StopRequest
    probe: Callable[[torch.nn.Module], dict[str, Any]] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    latest: Evaluation | None = None

    def run(self) -> bool:
        """Trains to the end. True: finished; False: stopped on request, with a checkpoint of this very step."""
        self._board = SummaryWriter(self.folder.path, purge_step=self.state.step + 1) if self.ranks.is_main else None
        self._seen_bad: set[int] = set()
        with Display(self.ranks.is_main) as self._display:
            self._bar = self._display.bar("train", self.plan.total, self.state.step)
            if self.state.step == 0:
                self._probe()
            finished = self._train() and self._evaluate_if_due()
        if self._board is not None:
            self._board.close()
        return finished

    def _train(self) -> bool:
        state, plan = self.state, self.plan
        while state.step < plan.total:
            if not self._evaluate_if_due():
                return False
            # Skipped updates draw more batches than there are steps: go on drawing until all steps are done.
            with closing(self.draw(state.batch, plan.total - state.step)) as batches:
                if not self._train_on(batches):
                    return False
        return True

    def _train_on(self, batches: Iterator[Sequence[Any]]) -> bool:
        while (drawn := self._next(batches)) is not None:
            result = self.stepper.update(self.state, drawn)
            if result["skipped"]:
                self._note_skip(drawn, result)
                continue
            self._after_step(result)
            if not self._evaluate_if_due():
                return False
            self._save_if_due()
        return self.state.step >= self.plan.total or not self._stopped

    def _next(self, batches: Iterator[Sequence[Any]]) -> Sequence[Any] | None:
        """The next global batch; None at the end of `batches` or when any rank was asked to stop."""
        start, drawn, error = time.perf_counter(), None, None
        try:
            drawn = next(batches, None)
        except UserError as raised:
            error = raised
        flags = self.ranks.sum(torch.tensor([int(bool(self.stop)), int(error is not None)]))
        self._stopped = bool(flags[0])
        if flags[1]:
            with self.ranks.together():
                raise error or UserError("Another rank stopped.")
        if self._stopped:
            self._preempt()
            return None
        if drawn is not None:
            self.meter.add(self.plan.batch_size, time.perf_counter() - start)
            self._note_bad(drawn)
        return drawn

    def _preempt(self) -> None:
        self._save()
        if self.ranks.is_main:
            self.folder.log_event("PREEMPTED", step=self.state.step, signal=self.stop.name)
            log.info("Stopped at step %d on request (%s); the same command continues.", self.state.step,
                     self.stop.name or "by another rank")

    # What is due after a step

    def _after_step(self, result: dict[str, torch.Tensor]) -> None:
        state, plan = self.state, self.plan
        if is_due(state.step, plan.log_every, plan.total):
            self._log(result)
        if is_due(state.step, plan.probe_every, plan.total):
            self._probe()

    def _log(self, result: dict[str, torch.Tensor]) -> None:
        loss = float(self.ranks.sum(result["loss"].detach().double().cpu()) / self.ranks.world)
        line = {"step": self.state.step, "epoch": self._epoch(), "loss": loss,
                "lr": self.stepper.schedule(self.state.step), "grad_norm": float(result["grad_norm"]),
                **self.meter.read()}
        if not self.ranks.is_main:
            return
        self.folder.log_metrics(line)
        self._draw_scalars("train", line)
        left = (self.plan.total - self.state.step) * self.plan.batch_size / max(self.meter.images_per_s, 1e-9)
        text = (f"epoch {line['epoch']:.2f}  loss {loss:.4f}  {line['images_per_s']:.1f} img/s  "
                f"data wait {line['data_wait']:.0%}")
        self._bar.show(self.state.step, text)
        level = logging.DEBUG if self._display.terminal else logging.INFO
        log.log(level, "step %d/%d  %s  lr %.3g  left %s", self.state.step, self.plan.total, text, line["lr"],
                clock(left))

    def _evaluate_if_due(self) -> bool:
        """False if a request to stop came meanwhile; the evaluation is then made when the run continues."""
        state, plan = self.state, self.plan
        if state.step <= state.evaluated or not is_due(state.step, plan.eval_every, plan.total):
            return True
        self.meter.pause()
        evaluation = self.evaluate(state, self._display)
        self.meter.resume()
        if evaluation is None:
            self._preempt()
            return False
        state.evaluated, self.latest = state.step, evaluation
        summary = evaluation.summary()
        is_best = summary["top1"] > state.best.get("top1", -1.0)
        if is_best:
            state.best = {"top1": summary["top1"], "step": state.step}
        if self.ranks.is_main:
            self._note_evaluation(summary, is_best)
        return True

    def _note_evaluation(self, summary: dict[str, Any], is_best: bool) -> None:
        self.folder.log_metrics({"step": self.state.step, "epoch": self._epoch(), **summary})
        self._draw_scalars("val", summary)
        log.info("step %d  epoch %.2f  top-1 %.2f %%  top-5 %.2f %%  loss %.4f  (%d pictures)%s", self.state.step,
                 self._epoch(), summary["top1"], summary["top5"], summary["loss"], summary["n"],
                 "  best so far" if is_best else "")
        if is_best:
            self._write(self.folder.best, {**self.state.weights(), **self.identity, "step": self.state.step,
                                           "metrics": summary})

    def _save_if_due(self) -> None:
        state, plan = self.state, self.plan
        if is_due(state.step, plan.save_every, plan.total):
            self._save()
        if plan.keep_every and state.step % plan.keep_every == 0 and self.ranks.is_main:
            self._write(self.folder.checkpoints / f"step-{state.step}.pt",
                        {**state.weights(), **self.identity, "step": state.step})

    def _save(self) -> None:
        if self.ranks.is_main:
            self._write(self.folder.last, {**self.state.state_dict(), **self.identity}, previous=self.folder.previous)

    def _write(self, path, content: dict[str, Any], **options: Any) -> None:
        """A checkpoint that cannot be written does not end a run that may write its next one."""
        self.meter.pause()
        try:
            checkpoint.save(path, content, **options)
        except Failure as error:
            if self.state.step >= self.plan.total:
                raise
            log.error("%s Training goes on and tries again at the next save.", error)
            self.folder.log_event("save_failed", step=self.state.step, reason=str(error))
        self.meter.resume()

    def _probe(self) -> None:
        if self.probe is None or not self.ranks.is_main:
            return
        self.meter.pause()
        self.folder.log_metrics({"step": self.state.step, "epoch": self._epoch(),
                                 "probe": self.probe(self.state.evaluated_model)})
        self.meter.resume()

    def _note_skip(self, drawn: Sequence[Any], result: dict[str, torch.Tensor]) -> None:
        indices = sum(self.ranks.gather([int(i) for batch in drawn for i in batch.indices]), [])
        if self.ranks.is_main:
            self.folder.log_event("skipped", step=self.state.step, batch=self.state.batch - 1, indices=indices,
                                  loss=float(result["loss"]), grad_norm=float(result["grad_norm"]))
            log.warning("Batch %d skipped after step %d: loss %g, gradient norm %g.", self.state.batch - 1,
                        self.state.step, float(result["loss"]), float(result["grad_norm"]))
        if self.state.skipped_in_a_row >= self.plan.max_skipped:
            raise Failure(f"{self.state.skipped_in_a_row} batches in a row gave a loss or gradient that is not finite "
                          f"(last: batch {self.state.batch - 1}); weights are those of step {self.state.step}. "
                          f"Lower optimizer.lr, set optimizer.clip_grad, or use precision=bf16 or fp32.")

    def _note_bad(self, drawn: Sequence[Any]) -> None:
        for one in (one for batch in drawn for one in batch.bad if one.index not in self._seen_bad):
            self._seen_bad.add(one.index)
            self.folder.log_event("bad_picture", name=one.name, index=one.index, reason=one.reason,
                                  replaced_by=one.replaced_by)
            log.warning("The picture %s cannot be used (%s); another takes its place.", one.name, one.reason)

    def _draw_scalars(self, group: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{group}/{name}", value, self.state.step)

    def _epoch(self) -> float:
        return round(self.state.batch * self.plan.batch_size / self.plan.epoch_size, 4)


