"""The training loop: the algorithm box of the papers, line by line.

SC-SDPO (2605.27765) is this loop with the recipe sc_sdpo. The self-teacher of a failed sample reads
a correct sibling answer (SDPO, 2601.20802), and each question is weighted by sqrt(p (1 - p)) over
the mean of the informative questions. The loop does not know which method it runs: a method is a
row of algo/recipes.py.

Every rank runs the loop. Rank 0 alone samples, verifies and writes files (trainer/rank_zero.py).
"""

from __future__ import annotations

from megasd.config.schema import Config
from megasd.preemption import EXIT_PREEMPTED, Preempted, PreemptionSignal
from megasd.trainer.trainer import Trainer


def main(config: Config, preemption: PreemptionSignal) -> int:
    """Train up to config.run.steps, from the start model or a checkpoint; returns the exit code.

    0: done. EXIT_PREEMPTED: a signal asked the run to end, and it has saved a checkpoint. Every rank
    calls this.
    """
    with Trainer(config, preemption) as trainer:
        try:
            train(trainer, config)
            return 0
        except Preempted:
            trainer.save_preempted()
    # torchrun ends every rank as soon as one has ended: all wait until rank 0 has closed its engine.
    trainer.link.wait_for_rank_zero()
    return EXIT_PREEMPTED


def train(trainer: Trainer, config: Config) -> None:
    """All remaining steps, then the last checkpoint, the last evaluation and the export.

    P questions, G sampled answers to each. Raises Preempted between two steps or while rank 0 samples.
    """
    actor = trainer.actor
    trainer.evaluate_start_model()
    for step in range(trainer.step, config.run.steps):
        # Rank 0: P questions x G answers, verified.
        groups = trainer.generate(step)
        # Advantages, question weights and teacher contexts, sent to every rank.
        batch = trainer.build_batch(groups, step)
        # The teacher scores the answers: forward only, another context, other weights.
        with trainer.timed("teach"):
            teacher = actor.teacher_forward(batch)
        # Minibatches x epochs of optimizer steps.
        with trainer.timed("train"):
            metrics = actor.update(batch, teacher)
        trainer.after_update(step, metrics)
        # The new weights into the engines, proven there.
        trainer.push_weights(step + 1)
        # Checkpoint, evaluation and log, each when due.
        trainer.after_step(step)
    trainer.finish()
