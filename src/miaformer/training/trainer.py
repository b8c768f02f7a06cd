"""The training loop: one for all stages, on `accelerate`.

The state of a run is a step number and what `accelerate` saves at it. All randomness is a function of seed and step, so
that a resumed run goes on exactly, and several processes do what one would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from miaformer.data import Batch, Batches, DeviceBatches
from miaformer.data.seeds import seed_everything, stream_seed
from miaformer.engine.masked import Masked
from miaformer.model.model import MIAFormer
from miaformer.training.adversarial import Adversary
from miaformer.training.checkpoint import checkpoint_step, checkpoints, load_checkpoint, save_checkpoint
from miaformer.training.interrupts import Interrupted, StopRequest
from miaformer.training.objective import Objective, Outcome, Step, score_name
from miaformer.training.optimizer import stage_optimizer
from miaformer.training.policies import Draws
from miaformer.training.probe import fit_on, most_batches
from miaformer.training.progress import DURATIONS, Display, Duration, Means, MetricsFile
from miaformer.training.recipes import Recipe, Stage
from miaformer.training.stages import OBJECTIVES, relaxed
from miaformer.training.tariff import Tariff

_GATES, _SECOND_GATES, _START = range(3)  # separate streams of random numbers


@dataclass(frozen=True)
class Span:
    """Where a stage lies among the steps of a run: from `first` (included) to `last` (not)."""

    stage: Stage
    first: int
    last: int


class Trainer:
    """Takes a model through a recipe's stages. `run` gives it back trained, in evaluation mode, not yet calibrated."""

    def __init__(
        self,
        model: MIAFormer,
        batches: Batches | DeviceBatches,
        recipe: Recipe,
        out: Path,
        seed: int,
        accelerator: Accelerator,
        display: Display,
        teacher: nn.Module | None = None,
        objectives: Mapping[str, type[Objective]] = OBJECTIVES,
    ) -> None:
        """objectives: by kind of stage."""
        self.model, self.batches, self.recipe, self.out, self.seed = model, batches, recipe, out, seed
        self.accelerator, self.display, self.objectives = accelerator, display, objectives
        self.tariff, self.teacher = Tariff(recipe.budgets), teacher
        self.score = score_name(recipe, model)
        self.checkpoint_dir = out / "checkpoints"
        self.spans = spans(recipe, batches.steps_per_epoch)
        world, rank = accelerator.num_processes, accelerator.process_index
        self.batch_size = batches.batch_size
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size} cannot be shared evenly by {world} processes")
        share = self.batch_size // world
        self.part = slice(rank * share, (rank + 1) * share)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            smoothing, classes = recipe.label_smoothing, model.num_classes
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)
        weights = {id(parameter) for parameter in model.backbone.parameters()}
        self._free = [p for p in model.parameters() if p.requires_grad and id(p) not in weights]  # beside the backbone
        self.adversary = Adversary.of(recipe, model.data_config(), accelerator.device)
        self.ema: ModelEmaV3 | None = None  # of the stage at hand
        self._stop = StopRequest()  # of this process
        self._agreed_to_stop = False  # by all processes, in the step before

    def run(self, resume: bool) -> MIAFormer:
        """Raises Interrupted after Ctrl-C, with everything saved; ValueError for a damaged checkpoint."""
        if not self.recipe.labelled:  # the backbone as it was before any stage, and its own teacher
            self.teacher = self.teacher or frozen(self.model.backbone)
        found = checkpoints(self.checkpoint_dir)[-1:] if resume else []
        start = checkpoint_step(found[0]) if found else 0
        if resume:
            goes_on = f"Resuming after step {start}."
            self.display.say(goes_on if found else "No checkpoint to resume from: starting anew.")
        main = self.accelerator.is_main_process
        metrics = MetricsFile(self.out / "metrics.jsonl", start) if main else None
        try:
            with self._stop.by_interrupt():
                for span in self.spans:
                    if span.last < start:
                        continue
                    if span.stage.kind == "probe":
                        if start < span.last:
                            self._run_probe(span, metrics)
                        continue
                    checkpoint = found[0] if span.first < start else None
                    self._run_stage(span, max(span.first, start), checkpoint, metrics)
        finally:
            self._let_learn([self.model])
            self.display.end_stage()
            if metrics is not None:
                metrics.close()
        return self.model.eval()

    def _run_probe(self, span: Span, metrics: MetricsFile | None) -> None:
        """Fit the classifier to features of the backbone as it is. A minute's work: Ctrl-C leaves nothing of it."""
        backbone = self.model.backbone.eval()
        last = min(span.last, span.first + most_batches(backbone, self.batch_size))
        self.display.start_stage("probe", last - span.first, 0, self.batch_size, self._after(span))
        duration = Duration(self.out / DURATIONS, "probe", self.accelerator.num_processes)

        def after_batch(done: int) -> None:
            self.display.step(done, {})
            if self._stop.asked:
                raise KeyboardInterrupt

        loss, accuracy = fit_on(backbone, self._batches_from(span.first, last), self.accelerator, after_batch)
        self.display.end_stage()
        self.display.say(f"Linear probe: {100 * accuracy:.1f} % of the training pictures.")
        if metrics is not None:
            metrics.write({"step": span.last, "stage": "probe", "loss": loss, "accuracy": accuracy})
            duration.write(span.last)

    def decides(self, stage: Stage) -> bool:
        return stage.kind in self.objectives and self.objectives[stage.kind].decides

    def _let_learn(self, deciders: Sequence[nn.Module]) -> None:
        """Of the parameters beside the backbone that were free before training, those of these parts alone."""
        chosen = {id(parameter) for part in deciders for parameter in part.parameters()}
        for parameter in self._free:
            parameter.requires_grad_(id(parameter) in chosen)

    def _run_stage(self, span: Span, step: int, checkpoint: Path | None, metrics: MetricsFile | None) -> None:
        stage, model = span.stage, self.model
        kind = self.objectives[stage.kind]
        deciders = kind.deciders(model)
        self._let_learn(deciders)
        if not kind.dense and self.teacher is None and self.recipe.distill_weight:
            self.teacher = frozen(model.backbone)
        optimizer = stage_optimizer(model, stage, self.recipe, deciders)
        length = span.last - span.first
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=max(2, round(length / stage.anneal)),  # one step is the same, and timm warns of it
            warmup_t=int(stage.warmup * length),
            warmup_prefix=False,
            t_in_epochs=False,
        )
        if self.recipe.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=self.recipe.ema_decay, use_warmup=True)
        objective = kind(model, stage, self.recipe, self.teacher)
        wrapped, prepared = self.accelerator.prepare(objective, optimizer)
        self.accelerator._custom_objects.clear()
        self.accelerator.register_for_checkpointing(self)
        if checkpoint is not None:
            load_checkpoint(self.accelerator, checkpoint)
        elif span.first == next((s.first for s in self.spans if self.decides(s.stage)), None):
            self._start_tariff(stage)

        running = Means()
        self.display.start_stage(stage.kind, length, step - span.first, self.batch_size, self._after(span))
        duration = Duration(self.out / DURATIONS, stage.kind, self.accelerator.num_processes)
        wrapped.train()
        for batch in self._batches_from(step, span.last):
            schedule.step_update(step - span.first)
            values = self._step(wrapped, prepared, stage, batch, step, (step - span.first) / length)
            step += 1
            if self.ema is not None:
                self.ema.update(model, step=step - span.first)
            if metrics is not None:
                rates = {"lr": prepared.param_groups[0]["lr"]}
                metrics.write({"step": step, "stage": stage.kind, **values, **rates})
                self.accelerator.log({f"{stage.kind}/{name}": v for name, v in {**values, **rates}.items()}, step=step)
            self.display.step(step - span.first, running.update(values))
            stop = self._stop.asked if self.accelerator.num_processes == 1 else self._agreed_to_stop
            if stop or step == span.last or step % self.recipe.checkpoint_every == 0:
                saved = save_checkpoint(self.accelerator, self.checkpoint_dir, step, self.recipe.keep_checkpoints)
                if metrics is not None:
                    duration.write(step)
                if stop:
                    raise Interrupted(saved, step)
        self.display.end_stage()
        if self.ema is not None:  # a stage ends on its average
            model.load_state_dict(self.ema.module.state_dict())
            self.ema = None
        self.accelerator.free_memory()

    def _after(self, span: Span) -> list[tuple[str, int]]:
        """Kinds and steps of the stages that follow."""
        return [(other.stage.kind, other.last - other.first) for other in self.spans if other.first >= span.last]

    def _step(
        self, wrapped: nn.Module, optimizer: Any, stage: Stage, batch: Batch, step: int, progress: float
    ) -> dict[str, float]:
        """One optimiser step on this process's part of a batch; metrics over all of it."""
        device = self.accelerator.device
        seed_everything(self.seed, step, self.accelerator.process_index)
        images, labels = batch.images.to(device), batch.labels.to(device)
        if self.mixup is not None and self.objectives[stage.kind].dense and len(images) % 2 == 0:
            images, labels = self.mixup(images, labels)
        elif self.recipe.labelled:
            labels = _smooth(labels, self.model.num_classes, self.recipe.label_smoothing)
        given = self._given(
            stage, images, progress, self._generator(step, _GATES), self._generator(step, _SECOND_GATES)
        )
        log_prices = given.log_prices.requires_grad_(self.decides(stage))
        if self.adversary is not None:
            given = replace(given, clean=images)
            images = self._moved(self.adversary, wrapped, images, labels, given, step)
        with self._fast_attention():
            outcome: Outcome = wrapped(images, labels, given)
        self.accelerator.backward(outcome.loss)
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else float(scaler.get_scale())  # a step that overflows changes it
        if self.recipe.clip_grad is not None:
            self.accelerator.unscale_gradients(optimizer)
            for part in (self.model.backbone, *self.objectives[stage.kind].deciders(self.model)):  # none drowns another
                if parameters := list(part.parameters()):
                    nn.utils.clip_grad_norm_(parameters, self.recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        felt = log_prices.grad
        if felt is None or not bool(felt.isfinite().all()):  # in half precision a step may overflow, and is skipped
            felt = torch.zeros_like(log_prices)
        table = torch.stack(
            [
                outcome.task_loss,
                outcome.score,
                outcome.macs_fraction,
                outcome.full.float(),
                given.draws.budgets,
                felt.to(device) * len(images) / loss_scale,
                outcome.difficulty.float(),
                torch.full_like(outcome.task_loss, float(self._stop.asked)),
            ],
            dim=1,
        )
        table = self.accelerator.gather(table).cpu()
        self._agreed_to_stop = bool(table[:, -1].any())
        if not bool(outcome.loss.isfinite()):
            raise FloatingPointError(
                f"the loss is not finite in step {step} ({stage.kind} stage): start anew, in another directory than "
                f"{self.out}, with a lower learning rate"
                + ("" if self.recipe.precision == "no" else " or precision 'no'")
            )
        return self._account(stage, table[:, :-1])

    def _moved(
        self, adversary: Adversary, wrapped: nn.Module, images: Tensor, labels: Tensor, given: Step, step: int
    ) -> Tensor:
        """Images moved to where the loss of these sub-networks is higher. What draws from global generators meanwhile
        draws the same again when weights learn.
        """
        device = images.device
        objective = self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=True)
        start = torch.rand((self.batch_size, *images.shape[1:]), generator=self._generator(step, _START))
        devices = [] if device.type == "cpu" else [device]

        def loss(moved: Tensor) -> Tensor:
            with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
                return objective(moved, labels, given).loss

        return adversary.moved(images, loss, start[self.part].to(device))

    def _account(self, stage: Stage, table: Tensor) -> dict[str, float]:
        """Metrics of all images of a step, and the tariff's update. table: (B, 7)."""
        task, score, spent, full, budgets, felt, difficulty = table.unbind(dim=1)
        name = self.score
        values = {"loss": float(task.mean()), name: float(score.mean())}
        asked = full == 0
        if not bool(asked.any()):
            return values
        if bool(full.any()):
            values[f"{name}_full"] = float(score[~asked].mean())
        values["macs_fraction"] = float(spent[asked].mean())
        around = spent - budgets if self.decides(stage) else spent
        values["macs_std"] = float(around[asked].std(correction=0))
        values["macs_variance"] = values["macs_std"] ** 2
        if self.decides(stage):
            values["budget"] = float(budgets[asked].mean())
            values_compute = self.objectives[stage.kind].values_compute
            self.tariff.update(budgets[asked], spent[asked], felt[asked] if values_compute else None)
            self.tariff.see(difficulty)
            middle = len(self.tariff.knots) // 2
            values["log_price"] = float(self.tariff.log_price[middle])
            values["log_value"] = float(self.tariff.log_value[middle])
        return values

    def _generator(self, step: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed("step", self.seed, step, stream))

    def _given(
        self, stage: Stage, images: Tensor, progress: float, first: torch.Generator, second: torch.Generator
    ) -> Step:
        """Budgets and sub-networks for the images of a step, drawn from these generators."""
        device, draws = self.accelerator.device, self._draws(stage, images, first)
        twice = self.objectives[stage.kind].samples_twice
        other = draws.again(second, self.batch_size, self.part) if twice else draws
        start, end = stage.temperature
        return Step(
            draws.to(device),
            other.to(device),
            self.tariff.log_prices(draws.budgets),
            self.tariff.values(draws.budgets),
            self.tariff.difficulty(),
            start + (end - start) * progress,
        )

    def _draws(self, stage: Stage, images: Tensor, generator: torch.Generator) -> Draws:
        cost = self.model.cost((images.shape[-2], images.shape[-1]))
        return Draws.of_step(generator, self.batch_size, cost, stage.full_share, self.recipe.budgets, self.part)

    def _fast_attention(self) -> AbstractContextManager[None]:
        """PyTorch's fused attention on processors takes a third of a step in its bfloat16 backward pass alone: with
        plain products a step of ViT-S at 112 px takes half of the time (docs/log.md).
        """
        slow = self.accelerator.device.type == "cpu" and self.accelerator.mixed_precision == "bf16"
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()

    def _batches_from(self, step: int, last: int) -> Iterator[Batch]:
        per_epoch = self.batches.steps_per_epoch
        while step < last:
            for batch in self.batches.epoch(step // per_epoch, step % per_epoch):
                yield batch
                step += 1
                if step == last:
                    return

    @torch.no_grad()
    def _start_tariff(self, stage: Stage) -> None:
        """Find the log-prices at which untrained controllers spend the budgets, on one batch."""
        device = self.accelerator.device
        images = next(iter(self.batches.epoch(0))).images.to(device)
        cost = self.model.cost((images.shape[-2], images.shape[-1]))
        draws = self._draws(stage, images, self._generator(0, _GATES))
        draws = replace(draws, full=torch.zeros_like(draws.full)).to(device)
        self.model.eval()
        start = self.model.embed(images)

        def mean_fraction(log_price: float) -> float:
            log_prices = torch.full((len(images),), log_price, device=device)
            policy = relaxed(self.model, log_prices, draws, stage.temperature[0])
            with self.accelerator.autocast():
                _, steps = self.model.walk(start, policy, Masked(cost), cost)
            macs = steps.macs if policy.leaving is None else policy.leaving.expected_macs(steps, cost)
            mean = (macs / cost.backbone).mean()
            return float(self.accelerator.reduce(mean, reduction="mean"))

        self.tariff.start(mean_fraction)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimiser."""
        parts = {"tariff": self.tariff, "teacher": self.teacher, "ema": self.ema}
        return {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tariff.load_state_dict(state["tariff"])
        for name, part in (("teacher", self.teacher), ("ema", self.ema)):
            if state[name] is not None and part is not None:
                part.load_state_dict(state[name])


def frozen(backbone: nn.Module) -> nn.Module:
    """A copy to learn from."""
    return copy.deepcopy(backbone).requires_grad_(False).eval()


def spans(recipe: Recipe, steps_per_epoch: int) -> list[Span]:
    """The steps of each stage, of those that are to train for some time at least one."""
    result, first = [], 0
    for stage in recipe.stages:
        length = max(round(stage.epochs * steps_per_epoch), 1 if stage.epochs > 0 else 0)
        if length:
            result.append(Span(stage, first, first + length))
        first += length
    return result


def _smooth(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Soft labels (B, classes) of labels (B,)."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
