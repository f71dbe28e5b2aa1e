"""The parts of a run, built in the order that wastes least time, and closed whatever happens.

Rank 0 holds the left half (prompts, engine, verifiers, files); every rank holds the actor. What rank 0 decides reaches the
others as tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from megasd.actor import checkpoint
from megasd.actor.actor import Actor
from megasd.actor.parallel import broadcast_tensors, init_distributed, init_model_parallel
from megasd.algo.context import with_solution
from megasd.algo.memory import Memory
from megasd.algo.schedule import at, variants
from megasd.batch import Batch, build_batch, dataset_groups
from megasd.config import AlgorithmConfig, Config
from megasd.data.chat import Chat
from megasd.data.prompts import DataError, PromptIterator, load_prompts
from megasd.data.rewards import RewardPool, extract_answer
from megasd.data.rollouts import load_groups, rollout_path, save_groups
from megasd.evaluate import summarise
from megasd.load_config import to_yaml
from megasd.metrics import MetricSink
from megasd.report import Report
from megasd.rollout.generate import Rollout
from megasd.sync import SyncError, WeightSync
from megasd.types import Group, Prompt, UserError
from megasd.validate import needs_engine
from megasd.weights.files import read_hf_config
from megasd.weights.load import check_hf

PROBE_TOKENS = 32  # length of the probe prompts that a push is verified with
REPUSH = "repush"  # what rank 0 sends instead of a result when an engine needs the weights again
LEAVE_SECONDS = 30  # that a rank waits for rank 0 to end first


class Run(contextlib.ExitStack):
    """Context manager; attributes `actor`, `sync`, `step` on every rank, the left half on rank 0 (None elsewhere)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        try:
            self._build(config)
        except BaseException:
            self.close()
            raise

    def _build(self, config: Config) -> None:
        self.config, self.started, self.dir = config, time.perf_counter(), Path(config.run.dir)
        self.step, self.before, self.pushed = 0, None, None
        self.timings: Counter[str] = Counter()
        self.chat = self.prompts = self.rewards = self.rollout = self.sink = self.report = self.memory = None
        device = init_distributed()
        self.is_first = torch.distributed.get_rank() == 0
        resume = self._resume_path()
        self.from_first(lambda: self._build_left_half(resume))
        mesh = init_model_parallel(config.actor, device, config.run.seed)
        self.actor = Actor(config, mesh)
        if resume is not None:
            state = self.actor.load(resume)
            self.step, self.before = state["step"], state["before"]
            self.actor.gate.load_state_dict(state["gate"])
        self.sync = self._build_sync(device)
        if self.sync is not None:
            self.from_first(self.rollout.wait_ready if self.is_first else dict)
        if not (config.rollout.frozen_policy and self.step):
            self.push()  # also after a resume: the engine was started from model.path
        self.from_first(lambda: self._open_run_dir(is_fresh=resume is None))
        found = self.from_first(self._estimate_pass_rates)
        self.actor.dataset_mean = float(found["dataset_mean"]) if "dataset_mean" in found else None

    def _build_left_half(self, resume: Path | None) -> None:
        """Hold everything that the user gave against the program, cheapest first; the engine's log is the first thing written."""
        config = self.config
        teacher = config.algorithm.teacher
        check_hf(config.model.path)
        self.chat = Chat(config.model.path, enable_thinking=config.model.enable_thinking)
        rows = load_prompts(
            config.data.train,
            max_row_bytes=config.data.max_row_bytes,
            require_solution=reads_solutions(config),
        )
        self.prompts = PromptIterator(rows, config.rollout.num_prompts, seed=config.run.seed, shuffle=config.data.shuffle)
        self.memory = Memory(config.algorithm, seed=config.run.seed, steps=config.run.steps)
        self.prompt_ids = self._encode(rows, config.data.train)
        if any(one.source != "rollout" for one in variants(config.algorithm)):
            self._check_solutions(rows)
        if teacher is not None and teacher.weights == "separate":
            self._check_tokenizer(teacher.model_path)
        self.eval_rows = []
        if config.data.eval is not None:
            self.eval_rows = load_prompts(config.data.eval, max_row_bytes=config.data.max_row_bytes)
            self.eval_rows = self.eval_rows[: config.evaluation.num_prompts or None]
            self.eval_ids = self._encode(self.eval_rows, config.data.eval)
        first = 0
        if resume is not None:
            state = checkpoint.read_state(resume, teacher_weights=teacher.weights if teacher else "live")
            self.prompts.load_state_dict(state["prompts"])
            self.memory.load_state_dict(state["memory"])
            first = state["step"]
        if config.rollout.replay_dir is not None and config.algorithm.source == "rollout":
            self._check_replay(first)
        if needs_engine(config):
            self.rewards = self.enter_context(RewardPool(config.reward))
            self.rollout = Rollout(
                config.rollout,
                model_path=config.rollout.engine.model_path or config.model.path,
                device="cuda" if torch.cuda.is_available() else "cpu",
                dtype=engine_dtype(config),
                run_dir=self.dir,
                seed=config.run.seed,
                stop_token_ids=self.chat.eos_token_ids,
                vocab_size=self.chat.vocab_size,
            )
            self.callback(self.rollout.close)  # entering it as a context would wait here until the engine is up
            self.rollout.launch()  # it starts while the actor is built

    def _open_run_dir(self, *, is_fresh: bool) -> None:
        """Written only now, when nothing can be refused any more: a run that never began leaves no trace, nor spoils an older one."""
        if is_fresh and self.config.run.overwrite:
            for name in ("rollouts", "checkpoints", "tensorboard", "hf", "metrics.jsonl", "summary.json"):
                path = self.dir / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        self.dir.mkdir(parents=True, exist_ok=True)
        self.sink = self.enter_context(MetricSink(self.dir, self.config.run.tensorboard, first_step=self.step))
        (self.dir / "config.yaml").write_text(to_yaml(self.config))

    def _build_sync(self, device: torch.device) -> WeightSync | None:
        """Weights go to the engine on every rank's account; None when nothing samples."""
        if not needs_engine(self.config):
            return None
        probe = self.from_first(lambda: {"probe": torch.tensor(next(iter(self.prompt_ids.values()))[:PROBE_TOKENS])})["probe"].tolist()
        return self.enter_context(
            WeightSync(
                self.actor, self.rollout, self.config.sync, self.dir,
                model_path=self.config.model.path, probes=[probe], dtype=getattr(torch, engine_dtype(self.config)), device=device,
                local_engine=not self.config.rollout.engine.urls,
            )
        )  # fmt: skip

    def _encode(self, rows: list[Prompt], path: str) -> dict[str, list[int]]:
        """Token ids of every prompt, checked before any model is loaded."""
        limit, encoded = self.config.rollout.max_prompt_tokens, {}
        for row in rows:
            ids = self.chat.encode_prompt(row.messages)
            if len(ids) > limit:
                raise DataError(
                    f"{path}: row {row.id!r} has {len(ids)} prompt tokens, more than rollout.max_prompt_tokens={limit}; "
                    "raise it or drop the row"
                )
            encoded[row.id] = ids
        return encoded

    def _check_solutions(self, rows: list[Prompt]) -> None:
        """Solutions are responses to learn: they fit rollout.max_response_tokens and, read in context, the model."""
        limit, longest, nll = self.config.rollout.max_response_tokens, model_length(self.config), self.config.algorithm.nll
        for row in rows:
            where, size = f"{self.config.data.train}: row {row.id!r}", len(self.chat.encode_response(row.solution))
            if size > limit:
                raise DataError(
                    f"{where} has {size} solution tokens, more than rollout.max_response_tokens={limit}; raise it or drop the row"
                )
            if nll is not None and nll.context_fraction:
                messages = with_solution(row.messages, row.solution, template=nll.template)
                total = len(self.chat.encode_prompt(messages)) + size
                if total > longest:
                    raise DataError(
                        f"{where}: with its solution in context (algorithm.nll.context_fraction) it takes {total} tokens, more than the "
                        f"model's max_position_embeddings={longest}; drop the row"
                    )

    def _check_tokenizer(self, path: str) -> None:
        """A separate teacher reads the student's token ids: every one of them must mean the same to it."""
        if Chat(path).tokenizer.get_vocab() != self.chat.tokenizer.get_vocab():
            raise UserError(
                f"algorithm.teacher.model_path: {path} has another tokenizer than model.path={self.config.model.path}; the two models must "
                "share one, since the teacher scores the student's token ids"
            )

    def _estimate_pass_rates(self) -> dict[str, Tensor]:
        """Rank 0, before the first step: how often the start model passes each training row, if weights go by that (PACED 2603.11178)."""
        weight = self.config.algorithm.question_weight
        if weight.kind == "none" or weight.pass_rate != "frozen":
            return {}
        rows = self.prompts.prompts
        missing = [row for row in rows if row.pass_rate is None]
        if missing and not self.memory.has_frozen:
            groups = self.sample(missing, [self.prompt_ids[row.id] for row in missing], 0, weight.num_samples)
            self.rewards.score(groups)
            save_groups(self.dir / "rollouts" / "pass-rates.jsonl", groups)
            self.memory.set_frozen({group.prompt.id: group.pass_rate for group in groups})
        mean = self.memory.dataset_mean(rows)
        return {} if mean is None else {"dataset_mean": torch.tensor(mean, dtype=torch.float64)}

    def _check_replay(self, first: int) -> None:
        """Every step's file is there, and the first of them holds this run's prompts."""
        directory = Path(self.config.rollout.replay_dir) / "rollouts"
        for step in range(first, self.config.run.steps):
            if not rollout_path(directory, step).is_file():
                raise UserError(f"rollout.replay_dir: {rollout_path(directory, step)} is missing; lower run.steps={self.config.run.steps}")
        position = self.prompts.state_dict()
        self._replay(self.prompts.next(), first)
        self.prompts.load_state_dict(position)

    def _replay(self, prompts: list[Prompt], step: int) -> list[Group]:
        path = rollout_path(Path(self.config.rollout.replay_dir) / "rollouts", step)
        groups = load_groups(path)
        if [g.prompt.id for g in groups] != [p.id for p in prompts]:
            raise UserError(
                f"rollout.replay_dir: {path} holds other prompts than step {step} of this run; replay with the same data.train and run.seed"
            )
        return groups

    def _resume_path(self) -> Path | None:
        resume = self.config.run.resume
        if resume == "auto":
            found = checkpoint.list_checkpoints(self.dir / "checkpoints")
            return found[-1] if found else None
        return None if resume == "none" else Path(resume)

    def from_first(self, work: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor]:
        """Rank 0 does `work`; every rank gets the tensors it returns. When it raises, the other ranks leave in silence after it.

        An engine that dies and is restarted meanwhile may need the weights, which is every rank's work: see `_repush`.
        """
        tensors, failure = {}, None
        if self.is_first:
            with self._serving():
                try:
                    tensors = work() or {}
                except Exception as error:
                    failure = error
        found = broadcast_tensors(tensors | {"failed": torch.tensor(failure is not None)} if self.is_first else None)
        while REPUSH in found:
            with contextlib.suppress(SyncError):  # rank 0 deals with it
                self.sync.push(version=self.step, lacking=True)
            found = broadcast_tensors(None)
        if failure is not None:
            raise failure
        if found.pop("failed"):
            _leave_after_first()
        return found

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        """While the other ranks wait in `from_first`, and only then, they can take part in a push."""
        if self.rollout is not None:
            self.rollout.repush = self._repush
        try:
            yield
        finally:
            if self.rollout is not None:
                self.rollout.repush = None

    def _repush(self) -> None:
        """Rank 0, in the middle of `from_first`: an engine came back with the start weights, and only the actor has the others."""
        broadcast_tensors({REPUSH: torch.tensor(True)})
        self.sync.push(version=self.step, lacking=True)

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The algorithm of the step to come: stages and scheduled numbers resolved."""
        return at(self.config.algorithm, self.step, self.config.run.steps)

    @property
    def samples(self) -> bool:
        """Whether the next step reads the current weights from the engine; else only an evaluation does, and pushes when it is due."""
        rollout = self.config.rollout
        return self.algorithm.source != "dataset" and rollout.replay_dir is None and not rollout.frozen_policy

    def push(self) -> dict[str, float]:
        """The actor's weights into the engine as version `step`; metrics on rank 0. Nothing to do where nothing samples, or twice."""
        if self.sync is None or self.pushed == self.step:
            return {}
        self.pushed = self.step
        try:
            return self.sync.push(version=self.step)
        except SyncError:
            if not self.is_first:
                _leave_after_first()
            raise

    # ---- what the loop calls ----

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings[phase] += time.perf_counter() - start

    def next_batch(self, step: int) -> tuple[Batch, dict[str, float]]:
        """Rank 0 samples, scores and builds the batch of a step; every rank receives it. Metrics on rank 0."""
        metrics: dict[str, float] = {}

        def build() -> dict[str, Tensor]:
            groups, figures = self._groups(step)
            batch, more = build_batch(
                groups, self.algorithm, self.chat, self.memory,
                step=step, max_length=model_length(self.config), room=self.config.rollout.max_response_tokens,
                answer_of=lambda text: extract_answer(self.config.reward.verifier, text),
            )  # fmt: skip
            figures |= self.memory.observe(groups, step)
            metrics.update(figures | {f"train/{name}": value for name, value in more.items()})
            return batch.to_tensors()

        batch = Batch.from_tensors(self.from_first(build))
        if self.samples and self.config.rollout.engine.release_memory:
            self.from_first(self.sync.release if self.is_first else dict)
            if not self.is_first:
                self.sync.release()
            self.pushed = None  # whatever the version, the next push is needed
        return batch, metrics

    def learned(self, metrics: dict[str, float]) -> None:
        """What the step says to the next ones (rank 0)."""
        if self.memory is not None:
            self.memory.after_step(metrics, self.step)

    def _groups(self, step: int) -> tuple[list[Group], dict[str, float]]:
        config, algorithm = self.config, self.algorithm
        choice = random.Random(f"{config.run.seed}/{step}")  # the same rows, whenever the step is run again
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
            groups = dataset_groups([p for p in prompts if p.id in given], algorithm, self.chat, [False] * len(given)) + sampled
            figures = group_metrics(sampled) | {"rollout/dataset_questions": float(len(given))}
        else:
            groups, figures = self._dynamic(step) if config.rollout.dynamic_sampling else self._plain(step)
        save_groups(rollout_path(self.dir / "rollouts", step), groups)
        rollout_stats = {f"rollout/{name}": float(value) for name, value in self.rollout.stats.items()}
        return groups, figures | rollout_stats

    def _plain(self, step: int) -> tuple[list[Group], dict[str, float]]:
        groups = self._sample_and_score(self.prompts.next(), step)
        return groups, group_metrics(groups)

    def _dynamic(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """DAPO (2503.14476): questions until num_prompts of them are informative. Where rollout.max_batches end that, others fill up."""
        kept, spare, batches = [], [], 0
        while len(kept) < self.config.rollout.num_prompts and batches < self.config.rollout.max_batches:
            batches += 1
            for group in self._sample_and_score(self.prompts.next(), step):
                (kept if group.pass_rate is not None and 0 < group.pass_rate < 1 else spare).append(group)
        groups, surplus = (kept + spare)[: self.config.rollout.num_prompts], (kept + spare)[self.config.rollout.num_prompts :]
        if surplus:
            save_groups(self.dir / "rollouts" / f"surplus-step-{step:06d}.jsonl", surplus)
        figures = {"rollout/batches": float(batches), "rollout/surplus_questions": float(len(surplus))}
        return groups, group_metrics(kept + spare) | figures  # the pass rate is that of all questions asked

    def _sample_and_score(self, prompts: list[Prompt], step: int) -> list[Group]:
        if not prompts:
            return []
        with self.timed("rollout"):
            groups = self.sample(prompts, [self.prompt_ids[p.id] for p in prompts], step, self.config.rollout.num_samples)
        with self.timed("reward"):
            self.rewards.score(groups)
        return groups

    def sample(self, prompts: list[Prompt], prompt_ids: list[list[int]], step: int, num_samples: int) -> list[Group]:
        """Training samples of the current weights."""
        rollout = self.config.rollout
        return self.rollout.generate(
            prompts, prompt_ids, self.chat.decode, step=step, num_samples=num_samples,
            temperature=rollout.temperature, top_p=rollout.top_p, max_response_tokens=rollout.max_response_tokens,
        )  # fmt: skip

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Held-out figures on rank 0, None elsewhere or without data.eval; samples are kept in rollouts/eval-step-*.jsonl."""
        result: dict[str, float] = {}
        if self.config.data.eval is not None:
            self.push()
            self.from_first(lambda: result.update(self._evaluate(step)))
        return result or None

    def _evaluate(self, step: int) -> dict[str, float]:
        config = self.config
        groups = self.rollout.generate(
            self.eval_rows, [self.eval_ids[p.id] for p in self.eval_rows], self.chat.decode, step=step,
            num_samples=config.evaluation.num_samples, temperature=config.evaluation.temperature, top_p=config.evaluation.top_p,
            max_response_tokens=config.evaluation.max_response_tokens or config.rollout.max_response_tokens,
        )  # fmt: skip
        self.rewards.score(groups)
        save_groups(self.dir / "rollouts" / f"eval-step-{step:06d}.jsonl", groups)
        return summarise(groups, lambda text: extract_answer(config.reward.verifier, text))

    def save(self) -> None:
        """Checkpoint at the current step; every rank calls it."""
        state = {}
        if self.is_first:
            state = {"before": self.before, "prompts": self.prompts.state_dict(), "memory": self.memory.state_dict()}
            state["gate"] = self.actor.gate.state_dict()
        self.actor.save(self.dir / "checkpoints", self.step, state)

    def summary(self, after: dict[str, float] | None, steps: int) -> dict:
        """runs/<name>/summary.json: written when the run ends."""
        keep = ("mean_at_k", "maj_at_k", "unscored_samples")
        pick = lambda figures: None if figures is None else {k: figures[k] for k in keep}  # noqa: E731
        result = {
            "before": pick(self.before),
            "after": pick(after),
            "seconds": round(time.perf_counter() - self.started, 1),
            "steps": steps,
            "commit": _commit(),
        }
        writing = self.dir / ".summary.json"
        writing.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(writing, self.dir / "summary.json")
        return result

    def open_report(self) -> Report | None:
        if not self.is_first:
            return None
        report = Report(self.config.run.steps, self.step)
        self.callback(report.close)
        return report


def reads_solutions(config: Config) -> bool:
    """Whether every training row must bring a solution."""
    stages = variants(config.algorithm)
    teachers = [one.teacher for one in stages if one.teacher is not None]
    learned = any(one.source != "rollout" for one in stages)
    return learned or any(teacher.context in ("solution", "prefix") or teacher.fallback == "solution" for teacher in teachers)


def engine_dtype(config: Config) -> str:
    """Of the engine's weights, and so of what is sent to it."""
    return config.actor.dtype if config.rollout.engine.dtype == "auto" else config.rollout.engine.dtype


def model_length(config: Config) -> int:
    """Tokens of the longest sequence that the model can take."""
    return int(read_hf_config(config.model.path)["max_position_embeddings"])


def _leave_after_first() -> NoReturn:
    """End a rank other than 0 after a failure that rank 0 reports. torchrun ends every rank when the first has gone, and rank 0 must not be
    ended before it has said why and closed its engine."""
    time.sleep(LEAVE_SECONDS)
    raise SystemExit(1)


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


def _commit() -> str | None:
    """Commit of the source tree, or None outside a repository."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None
