"""The training loop: steps, and what is due after each of them."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepvit.engine import checkpoint
from deepvit.engine.board import Board
from deepvit.engine.evaluate import Evaluation
from deepvit.engine.folder import RunFolder
from deepvit.engine.progress import Display, Meter, clock
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import is_due
from deepvit.engine.signals import StopRequest
from deepvit.engine.state import TrainState
from deepvit.engine.step import Stepper, Update
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
        probe: `(model, board, step) -> plain values`, which it may draw too; before the first step, every
            `plan.probe_every` and at the end. None: never.
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
    probe: Callable[[torch.nn.Module, Board, int], dict[str, Any]] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)

    def run(self) -> bool:
        """Trains to the end. True: finished; False: stopped on request, with a checkpoint of this very step."""
        self._board = Board(self.folder.path, self.state.step) if self.ranks.is_main else None
        self._seen_bad: set[int] = set()
        self._refused = 0  # since the last line of metrics
        self._under_way: tuple[Sequence[Any], Update] | None = None
        self._newest: Update | None = None
        with Display(self.ranks.is_main) as self._display:
            self._bar = self._display.bar("train", self.plan.total, self.state.step)
            if self.state.batch == 0:
                self._warn_of_small_disk()
                self._save(must=True)  # what cannot be saved should not start
            if self.state.step == 0:
                self._probe()
            finished = self._train() and self._make_up_evaluation()
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
            update = self.stepper.backward(self.state, drawn, self._any_asked_to_stop)
            self._settle()  # the one before: what became of it was on the way while the device did this one
            if update is None:
                self._preempt()
                return False
            self.stepper.step(self.state, update)
            self._newest, self._under_way = update, (drawn, update)
            if not self._must_know() or not self._settle():
                continue
            self._after_step(update)
            if not self._evaluate_if_due():
                return False
            self._save_if_due()
        self._settle()
        return self.state.step >= self.plan.total or not self._stopped

    def _must_know(self) -> bool:
        """Whether the next batch may not begin before it is known what became of the update under way."""
        step, plan = self.state.step + 1, self.plan
        intervals = plan.log_every, plan.save_every, plan.eval_every, plan.keep_every, plan.probe_every
        return (any(is_due(step, every, plan.total) for every in intervals)
                or self.state.skipped_in_a_row > 0 or plan.max_skipped == 1)

    def _settle(self) -> bool:
        """Learns what became of the update under way. False: it was skipped, or there is none."""
        if self._under_way is None:
            return False
        (drawn, update), self._under_way = self._under_way, None
        made = self.stepper.settle(self.state, update)
        if not made:
            self._note_skip(drawn, update)
        return made

    def _any_asked_to_stop(self) -> bool:
        return self.ranks.any(bool(self.stop))

    def _next(self, batches: Iterator[Sequence[Any]]) -> Sequence[Any] | None:
        """The next global batch; None at the end of `batches` or when any rank was asked to stop."""
        start, drawn, error = time.perf_counter(), None, None
        self.ranks.beat(self.state.step + (self._under_way is not None))
        try:
            drawn = next(batches, None)
        except (UserError, Failure) as raised:
            error = raised
        flags = self.ranks.sum(torch.tensor([int(bool(self.stop)), int(error is not None)]))
        self._stopped = bool(flags[0])
        if self._stopped:  # first: a signal to all processes may also have ended those that load pictures
            self._preempt()
            return None
        if flags[1]:
            self.ranks.agree(error)
        if drawn is not None:
            waited = time.perf_counter() - start  # while the device may still have been at work
            self.meter.add(self.plan.batch_size, min(waited, self._newest.idle_s()) if self._newest else waited)
            self._note_bad(drawn)
            self._refused += sum(batch.refused for batch in drawn)
        return drawn

    def _preempt(self) -> None:
        self._settle()
        saved = self._save("Stopping without it; the same command continues from the checkpoint before.")
        if self.ranks.is_main:
            self.folder.log_event("PREEMPTED", step=self.state.step, signal=self.stop.name, saved=saved)
            log.info("Stopped at step %d on request (%s); the same command continues.", self.state.step,
                     self.stop.name or "to another rank")

    # What is due after a step

    def _after_step(self, update: Update) -> None:
        state, plan = self.state, self.plan
        if is_due(state.step, plan.log_every, plan.total):
            self._log(update)
        if is_due(state.step, plan.probe_every, plan.total):
            self._probe()

    def _log(self, update: Update) -> None:
        loss = float(self.ranks.sum(update.loss.double().cpu()) / self.ranks.world)
        refused, self._refused = int(self.ranks.sum(torch.tensor(self._refused))), 0
        line = {"step": self.state.step, "epoch": self._epoch(), "loss": loss,
                "lr": self.stepper.schedule(self.state.step), "grad_norm": float(update.grad_norm),
                **self.meter.read(), **({"decoder_refused": refused} if refused else {})}
        if not self.ranks.is_main:
            return
        self.folder.log_metrics(line)
        self._board.draw("train", line, self.state.step)
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
        state.evaluated = state.step
        summary = evaluation.summary()
        is_best = summary["top1"] > state.best.get("top1", -1.0)
        if is_best:
            state.best = {"top1": summary["top1"], "step": state.step}
        if self.ranks.is_main:
            self._note_evaluation(summary, is_best)
        return True

    def _make_up_evaluation(self) -> bool:
        """The last evaluation, if a request to stop cut it off."""
        if self.state.evaluated >= self.state.step:
            return True
        return self._evaluate_if_due() and self._save()

    def _note_evaluation(self, summary: dict[str, Any], is_best: bool) -> None:
        self.folder.log_metrics({"step": self.state.step, "epoch": self._epoch(), **summary})
        self._board.draw("val", summary, self.state.step)
        log.info("step %d  epoch %.2f  top-1 %.2f %%  top-5 %.2f %%  loss %.4f  (%d pictures)%s", self.state.step,
                 self._epoch(), summary["top1"], summary["top5"], summary["loss"], summary["n"],
                 "  best so far" if is_best else "")
        if is_best:
            self._write(self.folder.best, {**self.state.weights(), **self.identity, "step": self.state.step,
                                           "metrics": summary}, "The best weights so far are not kept.")

    def _save_if_due(self) -> None:
        state, plan = self.state, self.plan
        if is_due(state.step, plan.save_every, plan.total):
            self._save()
        if plan.keep_every and state.step % plan.keep_every == 0 and self.ranks.is_main:
            self._write(self.folder.checkpoints / f"step-{state.step}.pt",
                        {**state.weights(), **self.identity, "step": state.step}, "This epoch's are not kept.")

    def _save(self, otherwise: str = "Training goes on and tries again at the next save.", must: bool = False) -> bool:
        """Whether the checkpoint of this step was written; where it must be and was not, all ranks fail together."""
        error = None
        if self.ranks.is_main:
            content = {**self.state.state_dict(), **self.identity, "world": self.ranks.world}
            error = self._write(self.folder.last, content, otherwise, previous=self.folder.previous)
        if must or self.state.step >= self.plan.total:
            self.ranks.agree(error)
        return error is None

    def _write(self, path: Path, content: dict[str, Any], otherwise: str, **options: Any) -> Failure | None:
        """A checkpoint that cannot be written does not end a run that may write its next one."""
        self.meter.pause()
        try:
            checkpoint.save(path, content, **options)
        except Failure as error:
            log.error("%s %s", error, otherwise)
            self.folder.log_event("save_failed", step=self.state.step, reason=str(error))
            return error
        finally:
            self.meter.resume()

    def _warn_of_small_disk(self) -> None:
        """Three full checkpoints may lie there for a moment (two optimizer moments each), and the best weights."""
        weights = checkpoint.size_of(self.state.weights())
        moments = 2 * sum(weight.nbytes for weight in self.state.model.parameters())
        needed, free = 3 * (weights + moments) + weights, shutil.disk_usage(self.folder.path).free
        if self.ranks.is_main and needed > free:
            log.warning("The checkpoints of this run may need %.0f MiB, and %.0f MiB are free at %s.", needed / 2**20,
                        free / 2**20, self.folder.path)

    def _probe(self) -> None:
        if self.probe is None or not self.ranks.is_main:
            return
        self.meter.pause()
        self.folder.log_metrics({"step": self.state.step, "epoch": self._epoch(),
                                 "probe": self.probe(self.state.evaluated_model, self._board, self.state.step)})
        self.meter.resume()

    def _note_skip(self, drawn: Sequence[Any], update: Update) -> None:
        state, number = self.state, update.number
        mine = [int(i) for batch in drawn for i in batch.indices], float(update.loss)
        indices, losses = zip(*self.ranks.gather(mine), strict=True)
        if self.ranks.is_main:
            norm = float(update.grad_norm)
            self.folder.log_event("skipped", step=state.step, batch=number, indices=sum(indices, []),
                                  losses=list(losses), grad_norm=norm)
            log.warning("Batch %d skipped after step %d: loss %s, gradient norm %g%s.", number, state.step,
                        ", ".join(f"{loss:g}" for loss in losses), norm, self._scale())
        if state.skipped_in_a_row >= self.plan.max_skipped:
            self._give_up(drawn, number)

    def _scale(self) -> str:
        scaler = self.state.scaler
        return f"; gradients are now scaled by {scaler.get_scale():g}" if scaler.is_enabled() else ""

    def _give_up(self, drawn: Sequence[Any], number: int) -> None:
        """Ends the run with what went wrong first and how to see it again."""
        culprit = self.stepper.examine(self.state, drawn, number).first
        culprits = [f"rank {rank}: {first}" for rank, first in enumerate(self.ranks.gather(culprit)) if first]
        where = culprits[0] if culprits else "seen again it is finite, so the cause lies in the scaling or the machine"
        if self.ranks.is_main:
            self._write(self.folder.nonfinite, {**self.state.state_dict(), **self.identity, "world": self.ranks.world},
                        "The weights cannot be looked at later.")
            self.folder.log_event("gave_up", step=self.state.step, batch=number, first=where)
        raise Failure(f"{self.state.skipped_in_a_row} batches in a row gave a loss or gradient that is not finite. "
                      f"First to go wrong in batch {number}, {where}. To look at it again: "
                      f"deepvit replay {self.folder.path} --batch {number}. To go on, lower optimizer.lr, "
                      f"set optimizer.clip_grad, or use precision=bf16 or fp32: the same command with that and "
                      f"hydra.run.dir={self.folder.path} continues from the last checkpoint.")

    def _note_bad(self, drawn: Sequence[Any]) -> None:
        for one in (one for batch in drawn for one in batch.bad if one.index not in self._seen_bad):
            self._seen_bad.add(one.index)
            self.folder.log_event("bad_picture", name=one.name, index=one.index, reason=one.reason,
                                  replaced_by=one.replaced_by)
            log.warning("The picture %s cannot be used (%s); another takes its place.", one.name, one.reason)

    def _epoch(self) -> float:
        return round(self.state.batch * self.plan.batch_size / self.plan.epoch_size, 4)
