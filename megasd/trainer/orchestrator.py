"""The left half of a run, on rank 0: rows, engine, verifiers, and what is remembered from step to
step. Plain Python over groups.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megasd.actor import checkpoint
from megasd.algo.stages import at, reads_solutions, variants
from megasd.algo.state import AlgorithmState
from megasd.algo.teacher_context import with_solution
from megasd.batch.build import dataset_groups
from megasd.config.schema import AlgorithmConfig, Config, engine_dtype
from megasd.config.validate import needs_engine
from megasd.data.chat import Chat
from megasd.data.prompts import DataError, PromptIterator, load_prompts
from megasd.data.rollout_log import load_groups, rollout_path, save_groups
from megasd.engine.sampler import make_sampler
from megasd.evaluation.estimators import summarise
from megasd.rewards.reward_pool import RewardPool
from megasd.rewards.verifiers import extract_answer
from megasd.types import Group, Prompt, UserError
from megasd.weights.hf_files import read_hf_config
from megasd.weights.load import check_hf


class Orchestrator(contextlib.ExitStack):
    """Closed with the run. `rollout` and `rewards` are None where nothing samples; `prompt_ids`:
    prompt id -> token ids.
    """

    def __init__(self, config: Config, resume: Path | None) -> None:
        super().__init__()
        self.config, self.dir = config, Path(config.run.dir)
        # by phase, over a step's batches; told with them, since they may be drawn ahead
        self.seconds: Counter[str] = Counter()
        self.rewards = self.rollout = None
        # the rollout's counters, over a step's batches
        self.counted: Counter[str] = Counter()
        try:
            self._build(resume)
        except BaseException:
            self.close()
            raise

    def _build(self, resume: Path | None) -> None:
        """Hold everything that the user gave against the program, cheapest first; the engine's log
        is the first thing written.
        """
        config = self.config
        teacher = config.algorithm.teacher
        check_hf(config.model.path)
        self.chat = Chat(config.model.path, enable_thinking=config.model.enable_thinking)
        rows = load_prompts(
            config.data.train,
            max_row_bytes=config.data.max_row_bytes,
            require_solution=reads_solutions(config.algorithm),
            mapping=config.data.mapping,
        )
        self.prompts = PromptIterator(
            rows, config.rollout.num_prompts, seed=config.run.seed, shuffle=config.data.shuffle
        )
        self.memory = AlgorithmState(config.algorithm, seed=config.run.seed, steps=config.run.steps)
        self.prompt_ids = self._encode(rows, config.data.train)
        if any(one.source != "rollout" for one in variants(config.algorithm)):
            self._check_solutions(rows)
        if teacher is not None and teacher.weights == "separate":
            self._check_tokenizer(teacher.model_path)
        self.eval_rows = []
        if config.data.eval is not None:
            mapping = config.data.eval_mapping or config.data.mapping
            self.eval_rows = load_prompts(
                config.data.eval, max_row_bytes=config.data.max_row_bytes, mapping=mapping
            )
            self.eval_rows = self.eval_rows[: config.evaluation.num_prompts or None]
            self.eval_ids = self._encode(
                self.eval_rows, config.data.eval, enable_thinking=config.evaluation.enable_thinking
            )
        self.first_step = 0
        if resume is not None:
            state = checkpoint.read_state(resume, teacher_weights=teacher.weights if teacher else "live")
            self.prompts.load_state_dict(state["prompts"])
            self.memory.load_state_dict(state["memory"])
            self.first_step = state["step"]
        if config.rollout.replay_dir is not None:
            self._check_replay()
        if needs_engine(config):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            check_transport(config, device)
            self.rewards = self.enter_context(RewardPool(config.reward))
            self.rewards.check_rows(rows + self.eval_rows)
            self.rollout = make_sampler(
                config.rollout,
                model_path=config.rollout.engine.model_path or config.model.path,
                device=device,
                dtype=engine_dtype(config),
                run_dir=self.dir,
                seed=config.run.seed,
                stop_token_ids=self.chat.eos_token_ids,
                vocab_size=self.chat.vocab_size,
            )
            # entering it as a context would wait here until the engine is up
            self.callback(self.rollout.pool.close)
            # it starts while the actor is built
            self.rollout.pool.launch()

    def _encode(
        self, rows: list[Prompt], path: str, *, enable_thinking: bool | None = None
    ) -> dict[str, list[int]]:
        """Token ids of every prompt, checked before any model is loaded."""
        limit, encoded = self.config.rollout.max_prompt_tokens, {}
        for row in rows:
            ids = self.chat.encode_prompt(row.messages, enable_thinking=enable_thinking)
            if len(ids) > limit:
                raise DataError(
                    f"{path}: row {row.id!r} has {len(ids)} prompt tokens, more than"
                    f" rollout.max_prompt_tokens={limit}; raise it or drop the row"
                )
            encoded[row.id] = ids
        return encoded

    def _check_solutions(self, rows: list[Prompt]) -> None:
        """Solutions are responses to learn: they fit rollout.max_response_tokens and, read in
        context, the model.
        """
        limit, longest, nll = (
            self.config.rollout.max_response_tokens,
            model_length(self.config),
            self.config.algorithm.nll,
        )
        for row in rows:
            where, size = (
                f"{self.config.data.train}: row {row.id!r}",
                len(self.chat.encode_response(row.solution)),
            )
            if size > limit:
                raise DataError(
                    f"{where} has {size} solution tokens, more than rollout.max_response_tokens={limit};"
                    " raise it or drop the row"
                )
            if nll is not None and nll.context_fraction:
                messages = with_solution(row.messages, row.solution, template=nll.template)
                total = len(self.chat.encode_prompt(messages)) + size
                if total > longest:
                    raise DataError(
                        f"{where}: with its solution in context (algorithm.nll.context_fraction) it takes"
                        f" {total} tokens, more than the model's max_position_embeddings={longest}; drop"
                        " the row"
                    )

    def _check_tokenizer(self, path: str) -> None:
        """A separate teacher reads the student's token ids: every one of them must mean the same to it."""
        if Chat(path).tokenizer.get_vocab() != self.chat.tokenizer.get_vocab():
            raise UserError(
                f"algorithm.teacher.model_path: {path} has another tokenizer than"
                f" model.path={self.config.model.path}; the two models must share one, since the teacher"
                " scores the student's token ids"
            )

    def estimate_pass_rates(self) -> dict[str, Tensor]:
        """Before the first step: how often the start model passes each training row, if weights go
        by that (PACED 2603.11178).
        """
        weight = self.config.algorithm.question_weight
        if weight.kind == "none" or weight.pass_rate != "frozen":
            return {}
        rows = self.prompts.prompts
        missing = [row for row in rows if row.pass_rate is None]
        if missing and not self.memory.has_frozen:
            if self.first_step:
                raise UserError(
                    "algorithm.question_weight.pass_rate=frozen: the checkpoint has no pass rates of the"
                    f" start model, and its weights are those of step {self.first_step}; bring them in the"
                    " rows (pass_rate), or start a new run"
                )
            groups = self.sample(missing, [self.prompt_ids[row.id] for row in missing], 0, weight.num_samples)
            self.rewards.score(groups)
            save_groups(self.dir / "rollouts" / "pass-rates.jsonl", groups)
            self.memory.set_frozen({group.prompt.id: group.pass_rate for group in groups})
        mean = self.memory.dataset_mean(rows)
        return {} if mean is None else {"dataset_mean": torch.tensor(mean, dtype=torch.float64)}

    def _check_replay(self) -> None:
        """Every sampling step's file is there, and the first of them holds this run's prompts."""
        config, position, sampling = self.config, self.prompts.state_dict(), {}
        directory = Path(config.rollout.replay_dir) / "rollouts"
        for step in range(self.first_step, config.run.steps):
            prompts = self.prompts.next()
            if at(config.algorithm, step, config.run.steps).source != "dataset":
                sampling[step] = prompts
        self.prompts.load_state_dict(position)
        for step in sampling:
            if not rollout_path(directory, step).is_file():
                staged = (
                    f" (step {step} samples: replay a run of the same algorithm.stages)"
                    if config.algorithm.stages
                    else ""
                )
                raise UserError(
                    f"rollout.replay_dir: {rollout_path(directory, step)} is missing; lower"
                    f" run.steps={config.run.steps}{staged}"
                )
        for step, prompts in list(sampling.items())[:1]:
            self._replay(prompts, step)

    def _replay(self, prompts: list[Prompt], step: int) -> list[Group]:
        path = rollout_path(Path(self.config.rollout.replay_dir) / "rollouts", step)
        groups = load_groups(path)
        if [g.prompt.id for g in groups] != [p.id for p in prompts]:
            raise UserError(
                f"rollout.replay_dir: {path} holds other prompts than step {step} of this run; replay with"
                " the same data.train and run.seed"
            )
        return groups

    def groups(self, step: int, algorithm: AlgorithmConfig) -> tuple[list[Group], dict[str, float]]:
        config = self.config
        self.counted.clear()
        self.seconds.clear()
        # the same rows, whenever the step is run again
        choice = random.Random(f"{config.run.seed}/{step}")
        if algorithm.source == "dataset":
            prompts, nll = self.prompts.next(), algorithm.nll
            with_context = [nll is not None and choice.random() < nll.context_fraction for _ in prompts]
            return dataset_groups(prompts, algorithm, self.chat, with_context), {}
        if config.rollout.replay_dir is not None:
            groups = self._replay(self.prompts.next(), step)
            return groups, group_metrics(groups)
        if algorithm.source == "mixed":
            prompts = self.prompts.next()
            given = {p.id for p in prompts if choice.random() < algorithm.dataset_fraction}
            sampled = self._sample_and_score([p for p in prompts if p.id not in given], step)
            learned = dataset_groups(
                [p for p in prompts if p.id in given], algorithm, self.chat, [False] * len(given)
            )
            by_id = {group.prompt.id: group for group in sampled + learned}
            # minibatches are cut in this order
            groups = [by_id[p.id] for p in prompts]
            figures = group_metrics(sampled) | {"rollout/dataset_questions": float(len(given))}
        else:
            groups, figures = self._dynamic(step) if config.rollout.dynamic_sampling else self._plain(step)
        save_groups(rollout_path(self.dir / "rollouts", step), groups)
        figures |= {f"seconds/{phase}": value for phase, value in self.seconds.items()}
        return groups, figures | {f"rollout/{name}": float(value) for name, value in self.counted.items()}

    def _plain(self, step: int) -> tuple[list[Group], dict[str, float]]:
        groups = self._sample_and_score(self.prompts.next(), step)
        return groups, group_metrics(groups)

    def _dynamic(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """DAPO (2503.14476): questions until num_prompts of them are informative. Where
        rollout.max_batches end that, others fill up.
        """
        kept, spare, batches = [], [], 0
        while len(kept) < self.config.rollout.num_prompts and batches < self.config.rollout.max_batches:
            batches += 1
            for group in self._sample_and_score(self.prompts.next(), step):
                (kept if group.pass_rate is not None and 0 < group.pass_rate < 1 else spare).append(group)
        groups, surplus = (
            (kept + spare)[: self.config.rollout.num_prompts],
            (kept + spare)[self.config.rollout.num_prompts :],
        )
        path = self.dir / "rollouts" / f"surplus-step-{step:06d}.jsonl"
        # of the same step, drawn before a resume
        path.unlink(missing_ok=True)
        if surplus:
            save_groups(path, surplus)
        figures = {"rollout/batches": float(batches), "rollout/surplus_questions": float(len(surplus))}
        # the pass rate is that of all questions asked
        return groups, group_metrics(kept + spare) | figures

    def _sample_and_score(self, prompts: list[Prompt], step: int) -> list[Group]:
        if not prompts:
            return []
        with self.timed("rollout"):
            groups = self.sample(
                prompts, [self.prompt_ids[p.id] for p in prompts], step, self.config.rollout.num_samples
            )
        self.counted.update(self.rollout.stats)
        with self.timed("reward"):
            self.rewards.score(groups)
        return groups

    def sample(
        self, prompts: list[Prompt], prompt_ids: list[list[int]], step: int, num_samples: int
    ) -> list[Group]:
        """Training samples of the current weights."""
        rollout = self.config.rollout
        return self.rollout.generate(
            prompts,
            prompt_ids,
            self.chat.decode,
            step=step,
            num_samples=num_samples,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_response_tokens=rollout.max_response_tokens,
        )

    def evaluate(self, step: int) -> dict[str, float]:
        config = self.config
        groups = self.rollout.generate(
            self.eval_rows,
            [self.eval_ids[p.id] for p in self.eval_rows],
            self.chat.decode,
            step=step,
            num_samples=config.evaluation.num_samples,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
            max_response_tokens=config.evaluation.max_response_tokens or config.rollout.max_response_tokens,
            top_k=config.evaluation.top_k,
        )
        self.rewards.score(groups)
        save_groups(self.dir / "rollouts" / f"eval-step-{step:06d}.jsonl", groups)
        return summarise(groups, lambda text: extract_answer(config.reward.verifier, text))

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def check_transport(config: Config, device: str) -> None:
    """UserError for a process group over engines that the run starts on its own GPUs: NCCL refuses
    two ranks on one, and the first of them has that of rank 0.
    """
    engine = config.rollout.engine
    if device == "cuda" and config.sync.transport == "group" and not engine.urls and not engine.served:
        raise UserError(
            "sync.transport=group: the run's engines start on the trainer's GPUs, and NCCL refuses two ranks"
            " on one; set sync.transport=colocated, or have the engines elsewhere (rollout.engine.served,"
            " rollout.engine.urls)"
        )


def model_length(config: Config) -> int:
    """Tokens of the longest sequence that the model can take, and a separate teacher too."""
    teacher = config.algorithm.teacher
    paths = [
        config.model.path,
        *([teacher.model_path] if teacher is not None and teacher.weights == "separate" else []),
    ]
    return min(int(read_hf_config(path)["max_position_embeddings"]) for path in paths)


def group_metrics(groups: list[Group]) -> dict[str, float]:
    """Pass rates, verdicts, finish reasons and lengths of a step's groups."""
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
