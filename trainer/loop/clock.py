"""How long a run is, in optimiser steps and in work, and what falls due at a step."""

from dataclasses import dataclass

from trainer.settings.config import TrainConfig

TRAIN_WORK = 3  # cost of an image in training, in evaluations of an image; for the progress bar


@dataclass(frozen=True)
class Clock:
    """How long a run is, in optimiser steps and in work (for progress)."""

    per_epoch: int
    total_steps: int
    step_images: int
    val_images: int
    eval_interval: int

    def epoch(self, step: int) -> int:
        """The epoch that the last of `step` steps belongs to, from 0."""
        return max(step - 1, 0) // self.per_epoch

    def epoch_ends(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with this many steps."""
        return step > 0 and (step % self.per_epoch == 0 or step == self.total_steps)

    def evaluation_due(self, step: int) -> bool:
        """Every `eval_interval` epochs, and at the end."""
        every = self.per_epoch * self.eval_interval
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def save_due(self, step: int, config: TrainConfig) -> bool:
        """Every `save_interval` epochs and every `save_steps` steps."""
        whole_epochs = self.epoch_ends(step) and step // self.per_epoch % config.save_interval == 0
        return whole_epochs or (
            config.save_steps > 0 and step > 0 and step % config.save_steps == 0
        )

    def pause_due(self, step: int, config: TrainConfig) -> bool:
        """Whether anything is due: the losses must be looked at before something is written."""
        return self.epoch_ends(step) or self.evaluation_due(step) or self.save_due(step, config)

    def fraction(self, step: int, evaluating: float = 0.0) -> float:
        """Share of the run's work that is done after `step` steps and part of the evaluation that
        follows them.
        """
        every = self.per_epoch * self.eval_interval
        evaluations = max(step - 1, 0) // every + evaluating
        work = step * self.step_images * TRAIN_WORK + evaluations * self.val_images
        all_evaluations = -(-self.total_steps // every)
        total = self.total_steps * self.step_images * TRAIN_WORK + all_evaluations * self.val_images
        return min(work / total, 1.0)
