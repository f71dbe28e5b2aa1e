"""The orchestrator: where the groups of a step come from, and how they become a batch. Rank 0 only.

A step's groups are sampled from the engine and verified, read from the rollouts of an older run, or
made of the rows' own solutions. Plain Python over groups of samples.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megasd.actor import checkpoint
from megasd.algo.stages import at
from megasd.algo.state import AlgorithmState
from megasd.batch.batch import Batch
from megasd.batch.build import build_batch, dataset_groups
from megasd.config.schema import AlgorithmConfig, Config, engine_dtype
from megasd.config.validate_rollout import needs_engine
from megasd.data.prompts import PromptIterator
from megasd.data.rollout_log import load_groups, rollout_path, save_groups
from megasd.engine.sampler import Sampler, make_sampler
from megasd.evaluation.estimators import summarise
from megasd.rewards.reward_pool import RewardPool
from megasd.rewards.verifiers import extract_answer
from megasd.trainer.questions import Questions, model_length
from megasd.types import Group, Prompt, UserError

Metrics = dict[str, float]


@dataclass(frozen=True)
class SamplingCosts:
    """What sampling took: seconds by phase, and the sampler's counters. Costs of several batches add up."""

    seconds: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: SamplingCosts) -> SamplingCosts:
        # Counter's own + would drop entries that are not positive.
        seconds, counters = Counter(self.seconds), Counter(self.counters)
        seconds.update(other.seconds)
        counters.update(other.counters)
        return SamplingCosts(seconds, counters)

    def metrics(self) -> Metrics:
        """seconds/<phase>, and rollout/<counter>."""
        seconds = {f"seconds/{phase}": float(value) for phase, value in self.seconds.items()}
        return seconds | {f"rollout/{name}": float(value) for name, value in self.counters.items()}


class Orchestrator(contextlib.ExitStack):
    """Questions, engine, verifiers and the algorithm's state over steps; closed with the run.

    state: what the algorithm remembers from step to step (pass rates, controllers). first_step: the
    step that the run starts or resumes at.
    """

    def __init__(self, config: Config, resume: Path | None) -> None:
        """Check everything that the user gave, cheapest first, then start the engine in the background.

        resume: checkpoint directory to go on from. UserError for whatever cannot be used; the engine's
        log is the first file that is written.
        """
        super().__init__()
        self.config, self.run_dir = config, Path(config.run.dir)
        self._sampler: Sampler | None = None
        self._rewards: RewardPool | None = None
        try:
            self._build(resume)
        except BaseException:
            self.close()
            raise

    def _build(self, resume: Path | None) -> None:
        config = self.config
        self.questions = Questions(config)
        self.state = AlgorithmState(config.algorithm, seed=config.run.seed, steps=config.run.steps)
        self.first_step = 0
        if resume is not None:
            teacher = config.algorithm.teacher
            state = checkpoint.read_state(resume, teacher_weights=teacher.weights if teacher else "live")
            self.questions.prompts.load_state_dict(state["prompts"])
            self.state.load_state_dict(state["memory"])
            self.first_step = state["step"]
        if config.rollout.replay_dir is not None:
            check_replay(config, self.questions.prompts, first_step=self.first_step)
        if needs_engine(config):
            self._start_engine()

    def _start_engine(self) -> None:
        """Check the rows with the verifier, then start the engine; it comes up while the actor is built."""
        config, chat = self.config, self.questions.chat
        device = "cuda" if torch.cuda.is_available() else "cpu"
        check_transport(config, device)
        self._rewards = self.enter_context(RewardPool(config.reward))
        self._rewards.check_rows(self.questions.rows + self.questions.eval_rows)
        self._sampler = make_sampler(
            config.rollout,
            model_path=config.rollout.engine.model_path or config.model.path,
            device=device,
            dtype=engine_dtype(config),
            run_dir=self.run_dir,
            seed=config.run.seed,
            stop_token_ids=chat.eos_token_ids,
            vocab_size=chat.vocab_size,
        )
        # To enter the sampler as a context would wait here until the engine is up.
        self.callback(self._sampler.pool.close)
        self._sampler.pool.launch()

    @property
    def has_engine(self) -> bool:
        """True where the run samples or evaluates."""
        return self._sampler is not None

    @property
    def sampler(self) -> Sampler:
        """The requests to the engines. RuntimeError where nothing samples."""
        if self._sampler is None:
            raise RuntimeError("this run has no engine: nothing samples")
        return self._sampler

    @property
    def rewards(self) -> RewardPool:
        """The verifiers. RuntimeError where nothing samples."""
        if self._rewards is None:
            raise RuntimeError("this run has no verifiers: nothing samples")
        return self._rewards

    # ---- the groups of a step ----

    def groups(self, step: int, algorithm: AlgorithmConfig) -> tuple[list[Group], Metrics]:
        """The groups of a step and their metrics (reward/*, rollout/*, seconds/*).

        algorithm: as it stands in this step (algo/stages.py). Sampled groups are written to rollouts/.
        """
        config, questions = self.config, self.questions
        # Seeded by the step, so that a repeated step chooses the same rows.
        choice = random.Random(f"{config.run.seed}/{step}")
        if algorithm.source == "dataset":
            prompts, nll = questions.prompts.next(), algorithm.nll
            with_context = [nll is not None and choice.random() < nll.context_fraction for _ in prompts]
            return dataset_groups(prompts, algorithm, questions.chat, with_context), {}
        if config.rollout.replay_dir is not None:
            groups = replayed_groups(config.rollout.replay_dir, questions.prompts.next(), step)
            return groups, group_metrics(groups)
        if algorithm.source == "mixed":
            groups, metrics, costs = self._mixed(step, algorithm, choice)
        elif config.rollout.dynamic_sampling:
            groups, metrics, costs = self._dynamic(step)
        else:
            groups, costs = self._sample_and_score(questions.prompts.next(), step)
            metrics = group_metrics(groups)
        save_groups(rollout_path(self.run_dir / "rollouts", step), groups)
        return groups, metrics | costs.metrics()

    def _mixed(
        self, step: int, algorithm: AlgorithmConfig, choice: random.Random
    ) -> tuple[list[Group], Metrics, SamplingCosts]:
        """Some questions, chosen at random, learn their row's solution; the rest are sampled."""
        prompts = self.questions.prompts.next()
        given = {p.id for p in prompts if choice.random() < algorithm.dataset_fraction}
        sampled, costs = self._sample_and_score([p for p in prompts if p.id not in given], step)
        rows = [p for p in prompts if p.id in given]
        learned = dataset_groups(rows, algorithm, self.questions.chat, [False] * len(given))
        by_id = {group.prompt.id: group for group in sampled + learned}
        metrics = group_metrics(sampled) | {"rollout/dataset_questions": float(len(given))}
        # Minibatches are cut in the order of the prompts.
        return [by_id[p.id] for p in prompts], metrics, costs

    def _dynamic(self, step: int) -> tuple[list[Group], Metrics, SamplingCosts]:
        """Dynamic sampling (DAPO 2503.14476): sample until num_prompts questions are informative.

        After rollout.max_batches batches, questions that are not informative fill the rest. Surplus
        questions are written to a file of their own. The pass rate is that of all sampled questions.
        """
        rollout = self.config.rollout
        informative: list[Group] = []
        others: list[Group] = []
        batches, costs = 0, SamplingCosts()
        while len(informative) < rollout.num_prompts and batches < rollout.max_batches:
            batches += 1
            sampled, more = self._sample_and_score(self.questions.prompts.next(), step)
            costs = costs + more
            for group in sampled:
                is_informative = group.pass_rate is not None and 0 < group.pass_rate < 1
                (informative if is_informative else others).append(group)
        found = informative + others
        groups, surplus = found[: rollout.num_prompts], found[rollout.num_prompts :]
        path = self.run_dir / "rollouts" / f"surplus-step-{step:06d}.jsonl"
        # A run that was resumed may have left the surplus of an earlier draw of this step.
        path.unlink(missing_ok=True)
        if surplus:
            save_groups(path, surplus)
        metrics = {"rollout/batches": float(batches), "rollout/surplus_questions": float(len(surplus))}
        return groups, group_metrics(found) | metrics, costs

    def _sample_and_score(self, prompts: list[Prompt], step: int) -> tuple[list[Group], SamplingCosts]:
        """Sample rollout.num_samples answers to each prompt and verify them."""
        if not prompts:
            return [], SamplingCosts()
        start = time.perf_counter()
        groups = self._sample(prompts, step, self.config.rollout.num_samples)
        sampled = time.perf_counter()
        counters = Counter(self.sampler.stats)
        self.rewards.score(groups)
        seconds = Counter({"rollout": sampled - start, "reward": time.perf_counter() - sampled})
        return groups, SamplingCosts(seconds, counters)

    def _sample(self, prompts: list[Prompt], step: int, num_samples: int) -> list[Group]:
        """Training samples from the weights that the engine holds, not verified yet."""
        rollout = self.config.rollout
        return self.sampler.generate(
            prompts,
            [self.questions.prompt_ids[prompt.id] for prompt in prompts],
            self.questions.chat.decode,
            step=step,
            num_samples=num_samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
        )

    def build_batch(
        self, groups: list[Group], step: int, algorithm: AlgorithmConfig
    ) -> tuple[Batch, Metrics]:
        """The batch of a step, and its metrics (train/*, and those of the algorithm's state)."""
        batch, counts = build_batch(
            groups,
            algorithm,
            self.questions.chat,
            self.state,
            step=step,
            max_length=model_length(self.config),
            room=self.config.rollout.max_response_tokens,
            answer_of=self._answer_of,
        )
        metrics = self.state.observe(groups)
        return batch, metrics | {f"train/{name}": value for name, value in counts.items()}

    @property
    def _answer_of(self) -> Callable[[str], str | None]:
        """How the run's verifier reads the answer in a response."""
        verifier = self.config.reward.verifier
        return lambda text: extract_answer(verifier, text)

    # ---- pass rates of the start model, and evaluation ----

    def estimate_pass_rates(self) -> dict[str, Tensor]:
        """Before the first step: how often the start model passes each training row (PACED 2603.11178).

        Returns {"dataset_mean": float64 scalar, the mean question weight of the rows}, or {} where
        question weights do not read these rates. UserError when a checkpoint lacks the rates.
        """
        weight = self.config.algorithm.question_weight
        if weight.kind == "none" or weight.pass_rate != "frozen":
            return {}
        rows = self.questions.prompts.prompts
        missing = [row for row in rows if row.pass_rate is None]
        if missing and not self.state.has_frozen:
            if self.first_step:
                raise UserError(
                    "algorithm.question_weight.pass_rate=frozen: the checkpoint has no pass rates of the"
                    f" start model, and its weights are those of step {self.first_step}; bring them in the"
                    " rows (pass_rate), or start a new run"
                )
            groups = self._sample(missing, 0, weight.num_samples)
            self.rewards.score(groups)
            save_groups(self.run_dir / "rollouts" / "pass-rates.jsonl", groups)
            self.state.set_frozen({group.prompt.id: group.pass_rate for group in groups})
        mean = self.state.dataset_mean(rows)
        return {} if mean is None else {"dataset_mean": torch.tensor(mean, dtype=torch.float64)}

    def evaluate(self, step: int) -> Metrics:
        """Held-out metrics of the weights that the engine holds; samples go to rollouts/eval-step-*.jsonl."""
        config, rows = self.config, self.questions.eval_rows
        groups = self.sampler.generate(
            rows,
            [self.questions.eval_ids[row.id] for row in rows],
            self.questions.chat.decode,
            step=step,
            num_samples=config.evaluation.num_samples,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
            max_response_tokens=config.evaluation.max_response_tokens or config.rollout.max_response_tokens,
            top_k=config.evaluation.top_k,
        )
        self.rewards.score(groups)
        save_groups(self.run_dir / "rollouts" / f"eval-step-{step:06d}.jsonl", groups)
        return summarise(groups, self._answer_of)


def check_replay(config: Config, prompts: PromptIterator, *, first_step: int) -> None:
    """UserError unless each sampling step has its file, and the first file holds this run's prompts.

    prompts: the run's iterator, at the position of first_step; it is put back there.
    """
    directory = config.rollout.replay_dir or ""
    position, sampling = prompts.state_dict(), {}
    for step in range(first_step, config.run.steps):
        drawn = prompts.next()
        if at(config.algorithm, step, config.run.steps).source != "dataset":
            sampling[step] = drawn
    prompts.load_state_dict(position)
    for step in sampling:
        path = rollout_path(Path(directory) / "rollouts", step)
        if not path.is_file():
            staged = (
                f" (step {step} samples: replay a run of the same algorithm.stages)"
                if config.algorithm.stages
                else ""
            )
            raise UserError(
                f"rollout.replay_dir: {path} is missing; lower run.steps={config.run.steps}{staged}"
            )
    for step, drawn in list(sampling.items())[:1]:
        replayed_groups(directory, drawn, step)


def replayed_groups(directory: str, prompts: list[Prompt], step: int) -> list[Group]:
    """The groups that an older run sampled in this step. UserError when they are of other prompts."""
    path = rollout_path(Path(directory) / "rollouts", step)
    groups = load_groups(path)
    if [group.prompt.id for group in groups] != [prompt.id for prompt in prompts]:
        raise UserError(
            f"rollout.replay_dir: {path} holds other prompts than step {step} of this run; replay with"
            " the same data.train and run.seed"
        )
    return groups


def check_transport(config: Config, device: str) -> None:
    """UserError for sync.transport=group over engines on the trainer's own GPUs.

    NCCL refuses two ranks on one GPU, and the first such engine has the GPU of rank 0.
    """
    engine = config.rollout.engine
    if device == "cuda" and config.sync.transport == "group" and not engine.urls and not engine.served:
        raise UserError(
            "sync.transport=group: the run's engines start on the trainer's GPUs, and NCCL refuses two ranks"
            " on one; set sync.transport=colocated, or have the engines elsewhere (rollout.engine.served,"
            " rollout.engine.urls)"
        )


def group_metrics(groups: list[Group]) -> Metrics:
    """Pass rates, verdicts, finish reasons and response lengths of a step's groups."""
    samples = [s for g in groups for s in g.samples]
    rates = [g.pass_rate for g in groups if g.pass_rate is not None]
    verdicts = Counter(s.verdict.value for s in samples if s.verdict is not None)
    scores = [s.score for s in samples if s.score is not None]
    return {
        **({"reward/score": sum(scores) / len(scores)} if scores else {}),
        "reward/pass_rate": sum(rates) / len(rates) if rates else 0.0,
        "reward/all_right": float(sum(r == 1.0 for r in rates)),
        "reward/all_wrong": float(sum(r == 0.0 for r in rates)),
        **{f"reward/{name}": float(verdicts[name]) for name in ("right", "wrong", "error", "timeout")},
        "rollout/mean_response_tokens": sum(len(s.response_ids) for s in samples) / max(len(samples), 1),
        "rollout/truncated": float(sum(s.finish_reason == "length" for s in samples)),
    }
