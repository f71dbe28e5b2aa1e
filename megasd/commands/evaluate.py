"""`megasd eval`: sample answers of a model, score and keep them, print metrics with intervals.

The model is a Hugging Face directory, a Megatron checkpoint of a run (converted into a temporary
directory), or a running engine as it stands. Written to --out: samples.jsonl (every sample, in the
form of a run's rollouts), eval.json (how they were made), metrics.json, engine.log. `--recompute
DIR` reads the first two again and needs no model.

What is reproducible: with temperature 0 every answer, if the results of the engine do not depend on
the batch (fp32 on a CPU: they did not). With another temperature the prompts, their order and the
engine's --random-seed are fixed, but SGLang draws from one stream as requests arrive: metrics
repeat within their intervals, answers do not. --deterministic gives each sample a seed of its own,
and starts the engine with --enable-deterministic-inference. It works on a GPU only, because SGLang
0.5.23 ignores sampling_seed on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from megasd.commands.lm_eval import HarnessOptions, run_harness
from megasd.commands.parser import Parser, SubCommands, positive, start_with
from megasd.commands.quiet import quiet_libraries
from megasd.config.schema import RewardConfig
from megasd.evaluation.estimators import default_ks
from megasd.evaluation.presets import PRESETS
from megasd.types import UserError, Verdict, is_url

if TYPE_CHECKING:
    from megasd.evaluation.sampling import Decoding, EvalEngine
    from megasd.types import Prompt

# detail of a sample that was kept before it was scored
NOT_SCORED = "not scored yet"


@dataclass(frozen=True)
class Options:
    """The options of `megasd eval SOURCE`; `add_parser` says what each does."""

    engine: EvalEngine
    # Hugging Face directory of what a URL serves; None without a URL
    model: str | None
    data: str
    mapping: str
    # number of questions; None = all
    limit: int | None
    reward: RewardConfig
    out: Path
    num_samples: int
    # k of pass@k, as in "1,4,16"; None = 1, 2, 4, ...
    k: str | None
    preset: str | None
    decoding: Decoding
    overwrite: bool
    dry_run: bool

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Options:
        """The options that were parsed. UserError for options that are missing or wrong."""
        from megasd.evaluation.sampling import EvalEngine

        for name in ("data", "verifier", "out"):
            if getattr(args, name) is None:
                raise UserError(f"eval: --{name} is missing; see megasd eval --help")
        return cls(
            engine=EvalEngine(
                source=args.source,
                seed=args.seed,
                deterministic=args.deterministic,
                tensor_parallel_size=args.tensor_parallel_size,
                max_total_tokens=args.max_total_tokens,
                max_concurrency=args.max_concurrency,
            ),
            model=args.model,
            data=args.data,
            mapping=args.mapping or "auto",
            limit=args.limit,
            reward=reward_config(args),
            out=Path(args.out),
            num_samples=args.num_samples,
            k=args.k,
            preset=args.preset,
            decoding=decoding_of(args),
            overwrite=args.overwrite,
            dry_run=args.dry_run,
        )


@dataclass(frozen=True)
class RecomputeOptions:
    """The options of `megasd eval --recompute DIR`."""

    # --out of the evaluation that is read
    directory: Path
    # where the metrics are written
    out: Path
    # the verifier that scores the samples again; None = the verdicts stay
    reward: RewardConfig | None
    # k of pass@k, as in "1,4,16"; None = 1, 2, 4, ...
    k: str | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RecomputeOptions:
        """The options that were parsed."""
        return cls(
            directory=Path(args.recompute),
            out=Path(args.out or args.recompute),
            reward=None if args.verifier is None else reward_config(args),
            k=args.k,
        )


def add_parser(commands: SubCommands) -> None:
    """Add `megasd eval` to the command line."""
    parser = commands.add_parser(
        "eval",
        help="measure a model on held-out questions",
        description=(
            "Sample answers, score them, keep them, and print mean@k, unbiased pass@k and maj@k with 95%%"
            " intervals over questions. SOURCE: a Hugging Face directory, a Megatron checkpoint of a run, or"
            " the URL of a running SGLang server, whose weights stay."
        ),
        epilog=(
            "What each figure is: megasd/evaluation/estimators.py. What is reproducible:"
            " megasd/commands/evaluate.py."
        ),
    )
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="directory, or http://host:port with --model"
    )
    _add_data_options(parser)
    _add_decoding_options(parser)
    _add_engine_options(parser)
    _add_other_options(parser)
    start_with(parser, start)


def _add_data_options(parser: Parser) -> None:
    parser.add_argument("--data", metavar="FILE", help="questions, as data.eval")
    parser.add_argument("--mapping", metavar="NAME", help="as data.mapping (default: auto)")
    parser.add_argument(
        "--verifier", choices=get_args(get_type_hints(RewardConfig)["verifier"]), help="as reward.verifier"
    )
    parser.add_argument("--out", metavar="DIR", help="where samples and metrics go")
    parser.add_argument(
        "--num-samples", type=positive, default=16, metavar="N", help="samples a question (default 16)"
    )
    parser.add_argument(
        "--k", metavar="K,K,...", help="k of pass@k and of the drawn metrics (default 1,2,4,... to N)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions only")


def _add_decoding_options(parser: Parser) -> None:
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="decoding of a paper (--list-presets); the options below win over it",
    )
    parser.add_argument("--list-presets", action="store_true", help="print the presets and stop")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = greedy (default 1)")
    parser.add_argument("--top-p", type=float, metavar="P", help="(default 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="-1 = off (default)")
    parser.add_argument(
        "--max-response-tokens", type=positive, metavar="N", help="(default: 8192, or the model's room)"
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="as model.enable_thinking (default: the template's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the engine and of the intervals (default 0)"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="a sampling seed for each sample (GPU engines)"
    )


def _add_engine_options(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="of a URL: Hugging Face directory of what it serves; nothing is sent there",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="of a started engine (default 1)",
    )
    parser.add_argument(
        "--max-total-tokens",
        type=positive,
        default=65536,
        metavar="N",
        help="KV pool of a started engine (tokens)",
    )
    parser.add_argument(
        "--max-concurrency", type=positive, default=256, metavar="N", help="requests in flight (default 256)"
    )


def _add_other_options(parser: Parser) -> None:
    parser.add_argument("--verifier-workers", type=positive, metavar="N", help="as reward.workers")
    parser.add_argument("--verifier-timeout", type=float, metavar="SECONDS", help="as reward.timeout")
    parser.add_argument("--rubric-threshold", type=float, metavar="S", help="as reward.rubric_threshold")
    parser.add_argument(
        "--recompute",
        metavar="DIR",
        help="metrics of a kept evaluation, without a model; --verifier scores it again",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the evaluation in --out")
    parser.add_argument("--dry-run", action="store_true", help="check the data, print the plan, and stop")
    parser.add_argument(
        "--harness", choices=("lm-eval",), help="run lm-evaluation-harness on the model instead"
    )
    parser.add_argument("--tasks", metavar="NAMES", help="of --harness, such as gsm8k")
    parser.add_argument("--harness-args", metavar="TEXT", help="more arguments of the harness, in one string")


def start(args: argparse.Namespace) -> int:
    """Run one of the four things that `megasd eval` does; returns 0. Raises UserError."""
    if args.list_presets:
        print("\n".join(preset_lines()))
        return 0
    quiet_libraries()
    if args.recompute:
        recompute(RecomputeOptions.from_args(args))
    elif not args.source:
        raise UserError(
            "eval: no SOURCE; give a Hugging Face directory, a Megatron checkpoint or an engine URL, or"
            " --recompute DIR"
        )
    elif args.harness:
        run_harness(HarnessOptions.from_args(args))
    else:
        run(Options.from_args(args))
    return 0


def preset_lines() -> list[str]:
    """Two lines for each preset: its values, then its source."""
    lines = []
    for name, preset in PRESETS.items():
        values = ", ".join(f"{key} {value}" for key, value in asdict(preset).items() if key != "source")
        lines += [f"{name:<16}{values}", f"{'':<16}{preset.source}"]
    return lines


def run(options: Options) -> None:
    """Sample, score, keep and measure; with --dry-run only check and print the plan."""
    from megasd.commands.model_directory import model_directory
    from megasd.data.prompts import load_prompts
    from megasd.data.rollout_log import save_groups
    from megasd.evaluation.results import SAMPLES, SETTINGS, write_json, write_results
    from megasd.evaluation.sampling import sample_groups
    from megasd.rewards.reward_pool import RewardPool

    started, out = time.perf_counter(), options.out
    if (out / SAMPLES).exists() and not options.overwrite:
        raise UserError(
            f"--out: {out} holds an evaluation; give another directory, --overwrite, or --recompute {out}"
        )
    prompts = load_prompts(options.data, mapping=options.mapping)[: options.limit]
    with RewardPool(options.reward) as rewards:
        rewards.check_rows(prompts)
        with model_directory(options.engine.source, options.model, convert=not options.dry_run) as model:
            if model is None:
                print("\n".join(plan_lines(options, prompts)))
                return
            groups, decoding = sample_groups(
                options.engine, model, prompts, options.decoding, num_samples=options.num_samples, out=out
            )
        settings = {
            "source": options.engine.source,
            "data": options.data,
            "verifier": asdict(options.reward),
            "decoding": asdict(decoding),
            "preset": options.preset,
            "num_samples": options.num_samples,
            "seed": options.engine.seed,
            "deterministic": options.engine.deterministic,
        }
        write_json(out / SETTINGS, settings)
        for sample in (s for g in groups for s in g.samples):
            sample.verdict, sample.detail = Verdict.ERROR, NOT_SCORED
        # If the verifier is stopped, no sample is lost: --recompute scores the samples.
        save_groups(out / SAMPLES, groups)
        rewards.score(groups)
    save_groups(out / SAMPLES, groups)
    ks = ks_of(options.k, options.num_samples)
    write_results(out, groups, settings, ks, time.perf_counter() - started)


def recompute(options: RecomputeOptions) -> None:
    """Write and print the metrics of kept samples; --verifier scores the samples again first."""
    from megasd.data.rollout_log import load_groups, save_groups
    from megasd.evaluation.results import SAMPLES, SETTINGS, write_json, write_results
    from megasd.rewards.reward_pool import RewardPool

    directory, out = options.directory, options.out
    for name in (SAMPLES, SETTINGS):
        if not (directory / name).is_file():
            raise UserError(
                f"--recompute: {directory / name} is missing; give the --out directory of an evaluation"
            )
    started = time.perf_counter()
    settings = json.loads((directory / SETTINGS).read_text())
    groups = load_groups(directory / SAMPLES)
    reward = options.reward
    if reward is None and any(s.detail == NOT_SCORED for g in groups for s in g.samples):
        reward = RewardConfig(**settings["verifier"])
    if reward is not None:
        settings["verifier"] = asdict(reward)
        with RewardPool(reward) as rewards:
            rewards.check_rows([g.prompt for g in groups])
            rewards.score(groups)
    if reward is not None or out != directory:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS, settings)
        save_groups(out / SAMPLES, groups)
    ks = ks_of(options.k, settings["num_samples"])
    write_results(out, groups, settings, ks, time.perf_counter() - started)


def decoding_of(args: argparse.Namespace) -> Decoding:
    """How answers are sampled: the values of the preset, then those of the options.

    UserError for values out of their bounds.
    """
    from megasd.evaluation.sampling import Decoding

    found = Decoding()
    if args.preset:
        preset = PRESETS[args.preset]
        found = Decoding(
            preset.temperature, preset.top_p, preset.top_k, preset.max_response_tokens, preset.thinking
        )
    given = {name: getattr(args, name) for name in asdict(found) if getattr(args, name) is not None}
    found = replace(found, **given)
    if found.temperature < 0 or not 0 < found.top_p <= 1 or (found.top_k < 1 and found.top_k != -1):
        raise UserError(
            "eval: --temperature must be 0 or more, --top-p within (0, 1], --top-k 1 or more (-1: off)"
        )
    return found


def reward_config(args: argparse.Namespace) -> RewardConfig:
    """The verifier and its settings, from --verifier and the options that go with it."""
    config = RewardConfig(verifier=args.verifier)
    given = {
        "workers": args.verifier_workers,
        "timeout": args.verifier_timeout,
        "rubric_threshold": args.rubric_threshold,
    }
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def ks_of(text: str | None, num_samples: int) -> list[int]:
    """The k of pass@k: those of --k (`text`), or 1, 2, 4, ... num_samples. Raises UserError."""
    if text is None:
        return default_ks(num_samples)
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--k: {text!r} is no list of numbers; write 1,4,16") from error
    if ks[0] < 1 or ks[-1] > num_samples:
        raise UserError(f"--k: {text} must lie between 1 and the {num_samples} samples a question")
    return ks


def plan_lines(options: Options, prompts: Sequence[Prompt]) -> list[str]:
    """What the evaluation will do, in lines for --dry-run."""
    from megasd.evaluation.results import METRICS, SAMPLES, SETTINGS

    source, samples = options.engine.source, len(prompts) * options.num_samples
    kind = "engine" if is_url(source) else "started on"
    tokenizer = f", tokenizer of {options.model}" if options.model else ""
    decoding = ", ".join(f"{name} {value}" for name, value in asdict(options.decoding).items())
    reward = options.reward
    return [
        f"model     {source} ({kind}{tokenizer})",
        f"data      {options.data}: {len(prompts)} questions x {options.num_samples} samples = {samples}",
        f"decoding  {decoding}; seed {options.engine.seed}",
        f"verifier  {reward.verifier}, {reward.timeout:g} s a check, {reward.workers} at once",
        f"writes    {options.out}: {SAMPLES}, {SETTINGS}, {METRICS}, engine.log",
    ]
