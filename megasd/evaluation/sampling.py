"""Sample the answers of an evaluation from a started engine, or from a running one as it stands."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.data.chat import Chat
from megasd.engine.requester import Params, same_params
from megasd.engine.sampler import Sampler, make_sampler
from megasd.evaluation.engine_for import ServedWeights
from megasd.types import Group, Prompt, UserError, is_url
from megasd.weights.hf_files import read_hf_config

# bound of a response (tokens) when the user gives none; a model with less room has a lower one
DEFAULT_RESPONSE_TOKENS = 8192


@dataclass(frozen=True)
class Decoding:
    """How answers are sampled."""

    # 0 = greedy
    temperature: float = 1.0
    top_p: float = 1.0
    # -1 = off
    top_k: int = -1
    # None = what the model has room for, at most DEFAULT_RESPONSE_TOKENS
    max_response_tokens: int | None = None
    # enable_thinking of the chat template; None = the template decides
    thinking: bool | None = None


@dataclass(frozen=True)
class EvalEngine:
    """The engine of an evaluation. The fields after `source` are those of a started engine."""

    # Hugging Face directory, Megatron checkpoint, or URL of a running server
    source: str
    seed: int
    # every sample has a sampling seed of its own
    deterministic: bool
    tensor_parallel_size: int
    # KV pool (tokens)
    max_total_tokens: int
    # requests in flight
    max_concurrency: int


def sample_groups(
    engine: EvalEngine,
    model: Path,
    prompts: list[Prompt],
    decoding: Decoding,
    *,
    num_samples: int,
    out: Path,
) -> tuple[list[Group], Decoding]:
    """Sample `num_samples` answers to every prompt; return the groups and the decoding used.

    The groups have no verdicts. The decoding that is returned has a number as max_response_tokens.
    model: Hugging Face directory of the tokenizer. UserError when a prompt leaves no room.
    """
    chat = Chat(model, enable_thinking=decoding.thinking)
    prompt_ids = [chat.encode_prompt(prompt.messages) for prompt in prompts]
    tokens = _response_tokens(decoding, model, prompts, prompt_ids)
    out.mkdir(parents=True, exist_ok=True)
    with open_eval_engine(engine, model, chat, decoding, out) as sampler:
        groups = sampler.generate(
            prompts,
            prompt_ids,
            chat.decode,
            step=0,
            num_samples=num_samples,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_response_tokens=tokens,
        )
    return groups, replace(decoding, max_response_tokens=tokens)


def _response_tokens(
    decoding: Decoding, model: Path, prompts: list[Prompt], prompt_ids: list[list[int]]
) -> int:
    """The bound of a response (tokens). UserError for a bound that the model has no room for."""
    longest = int(read_hf_config(str(model))["max_position_embeddings"])
    row = max(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    room = longest - len(prompt_ids[row])
    if decoding.max_response_tokens is None:
        # SGLang keeps two positions for itself.
        return max(1, min(DEFAULT_RESPONSE_TOKENS, room - 2))
    if decoding.max_response_tokens > room:
        raise UserError(
            f"--max-response-tokens {decoding.max_response_tokens}: row {prompts[row].id!r} has"
            f" {len(prompt_ids[row])} prompt tokens and the model's max_position_embeddings is {longest};"
            f" give {max(room, 0)} or less"
        )
    return decoding.max_response_tokens


def open_eval_engine(choice: EvalEngine, model: Path, chat: Chat, decoding: Decoding, out: Path) -> Sampler:
    """Open the engine, a context manager: the URL as it stands, or a server started on `model`.

    A started server computes in float32 if the model's config.json says so, else in bfloat16. Its
    log is out/engine.log.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    url = is_url(choice.source)
    if choice.deterministic and device == "cpu" and not url:
        raise UserError(
            "--deterministic: SGLang 0.5.23 ignores sampling seeds on a CPU; leave it out, or use"
            " --temperature 0"
        )
    hf = read_hf_config(str(model))
    float32 = "float32" in (hf.get("dtype"), hf.get("torch_dtype"))
    engine = EngineConfig(
        urls=[choice.source] if url else [],
        tensor_parallel_size=choice.tensor_parallel_size,
        max_total_tokens=choice.max_total_tokens,
        extra_args=["--enable-deterministic-inference"] if choice.deterministic and not url else [],
    )
    config = RolloutConfig(top_k=decoding.top_k, max_concurrency=choice.max_concurrency, engine=engine)
    return make_sampler(
        config,
        model_path=str(model),
        device=device,
        dtype="float32" if float32 else "bfloat16",
        run_dir=out,
        seed=choice.seed,
        stop_token_ids=chat.eos_token_ids,
        vocab_size=chat.vocab_size,
        make_target=ServedWeights,
        params_of=SampleSeeds(choice.seed % 2**31) if choice.deterministic else same_params,
    )


class SampleSeeds:
    """Gives every sample a sampling_seed of its own.

    The seed depends on the seed of the evaluation, on the prompt, and on how often that prompt was
    sampled before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._times: Counter[str] = Counter()

    def __call__(self, batch_ids: list[list[int]], params: Params) -> list[Params]:
        """Return SGLang's sampling_params of a batch: a dict for each prompt."""
        found = []
        for ids in batch_ids:
            name = json.dumps(ids)
            digest = hashlib.sha256(f"{self.seed}/{self._times[name]}/{name}".encode()).digest()
            found.append(params | {"sampling_seed": int.from_bytes(digest[:4], "big") >> 1})
            self._times[name] += 1
        return found
