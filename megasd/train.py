"""The loop. Sample, verify, weigh, teach, learn, push; evaluate, save and log when due.

SC-SDPO (2605.27765) is this loop with the recipe sc_sdpo: the self-teacher of a failed sample reads
a correct sibling (SDPO, 2601.20802), questions weigh sqrt(p (1 - p)) over the mean of the
informative ones. Every rank runs it; rank 0 alone samples, verifies and writes
(trainer/trainer.py). What a method is, is in algo/recipes.py; this file does not know.
"""

from __future__ import annotations

import time

import torch

from megasd.actor.parallel import broadcast_tensors
from megasd.config.schema import Config
from megasd.preemption import EXIT_PREEMPTED, Preempted, PreemptionSignal
from megasd.trainer import throughput
from megasd.trainer.progress import result_table
from megasd.trainer.trainer import Trainer


def main(config: Config, stop: PreemptionSignal) -> int:
    """Train to config.run.steps, from the start or a checkpoint, and leave a run directory.

    Returns the exit code: 0, or EXIT_PREEMPTED when `stop` was told to leave and the run is saved.
    """
    with Trainer(config, stop) as run:
        try:
            go(run, config)
            return 0
        except Preempted:
            run.leave()
    # torchrun ends every rank when the first has gone
    broadcast_tensors({"closed": torch.tensor(True)} if run.is_first else None)
    return EXIT_PREEMPTED


def go(run: Trainer, config: Config) -> None:
    """The steps that are left, and the end. Raises Leave between two of them, or where one is sampled."""
    first = run.step
    if first == 0:
        run.before = run.evaluate(step=0)
    run.report = run.open_report()
    for step in range(first, config.run.steps):
        started = time.perf_counter()
        batch, metrics = run.next_batch(step)
        rank_batches = run.actor.shard(batch, run.algorithm)
        with run.timed("teach"):
            signals = run.actor.teacher_forward(rank_batches)
        with run.timed("train"):
            learned = run.actor.update(rank_batches, signals)
        run.learned(learned)
        run.step = step + 1
        pushed, held_out = {}, None
        try:
            with run.timed("wait"):
                run.settle()
            with run.timed("sync"):
                pushed = run.push() if run.samples else {}
            if _due(config.checkpoint.every, run.step) and run.step < config.run.steps:
                run.save()
            if _due(config.evaluation.every, run.step) and run.step < config.run.steps:
                held_out = run.evaluate(run.step)
        finally:
            # what was learned is logged, whatever becomes of what follows it
            log(
                run,
                step,
                metrics | learned_metrics(learned) | pushed,
                held_out,
                time.perf_counter() - started,
            )
    finish(run, first)


def learned_metrics(learned: dict[str, float]) -> dict[str, float]:
    """The actor's figures under the names of the log."""
    renamed = {"informative_questions": "weight/informative_questions", "mean_question_weight": "weight/mean"}
    return {renamed.get(name, f"train/{name}"): value for name, value in learned.items()}


def log(
    run: Trainer, step: int, metrics: dict[str, float], held_out: dict[str, float] | None, seconds: float
) -> None:
    """One line of metrics.jsonl and of the screen, on rank 0."""
    timings = {f"seconds/{phase}": value for phase, value in run.timings.items()} | {"seconds/step": seconds}
    run.timings.clear()
    if not run.is_first:
        return
    speed = throughput.speed(
        metrics | timings, seconds, run.actor.mesh.world_size, throughput.peak_of(run.config.actor)
    )
    evaluation = {f"eval/{name}": value for name, value in (held_out or {}).items()}
    run.sink.log(step, metrics | timings | speed | evaluation)
    run.report.step(step, metrics | timings | speed)
    if held_out:
        run.report.line(
            f"held-out after step {step + 1}: mean@k {held_out['mean_at_k']:.1%}, maj@k"
            f" {held_out['maj_at_k']:.1%}"
        )


def finish(run: Trainer, first: int) -> None:
    """Last checkpoint, final evaluation, Hugging Face export, summary and table."""
    config = run.config
    if (config.checkpoint.save_at_end or _due(config.checkpoint.every, run.step)) and run.step > first:
        run.save()
    after = run.evaluate(run.step)
    if config.run.export:
        run.actor.export_hf(run.dir / "hf")
    if not run.is_first:
        return
    summary = run.summary(after, config.run.steps)
    run.report.close()
    if after is not None and run.before is not None:
        print(result_table(run.before, after, config.evaluation.num_samples))
    print(f"{config.run.steps} steps, {summary['seconds']:.0f} s; everything is in {run.dir}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
