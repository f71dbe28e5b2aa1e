"""`megasd eval`: sample answers of a model, score them, keep them, and say every figure with its interval.

The model is a Hugging Face directory, a run's Megatron checkpoint (converted for the while), or a
running engine as it stands. Written to --out: samples.jsonl (every sample, as a run's rollouts),
eval.json (how they were made), metrics.json, engine.log. `--recompute DIR` reads the first two
again and needs no model.

What is reproducible: with temperature 0 every answer, as far as the engine computes alike for other
batches (fp32 on a CPU did). Otherwise the prompts, their order and the engine's --random-seed are
fixed, but SGLang draws from one stream as requests arrive: figures repeat within their intervals,
answers do not. --deterministic gives each sample its own seed and the engine
--enable-deterministic-inference: GPU only, because SGLang 0.5.23 ignores sampling_seed on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megasd.config.schema import EngineConfig, RewardConfig, RolloutConfig
from megasd.data.chat import Chat
from megasd.data.prompts import load_prompts
from megasd.data.rollout_log import load_groups, save_groups
from megasd.engine.sampler import Params, Sampler, make_sampler, same_params
from megasd.evaluation.engine_for import ServedWeights
from megasd.evaluation.estimators import COVERAGE, NUM_RESAMPLES, default_ks, metrics_with_intervals
from megasd.evaluation.presets import PRESETS
from megasd.rewards.reward_pool import RewardPool
from megasd.rewards.verifiers import extract_answer, find_verifier
from megasd.types import Group, Prompt, UserError, Verdict
from megasd.weights.hf_files import read_hf_config

SAMPLES, SETTINGS, METRICS = "samples.jsonl", "eval.json", "metrics.json"
# or what the model has room for, where that is less
DEFAULT_RESPONSE_TOKENS = 8192
NOT_SCORED = "not scored yet"


def run(args: argparse.Namespace) -> None:
    """The command (commands/parser.py has its options). UserError for whatever is refused."""
    if args.recompute:
        return recompute(args)
    if not args.source:
        raise UserError(
            "eval: no SOURCE; give a Hugging Face directory, a Megatron checkpoint or an engine URL, or"
            " --recompute DIR"
        )
    if args.harness:
        from megasd.commands.lm_eval import run_harness

        return run_harness(args, model_directory)
    for name in ("data", "verifier", "out"):
        if getattr(args, name) is None:
            raise UserError(f"eval: --{name} is missing; see megasd eval --help")
    started = time.perf_counter()
    out = Path(args.out)
    if (out / SAMPLES).exists() and not args.overwrite:
        raise UserError(
            f"--out: {out} holds an evaluation; give another directory, --overwrite, or --recompute {out}"
        )
    prompts = load_prompts(args.data, **({} if args.mapping is None else {"mapping": args.mapping}))
    prompts = prompts[: args.limit or None]
    decoding = decoding_of(args)
    reward = reward_config(args)
    with RewardPool(reward) as rewards:
        rewards.check_rows(prompts)
        with model_directory(args.source, args.model, convert=not args.dry_run) as model:
            groups = _sample(args, model, prompts, decoding, out) if model else None
        if groups is None:
            _print_plan(args, prompts, decoding, reward)
            return
        settings = {
            "source": args.source,
            "data": args.data,
            "verifier": asdict(reward),
            "decoding": decoding,
            "preset": args.preset,
            "num_samples": args.num_samples,
            "seed": args.seed,
            "deterministic": args.deterministic,
        }
        _write_json(out / SETTINGS, settings)
        for sample in (s for g in groups for s in g.samples):
            sample.verdict, sample.detail = Verdict.ERROR, NOT_SCORED
        # a verifier that is stopped loses no sample: --recompute scores them
        save_groups(out / SAMPLES, groups)
        rewards.score(groups)
    save_groups(out / SAMPLES, groups)
    write_results(out, groups, settings, ks_of(args, args.num_samples), time.perf_counter() - started)


def recompute(args: argparse.Namespace) -> None:
    """Figures of kept samples; with --verifier their verdicts too. Written to --out, or where the
    samples are.
    """
    directory = Path(args.recompute)
    for name in (SAMPLES, SETTINGS):
        if not (directory / name).is_file():
            raise UserError(
                f"--recompute: {directory / name} is missing; give the --out directory of an evaluation"
            )
    started = time.perf_counter()
    settings = json.loads((directory / SETTINGS).read_text())
    groups = load_groups(directory / SAMPLES)
    out = Path(args.out or directory)
    unscored = any(s.detail == NOT_SCORED for g in groups for s in g.samples)
    if args.verifier is not None or unscored:
        reward = reward_config(args) if args.verifier else RewardConfig(**settings["verifier"])
        settings["verifier"] = asdict(reward)
        with RewardPool(reward) as rewards:
            rewards.check_rows([g.prompt for g in groups])
            rewards.score(groups)
    if args.verifier is not None or unscored or out != directory:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / SETTINGS, settings)
        save_groups(out / SAMPLES, groups)
    write_results(out, groups, settings, ks_of(args, settings["num_samples"]), time.perf_counter() - started)


# ---- what is asked ----


def decoding_of(args: argparse.Namespace) -> dict[str, Any]:
    """temperature, top_p, top_k, max_response_tokens (None: what the model has room for), thinking:
    the preset's, then the options'.
    """
    preset = PRESETS[args.preset] if args.preset else None
    found = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_response_tokens": None, "thinking": None}
    for name in found:
        if preset is not None:
            found[name] = getattr(preset, name)
        if getattr(args, name) is not None:
            found[name] = getattr(args, name)
    if (
        found["temperature"] < 0
        or not 0 < found["top_p"] <= 1
        or (found["top_k"] < 1 and found["top_k"] != -1)
    ):
        raise UserError(
            "eval: --temperature must be 0 or more, --top-p within (0, 1], --top-k 1 or more (-1: off)"
        )
    return found


def reward_config(args: argparse.Namespace) -> RewardConfig:
    config = RewardConfig(verifier=args.verifier)
    for option, name in (
        ("verifier_workers", "workers"),
        ("verifier_timeout", "timeout"),
        ("rubric_threshold", "rubric_threshold"),
    ):
        if getattr(args, option) is not None:
            setattr(config, name, getattr(args, option))
    return config


def ks_of(args: argparse.Namespace, num_samples: int) -> list[int]:
    """--k, or 1, 2, 4, ... num_samples."""
    if args.k is None:
        return default_ks(num_samples)
    try:
        ks = sorted({int(part) for part in args.k.split(",")})
    except ValueError as error:
        raise UserError(f"--k: {args.k!r} is no list of numbers; write 1,4,16") from error
    if ks[0] < 1 or ks[-1] > num_samples:
        raise UserError(f"--k: {args.k} must lie between 1 and the {num_samples} samples a question")
    return ks


@contextlib.contextmanager
def model_directory(source: str, model: str | None, *, convert: bool = True) -> Iterator[Path | None]:
    """The Hugging Face directory of SOURCE: itself, --model of a URL, or a conversion that lives as
    long as this. None if not `convert`.
    """
    if is_url(source):
        if model is None:
            raise UserError(
                f"{source}: give --model DIR, the Hugging Face directory whose model it serves (for the"
                " tokenizer)"
            )
        yield Path(model) if convert else None
        return
    if model is not None:
        raise UserError("--model belongs to an engine URL; a directory brings its own tokenizer")
    from megasd.commands.convert import direction_of

    path = Path(source)
    megatron = direction_of(path) == "hf"
    if not convert or not megatron:
        yield path if convert else None
        return
    from megasd.convert.common import ConversionOptions, ConversionProgress
    from megasd.convert.megatron_to_hf import to_hf

    with tempfile.TemporaryDirectory(prefix="megasd-eval-", dir=os.environ.get("TMPDIR")) as folder:
        target = Path(folder) / "hf"
        to_hf(path, target, ConversionOptions(), ConversionProgress())
        yield target


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


# ---- sampling ----


def _sample(
    args: argparse.Namespace, model: Path, prompts: list[Prompt], decoding: dict[str, Any], out: Path
) -> list[Group]:
    """Groups without verdicts. Settles decoding["max_response_tokens"]."""
    chat = Chat(model, enable_thinking=decoding["thinking"])
    prompt_ids = [chat.encode_prompt(prompt.messages) for prompt in prompts]
    _fit(decoding, model, prompts, prompt_ids)
    out.mkdir(parents=True, exist_ok=True)
    with open_eval_engine(args, model, chat, decoding, out) as engine:
        return engine.generate(
            prompts,
            prompt_ids,
            chat.decode,
            step=0,
            num_samples=args.num_samples,
            temperature=decoding["temperature"],
            top_p=decoding["top_p"],
            max_response_tokens=decoding["max_response_tokens"],
        )


def _fit(decoding: dict[str, Any], model: Path, prompts: list[Prompt], prompt_ids: list[list[int]]) -> None:
    """Choose max_response_tokens where nobody did; refuse one that the model has no room for."""
    longest = int(read_hf_config(str(model))["max_position_embeddings"])
    row = max(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
    room = longest - len(prompt_ids[row])
    if decoding["max_response_tokens"] is None:
        # SGLang keeps two positions for itself
        decoding["max_response_tokens"] = max(1, min(DEFAULT_RESPONSE_TOKENS, room - 2))
    elif decoding["max_response_tokens"] > room:
        raise UserError(
            f"--max-response-tokens {decoding['max_response_tokens']}: row {prompts[row].id!r} has"
            f" {len(prompt_ids[row])} prompt tokens and the model's max_position_embeddings is {longest};"
            f" give {max(room, 0)} or less"
        )


def open_eval_engine(
    args: argparse.Namespace, model: Path, chat: Chat, decoding: dict[str, Any], out: Path
) -> Sampler:
    """The given URL as it stands, or a server started on `model`, in the dtype of its config.json
    (fp32 for fp32, else bfloat16).
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    url = is_url(args.source)
    if args.deterministic and device == "cpu" and not url:
        raise UserError(
            "--deterministic: SGLang 0.5.23 ignores sampling seeds on a CPU; leave it out, or use"
            " --temperature 0"
        )
    hf = read_hf_config(str(model))
    float32 = "float32" in (hf.get("dtype"), hf.get("torch_dtype"))
    engine = EngineConfig(
        urls=[args.source] if url else [],
        tensor_parallel_size=args.tensor_parallel_size,
        max_total_tokens=args.max_total_tokens,
        extra_args=["--enable-deterministic-inference"] if args.deterministic and not url else [],
    )
    config = RolloutConfig(top_k=decoding["top_k"], max_concurrency=args.max_concurrency, engine=engine)
    return make_sampler(
        config,
        model_path=str(model),
        device=device,
        dtype="float32" if float32 else "bfloat16",
        run_dir=out,
        seed=args.seed,
        stop_token_ids=chat.eos_token_ids,
        vocab_size=chat.vocab_size,
        make_target=ServedWeights,
        params_of=SampleSeeds(args.seed % 2**31) if args.deterministic else same_params,
    )


class SampleSeeds:
    """Gives every sample a sampling_seed of its own: of the run's seed, the prompt, and how often that
    prompt was sampled before.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._times: Counter[str] = Counter()

    def __call__(self, batch_ids: list[list[int]], params: Params) -> list[Params]:
        """One dict of SGLang's sampling_params a prompt of the batch."""
        found = []
        for ids in batch_ids:
            name = json.dumps(ids)
            digest = hashlib.sha256(f"{self.seed}/{self._times[name]}/{name}".encode()).digest()
            found.append(params | {"sampling_seed": int.from_bytes(digest[:4], "big") >> 1})
            self._times[name] += 1
        return found


def _print_plan(
    args: argparse.Namespace, prompts: list[Prompt], decoding: dict[str, Any], reward: RewardConfig
) -> None:
    kind = "engine" if is_url(args.source) else "started on"
    print(f"model     {args.source} ({kind}{f', tokenizer of {args.model}' if args.model else ''})")
    print(
        f"data      {args.data}: {len(prompts)} questions x {args.num_samples} samples ="
        f" {len(prompts) * args.num_samples}"
    )
    print(
        "decoding  "
        + ", ".join(f"{name} {value}" for name, value in decoding.items())
        + f"; seed {args.seed}"
    )
    print(f"verifier  {reward.verifier}, {reward.timeout:g} s a check, {reward.workers} at once")
    print(f"writes    {args.out}: {SAMPLES}, {SETTINGS}, {METRICS}, engine.log")


# ---- figures ----


def write_results(
    out: Path, groups: list[Group], settings: dict[str, Any], ks: list[int], seconds: float
) -> None:
    """metrics.json, and the table on standard output."""
    result = measure_groups(groups, settings, ks)
    _write_json(out / METRICS, settings | result | {"seconds": round(seconds, 1)})
    print(results_table(result, settings["num_samples"]))
    print(f"{seconds:.1f} s; everything is in {out}")


def measure_groups(groups: list[Group], settings: dict[str, Any], ks: list[int]) -> dict[str, Any]:
    """{"questions", "verdicts", "no_answer", "truncated", "mean_response_tokens", "mean_score",
    "metrics", ...} of scored groups.
    """
    verifier, seed = settings["verifier"]["verifier"], settings["seed"]
    samples = [s for g in groups for s in g.samples]
    answer_of: Callable[[str], str | None] = lambda text: extract_answer(verifier, text)  # noqa: E731
    scores = [s.score for s in samples if s.score is not None]
    return {
        "questions": len(groups),
        "samples": len(samples),
        "verdicts": dict(Counter(s.verdict.value for s in samples)),
        "no_answer": sum(answer_of(s.text) is None for s in samples),
        "truncated": sum(s.finish_reason == "length" for s in samples),
        "mean_response_tokens": sum(len(s.response_ids) for s in samples) / max(1, len(samples)),
        "mean_score": sum(scores) / len(scores) if scores else None,
        "interval": {"coverage": COVERAGE, "resamples": NUM_RESAMPLES, "over": "questions", "seed": seed},
        "metrics": metrics_with_intervals(
            groups,
            answer_of if find_verifier(verifier).can_vote else None,
            ks=ks,
            num_samples=settings["num_samples"],
            seed=seed,
        ),
    }


def results_table(result: dict[str, Any], num_samples: int) -> str:
    """Plain text: a line a figure, then what was left out of which and why."""
    lines = [f"{'figure':<18}{'value':>9}{'95% interval':>19}{'questions':>11}"]
    notes = []
    for name, row in result["metrics"].items():
        figure = "none" if row["value"] is None else f"{row['value']:.2%}"
        between = "" if row["low"] is None else f"{row['low']:.2%} - {row['high']:.2%}"
        lines.append(f"{name:<18}{figure:>9}{between:>19}{row['questions']:>11}")
        if row["left_out"]:
            notes.append((len(row["left_out"]), name))
    verdicts = result["verdicts"]
    counts = ", ".join(f"{verdicts.get(name, 0)} {name}" for name in ("right", "wrong", "error", "timeout"))
    lines.append(
        f"{result['samples']} samples: {counts}; {result['no_answer']} without an answer,"
        f" {result['truncated']} cut off"
    )
    for count in sorted({count for count, _ in notes}):
        names = ", ".join(name for number, name in notes if number == count)
        lines.append(
            f"{count} of {result['questions']} questions are left out of {names}: too few of their"
            f" {num_samples} samples were scored"
        )
    if result["mean_score"] is not None:
        lines.append(f"mean score {result['mean_score']:.4f}")
    return "\n".join(lines)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(path.name + ".writing")
    writing.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(writing, path)
