"""The training loop: steps, and what is due after each of them."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

from torch import nn
from torch.profiler import record_function

from deepvit.engine.checkpoint import Saver
from deepvit.engine.device import give_back
from deepvit.engine.evaluate import Evaluation
from deepvit.engine.folder import RunFolder
from deepvit.engine.loggers import Draw, Loggers
from deepvit.engine.nonfinite import SkipWatch
from deepvit.engine.profile import StepProfile
from deepvit.engine.progress import Display, Meter, clock
from deepvit.engine.schedule import Plan, is_due
from deepvit.engine.signals import StopRequest
from deepvit.engine.state import TrainState
from deepvit.engine.step import Status, Stepper, Update
from deepvit.errors import Failure, UserError

Batches = Sequence[Any]  # the micro-batches of one global batch
PATIENCE = 60  # seconds of training after which the time to go is told, though the log's first line is not due yet
Measures = tuple[dict[str, Any], Draw]  # plain values to log, and images of them
log = logging.getLogger(__name__)


class Fit:
    """A run from wherever `state` stands to its end, or to a request to stop. `make_batches(start, count)`: an iterator
    over global batches. `attention_metrics(model, step)`: before the first, every `plan.probe_every`, at the end."""

    def __init__(self, state: TrainState, stepper: Stepper, plan: Plan,
                 make_batches: Callable[[int, int], Iterator[Batches]],
                 evaluate: Callable[[nn.Module, Display], Evaluation | None], folder: RunFolder, saver: Saver,
                 loggers: Loggers, stop: StopRequest,
                 attention_metrics: Callable[[nn.Module, int], Measures] | None = None):
        self.state, self.stepper, self.plan, self.meter = state, stepper, plan, Meter()
        self._make_batches, self._evaluate, self._attention_metrics = make_batches, evaluate, attention_metrics
        self._folder, self._saver, self._loggers, self._stop = folder, saver, loggers, stop
        self._ranks = stepper.ranks
        self._display = Display(self._ranks.is_main)
        self._bar = self._display.add_task("train", total=plan.total, completed=state.step)
        self._profile = StepProfile(folder.path / "profile", self._ranks.device, plan.profile, state.step,
                                    plan.total - state.step) if plan.profile and self._ranks.is_main else None
        self._skips = SkipWatch(state, stepper, folder, saver, plan.max_skipped, make_batches)
        self._newest: Update | None = None
        self._limit = stepper.limit  # the last one noted
        self._error: UserError | Failure | None = None  # of making the next batch
        self._seen_bad: set[int] = set()
        self._is_silent = self._ranks.is_main
        self._pil_fallbacks = 0  # images that the fast decoder refused, since the last log line

    def run(self) -> bool:
        """Trains to the end. True: finished; False: stopped on request, with a checkpoint of this very step."""
        state, plan = self.state, self.plan
        with self._display, self._profile or nullcontext():
            if not self._begin():
                return False
            with closing(self._make_batches(state.step, plan.total - state.step)) as stream:
                while state.step < plan.total:
                    batches = self._next(stream)
                    status, update = self.stepper.update(state, batches, self._stop)
                    if status is Status.ERROR:
                        self._ranks.raise_together(self._error)
                    if update is not None:
                        self._after_update(update, batches)
                    if status is not Status.DONE:
                        self._preempt()
                        return False
                    if not self._evaluate_and_save():
                        return False
                    if self._profile:
                        with self.meter.paused():
                            self._profile.step()
        return True

    def _begin(self) -> bool:
        """What comes before the first step; False if a request to stop came meanwhile."""
        if self.state.step == 0:
            self._saver.log_sizes(self.state)
            with self.meter.paused():
                self._saver.save_last(self.state, must=True)  # what cannot be saved should not start
            self._measure_attention()
        elif self.state.evaluated < self.state.step and self._is_evaluation_due():  # a request to stop cut it short
            return self._evaluate_and_save()
        else:
            self._keep()  # a kill or a request to stop may have come first
        return True

    def _next(self, stream: Iterator[Batches]) -> Batches | None:
        """The next global batch; None where it could not be made, which the other ranks learn in the update."""
        start = time.perf_counter()
        self._ranks.record_step(self.state.step)
        try:
            with record_function("wait for data"):
                batches = next(stream)
        except (UserError, Failure) as error:
            self._error = error
            return None
        waited = time.perf_counter() - start  # while the device may still have been at work
        self.meter.add(self.plan.batch_size, min(waited, self._newest.idle_s()) if self._newest else waited)
        self._note_bad(batches)
        self._pil_fallbacks += sum(batch.pil_fallbacks for batch in batches)
        return batches

    def _preempt(self) -> None:
        self._skips.catch_up()
        saved = self._saver.save_last(self.state, otherwise="The same command continues from the previous checkpoint.")
        if self._ranks.is_main:
            self._folder.log_event("PREEMPTED", step=self.state.step, signal=self._stop.name, saved=saved)
            log.info("Stopped at step %d on request (%s); the same command continues the run.", self.state.step,
                     self._stop.name or "to another rank")

    def _after_update(self, update: Update, batches: Batches) -> None:
        state, plan = self.state, self.plan
        self._newest = update
        self._display.advance(self._bar)
        self._skips.add(update, batches)
        if self.stepper.limit != self._limit:
            self._limit = self.stepper.limit
            if self._ranks.is_main:
                self._folder.log_event("out_of_memory", step=update.batch_index, device_batch=self._limit)
                log.warning("Out of memory in step %d, which was repeated: from now on %d images at once.",
                            update.batch_index + 1, self._limit)
        if is_due(state.step, plan.log_every, plan.total):
            self._log(update)
        elif self._is_silent and (pace := self.meter.peek())["seconds"] > PATIENCE:
            self._say([f"{pace['images_per_s']:.1f} img/s"], pace["images_per_s"])
        if not self._is_evaluation_due():
            self._probe()

    def _log(self, update: Update) -> None:
        state, plan = self.state, self.plan
        self._skips.catch_up()
        refused, self._pil_fallbacks = sum(self._ranks.gather(self._pil_fallbacks)), 0
        line = {"loss": float(update.loss), "lr": self.stepper.schedule(state.step),
                "grad_norm": float(update.grad_norm), **self.meter.read(),
                **({"decoder_refused": refused} if refused else {})}
        if not self._ranks.is_main:
            return
        self._loggers.log_scalars("train", line, state.step, self._epoch())
        details = [f"loss {line['loss']:.4f}", f"{line['images_per_s']:.1f} img/s", f"epoch {self._epoch():.2f}",
                   f"data wait {line['data_wait']:.0%}", f"lr {line['lr']:.3g}"]
        self._display.update(self._bar, details=details)
        self._say(details, self.meter.images_per_s)

    def _say(self, details: Sequence[str], images_per_s: float) -> None:
        self._is_silent, step, plan = False, self.state.step, self.plan
        left = (plan.total - step) * plan.batch_size / max(images_per_s, 1e-9)
        level = logging.DEBUG if self._display.replaces_lines else logging.INFO
        log.log(level, "step %d/%d  %s  left %s", step, plan.total, "  ".join(details), clock(left))

    def _probe(self) -> None:
        if is_due(self.state.step, self.plan.probe_every, self.plan.total):
            self._measure_attention()

    def _measure_attention(self) -> None:
        if self._attention_metrics is None or not self._ranks.is_main:
            return
        with self.meter.paused():
            values, draw = self._attention_metrics(self.state.evaluated_model, self.state.step)
            self._loggers.log_scalars("attention", values, self.state.step, self._epoch())
            self._loggers.log_images(draw, self.state.step)
            give_back()

    def _evaluate_and_save(self) -> bool:
        """Where it is due. False if a request to stop came meanwhile; the run then evaluates when it continues."""
        state, plan = self.state, self.plan
        evaluates, saves = self._is_evaluation_due(), is_due(state.step, plan.save_every, plan.total)
        if evaluates or saves:
            self._skips.catch_up()
        if evaluates and not self._evaluate_and_probe():
            return False
        with self.meter.paused():
            if saves:
                self._saver.save_last(state, must=state.step == plan.total)
            self._keep()
        return True

    def _keep(self) -> None:
        """Saves the weights of this step, if it is one of those to be kept."""
        if self.plan.keep_every and self.state.step % self.plan.keep_every == 0:
            self._saver.save_weights(self._folder.checkpoints / f"step-{self.state.step}.pt", self.state)

    def _evaluate_and_probe(self) -> bool:
        """In this order, as an evaluation may give batch norms other statistics. False if asked to stop."""
        with self.meter.paused():
            evaluation = self._evaluate(self.state.evaluated_model, self._display)
            if evaluation is None:
                self._preempt()
                return False
            self._note_evaluation(evaluation.summary())
        self._probe()
        return True

    def _is_evaluation_due(self) -> bool:
        return is_due(self.state.step, self.plan.eval_every, self.plan.total)

    def _note_evaluation(self, summary: dict[str, Any]) -> None:
        state = self.state
        state.evaluated = state.step
        is_best = summary["top1"] > state.best.get("top1", -1.0)
        if is_best:
            state.best = {"top1": summary["top1"], "step": state.step}
        if not self._ranks.is_main:
            return
        self._loggers.log_scalars("val", summary, state.step, self._epoch())
        top5 = f"top-5 {summary['top5']:.2f} %  " if "top5" in summary else ""
        log.info("step %d  epoch %.2f  top-1 %.2f %%  %sloss %.4f%s", state.step, self._epoch(), summary["top1"], top5,
                 summary["loss"], "  best so far" if is_best else "")
        if is_best:
            self._saver.save_weights(self._folder.best, state, metrics=summary)

    def _note_bad(self, batches: Batches) -> None:
        for one in (one for batch in batches for one in batch.bad if one.index not in self._seen_bad):
            self._seen_bad.add(one.index)
            self._folder.log_event("bad_picture", name=one.name, index=one.index, reason=one.reason,
                                   replaced_by=one.replaced_by)
            log.warning("The image %s cannot be used (%s); another one is shown instead.", one.name, one.reason)

    def _epoch(self) -> float:
        return round(self.state.step * self.plan.batch_size / self.plan.epoch_size, 4)
