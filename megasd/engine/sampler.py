"""P prompts x G samples from SGLang engines, each sample exactly once, of the weights held when it
was asked, or newer ones.

    with Rollout(config.rollout, model_path=..., device="cpu", dtype="float32", ...) as rollout:
        groups = rollout.generate(prompts, prompt_ids, chat.decode, step=0, num_samples=8, temperature=1.0, ...)
        rollout.push("runs/q/weights/1", version=1)

Synchronous outside (rank 0 calls it), asyncio inside: one event loop in one thread for the whole
run, so connections and the engine's life do not depend on a call. Between calls nothing is in
flight, and the engine sleeps while the trainer trains.

A sample's log-probs are log softmax(logits / temperature) of the sampled tokens, in nats, before
top-k and top-p (measured against transformers; with temperature 0 they are those of temperature 1).
SGLang ignores a per-request sampling_seed on CPU, so samples are reproducible only as far as the
engine's --random-seed and the order of arrival are.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megasd.config.schema import RolloutConfig
from megasd.engine.client import EngineError, Refused, Unreachable
from megasd.engine.pool_weights import PoolWeights
from megasd.types import Group, Prompt, Sample, UserError

T = TypeVar("T")

# Samples of one HTTP request. Short answers go many to a request (measured on 2 cores, 256 samples
# x 6 tokens: 0.56 s in requests of 128, 1.1 s one by one); long ones one to a request, so that a
# lost request loses little.
BATCH_TOKENS = 4096
MAX_BATCH = 128


@dataclass(frozen=True)
class SampleRequest:
    """One sample to be had: the index-th of a prompt, at `position` of the flat [P*G] result."""

    position: int
    prompt: Prompt
    prompt_ids: list[int]
    index: int


class Sampler(PoolWeights):
    """The engines of a run behind a synchronous facade; see the module docstring. Used by one
    thread of rank 0.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        device: str,
        dtype: str,
        run_dir: Path,
        seed: int,
        stop_token_ids: list[int],
        vocab_size: int,
    ):
        super().__init__(
            config, model_path=model_path, device=device, dtype=dtype, run_dir=run_dir, seed=seed
        )
        self.stop_token_ids, self.vocab_size = list(stop_token_ids), vocab_size
        # counters of the last generate
        self.stats: dict[str, float] = {}
        self._serial = itertools.count()
        # version that a running `generate` began with
        self._oldest: int | None = None
        # tells this run's request ids from another's on a shared server
        self._run = os.urandom(4).hex()

    # ---- requests --------------------------------------------------------------------------------

    async def _request(self, build: Callable[[], dict[str, Any]], name: str) -> list[dict[str, Any]]:
        """One batch, asked until an engine answers. `build` gives each attempt its own request ids.
        Refused (4xx) is passed on.
        """
        for attempt in itertools.count():
            engine = await self._available()
            incarnation = engine.incarnation
            body = build()
            try:
                outputs = await engine.generate(body)
            except Unreachable as error:
                self._counts["retries"] += len(body["input_ids"])
                if attempt == self.config.max_retries:
                    raise EngineError(
                        f"{name}: given up after {attempt + 1} attempts (rollout.max_retries): {error}"
                    ) from error
                for one in [engine] if self.router is None else self.engines:
                    await self._recover(one, incarnation if one is engine else one.incarnation)
                await self._back_off(attempt)
                continue
            found = [output["meta_info"]["id"] for output in outputs]
            if found != body["rid"]:
                raise EngineError(f"{name}: asked for requests {body['rid']}, {engine.url} answered {found}")
            return outputs
        raise AssertionError("unreachable")

    def _body(
        self, batch_ids: list[list[int]], sampling_params: dict[str, Any], **fields: Any
    ) -> dict[str, Any]:
        rids = [f"{self._run}-{next(self._serial)}" for _ in batch_ids]
        return {
            "rid": rids,
            "input_ids": batch_ids,
            "sampling_params": sampling_params,
            "return_logprob": True,
            **fields,
        }

    def _check_prompt(self, name: str, ids: list[int], max_response_tokens: int) -> None:
        """UserError for what SGLang would answer with a crash (a token id off the vocabulary) or
        with a shorter response (no room).
        """
        if not ids:
            raise UserError(f"{name}: the prompt is empty")
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"{name}: token id {token} is outside the vocabulary of {self.vocab_size}; is the"
                    " tokenizer this model's?"
                )
        limits = [engine.max_tokens for engine in self.engines if engine.max_tokens is not None]
        if limits and len(ids) + max_response_tokens > min(limits):
            raise UserError(
                f"{name}: {len(ids)} prompt + {max_response_tokens} response tokens exceed the engine's"
                f" {min(limits)} (context length and rollout.engine.max_total_tokens, less 2); lower"
                " max_response_tokens or drop the prompt"
            )

    # ---- generate --------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[Prompt],
        prompt_ids: list[list[int]],
        decode: Callable[[list[int]], str],
        *,
        step: int,
        num_samples: int,
        temperature: float,
        top_p: float,
        max_response_tokens: int,
        top_k: int | None = None,
    ) -> list[Group]:
        """P groups of G = num_samples samples in the prompts' order, each sample exactly once, all
        of weight version `self.version`: as it is now or, should a push go through meanwhile
        (`repush`, where training has gone on beside this), as it is then. top_k: -1 = off; None =
        config.top_k.

        Samples that an engine lost, aborted, or sampled with other weights are asked again
        (config.max_retries times; with config.allow_stale the latter are kept and say their
        version). `self.stats` then holds: samples, response_tokens, seconds, restarts, and how many
        samples were asked again or kept: retries (lost), aborted, stale.

        Raises UserError for a prompt that no engine can take, EngineError naming the
        prompt for a refusal (HTTP 4xx, never asked again) and when retries or restarts are used up.
        """
        if len(prompts) != len(prompt_ids):
            raise ValueError(f"{len(prompts)} prompts but {len(prompt_ids)} lists of prompt ids")
        self._counts = Counter(retries=0, restarts=0, aborted=0, stale=0)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            self._check_prompt(f"prompt {prompt.id}", ids, max_response_tokens)
        asks = [
            SampleRequest(p * num_samples + g, prompt, ids, g)
            for p, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for g in range(num_samples)
        ]
        sampling_params = {
            "max_new_tokens": max_response_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": self.config.top_k if top_k is None else top_k,
            "stop_token_ids": self.stop_token_ids,
        }
        if self.config.stop:
            sampling_params["stop"] = self.config.stop
        began, self._oldest = time.monotonic(), self.version
        try:
            outputs = self._call_and_serve(self._generate(asks, sampling_params, max_response_tokens))
        finally:
            self._oldest = None
            self.stats = dict(self._counts) | {"seconds": time.monotonic() - began}
        samples = [self._to_sample(ask, output, decode) for ask, output in zip(asks, outputs, strict=True)]
        self.stats |= {
            "samples": len(samples),
            "response_tokens": sum(len(sample.response_ids) for sample in samples),
        }
        return [
            Group(prompt, samples[p * num_samples : (p + 1) * num_samples])
            for p, prompt in enumerate(prompts)
        ]

    async def _generate(
        self, asks: list[SampleRequest], sampling_params: dict[str, Any], max_response_tokens: int
    ) -> list[dict[str, Any]]:
        """The raw output of every ask, in order."""
        await self._attend()
        # A batch never holds more than an engine's share, so that several engines work. A router
        # takes one sample at a time.
        share = (
            math.ceil(min(len(asks), self.config.max_concurrency) / len(self.engines))
            if self.router is None
            else 1
        )
        size = max(1, min(MAX_BATCH, BATCH_TOKENS // max_response_tokens, share))
        slots = asyncio.Semaphore(max(1, self.config.max_concurrency // size))
        results: dict[int, dict[str, Any]] = {}

        async def finish(batch: list[SampleRequest]) -> None:
            """Ask until each of the batch has an accepted output."""
            for attempt in itertools.count():
                name = f"prompt {batch[0].prompt.id}" + (
                    f" and {len(batch) - 1} more samples" if len(batch) > 1 else ""
                )
                ids = [ask.prompt_ids for ask in batch]
                try:
                    async with slots:
                        outputs = await self._request(lambda ids=ids: self._body(ids, sampling_params), name)
                except Refused as error:
                    if len(batch) == 1:
                        raise EngineError(f"{name}: {error}") from error
                    # one by one, to know which prompt it is
                    await _all(finish([ask]) for ask in batch)
                    return
                again = []
                for ask, output in zip(batch, outputs, strict=True):
                    reason = self._why_not(output)
                    if reason is None:
                        results[ask.position] = output
                    else:
                        self._counts[reason] += 1
                        again.append(ask)
                if not again:
                    return
                if attempt == self.config.max_retries:
                    raise EngineError(
                        f"prompt {again[0].prompt.id}: {reason} in each of {attempt + 1} attempts"
                        " (rollout.max_retries)"
                    )
                await self._correct_versions()
                await self._back_off(attempt)
                batch = again

        await _all(finish(asks[i : i + size]) for i in range(0, len(asks), size))
        return [results[ask.position] for ask in asks]

    def _why_not(self, output: dict[str, Any]) -> str | None:
        """The counter under which an output is asked again, None if it is accepted."""
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            return "aborted"
        versions, oldest = _versions(output), self.version if self._oldest is None else self._oldest
        if any(not oldest <= version <= self.version for version in versions):
            # a foreign stamp is not an older version
            if not self.config.allow_stale or -1 in versions:
                return "stale"
            self._counts["stale"] += 1
        return None

    def _to_sample(
        self, ask: SampleRequest, output: dict[str, Any], decode: Callable[[list[int]], str]
    ) -> Sample:
        ids, logps = _response(f"prompt {ask.prompt.id}", output)
        text = decode(ids)
        # the response ids keep a stop string, the text does not
        for stop in self.config.stop:
            text = text.split(stop, 1)[0]
        return Sample(
            prompt_id=ask.prompt.id,
            index=ask.index,
            prompt_ids=ask.prompt_ids,
            response_ids=ids,
            response_logps=logps,
            text=text,
            finish_reason=output["meta_info"]["finish_reason"]["type"],
            version=min(_versions(output)),
        )

    # ---- probes ----------------------------------------------------------------------------------

    def score(self, ids: list[int]) -> list[float]:
        """Log-probs (nats, temperature 1) of ids[1:], each given its prefix: len(ids) - 1 numbers."""
        self._check_prompt("score", ids, 0)
        params = {"max_new_tokens": 0, "temperature": 1.0}
        output = self._probe(lambda: self._body([ids], params, logprob_start_len=0), "score")
        logprobs = output["meta_info"]["input_token_logprobs"]
        # SGLang 0.5.23 labels the vocabulary's last id 0 here; the log-prob beside it is the right one.
        if len(logprobs) != len(ids) or any(
            token not in (sent, 0) for (_, token, *_), sent in zip(logprobs, ids, strict=True)
        ):
            raise EngineError(f"score: sent {len(ids)} tokens, got log-probs of {len(logprobs)} or of others")
        return [logp for logp, *_ in logprobs[1:]]

    def greedy(self, ids: list[int], n: int) -> tuple[list[int], list[float]]:
        """The most probable continuation of `ids`, at most `n` tokens (it ends with a stop token),
        and its log-probs (nats).
        """
        self._check_prompt("greedy", ids, n)
        params = {"max_new_tokens": n, "temperature": 0.0, "stop_token_ids": self.stop_token_ids}
        return _response("greedy", self._probe(lambda: self._body([ids], params), "greedy"))

    def _probe(self, build: Callable[[], dict[str, Any]], name: str) -> dict[str, Any]:
        async def probe() -> dict[str, Any]:
            await self._attend()
            return (await self._request(build, name))[0]

        output = self._call_and_serve(probe())
        if any(version != self.version for version in _versions(output)):
            raise EngineError(
                f"{name}: the engine answered with weight versions {_versions(output)}, not {self.version}"
            )
        return output


async def _all(coroutines: Any) -> None:
    """Run them together; the first error cancels the rest and is raised."""
    tasks: list[Awaitable[None]] = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _versions(output: dict[str, Any]) -> list[int]:
    """Weight versions that an output's tokens were sampled with; -1 for a stamp that is not of this project.

    A push passes through a stamp under which nothing is sampled: spans without a token say nothing.
    """
    meta = output["meta_info"]
    spans = [span for span in meta.get("weight_versions") or [] if span["end"] > span["start"]]
    stamps = [span["version"] for span in spans] or [meta["weight_version"]]
    return [int(stamp) if str(stamp).isdecimal() else -1 for stamp in stamps]


def _response(name: str, output: dict[str, Any]) -> tuple[list[int], list[float]]:
    """(token ids, log-probs), one log-prob a token or EngineError."""
    ids = output["output_ids"]
    logprobs = output["meta_info"]["output_token_logprobs"]
    if [token for _, token, *_ in logprobs] != ids:
        raise EngineError(
            f"{name}: {len(ids)} response tokens but log-probs of {len(logprobs)}, or of others"
        )
    logps = [logp for logp, *_ in logprobs]
    if not all(math.isfinite(logp) for logp in logps):
        raise EngineError(f"{name}: a response log-prob is not finite")
    return ids, logps
