"""`megasd data check`: what data/check.py finds in a file, printed for a reader and, with --json,
for a program.

    megasd data check train.jsonl --against eval.jsonl --model /models/Qwen3-8B --max-prompt-tokens 2048

Exit codes: 0 no errors, 1 errors, 2 unusable arguments. With --json the last line of stdout is one
JSON object, {"errors": [{"file", "line", "kind", "message"}], "warnings": [...], ...}.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megasd.algo.recipes import RECIPES
from megasd.algo.stages import reads_solutions, variants
from megasd.algo.teacher_context import with_solution
from megasd.config.schema import DEFAULT_TEMPLATE, AlgorithmConfig, RolloutConfig
from megasd.data.check import CHARACTERS_A_TOKEN, CheckReport, CheckRules, check_file
from megasd.types import Message, Prompt, UserError

# errors and warnings printed, each; --json lists them all
MAX_PRINTED = 50
# of the histogram
BARS = 10
UNKNOWN_SUCCESS = "[here stands a right answer that the model has sampled]"


def run(args: argparse.Namespace) -> int:
    """Check args.file and print what was found. UserError for arguments that cannot be used.
    Returns the exit code.
    """
    algorithm = RECIPES[args.recipe] if args.recipe else None
    chat, limit = None, CHARACTERS_A_TOKEN * RolloutConfig().max_prompt_tokens
    if args.model:
        from megasd.data.chat import Chat

        chat = Chat(args.model)
        limit = args.max_prompt_tokens or RolloutConfig().max_prompt_tokens
    elif args.max_prompt_tokens:
        raise UserError("--max-prompt-tokens: counts with a model's tokenizer; give --model DIR too")
    if args.against and Path(args.against).resolve() == Path(args.file).resolve():
        raise UserError(f"--against {args.against}: is the file itself; give the held-out one")
    rules = CheckRules(
        mapping=args.mapping,
        max_row_bytes=args.max_row_bytes,
        require_solution=algorithm is not None and reads_solutions(algorithm),
        verifier=args.verifier,
        max_prompt_length=limit,
    )
    held_out = None
    if args.against:
        theirs = replace(
            rules,
            mapping=args.against_mapping or args.mapping,
            require_solution=False,
            max_prompt_length=None,
        )
        held_out = check_file(args.against, theirs, num_shown=0)
    if chat is not None:
        rules = replace(
            rules,
            prompt_length=lambda messages: len(chat.encode_prompt(messages)),
            text_length=lambda text: len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]),
            unit="tokens",
        )
    report = check_file(args.file, replace(rules, held_out=held_out), num_shown=args.show)
    render = chat_text(chat) if chat is not None else plain_text
    print("\n".join(text_of(report, held_out, algorithm, render)))
    errors = len(report.errors) + (len(held_out.errors) if held_out is not None else 0)
    if args.json:
        print(json.dumps(check_metrics(report, held_out)))
    return 1 if errors else 0


def check_metrics(report: CheckReport, held_out: CheckReport | None) -> dict[str, Any]:
    """The report as JSON values."""
    found: dict[str, Any] = {
        "errors": [vars_of(fault) for fault in report.errors],
        "warnings": [vars_of(fault) for fault in report.warnings],
        "path": report.path,
        "rows": report.rows,
        "prompts": report.prompts,
        "left_out": report.left_out,
        "kinds": dict(Counter(fault.kind for fault in report.errors)),
        "unit": report.unit,
        "prompt_lengths": summary(report.lengths),
        "solution_lengths": summary(report.solution_lengths),
    }
    if held_out is not None:
        found["against"] = {
            "path": held_out.path,
            "rows": held_out.rows,
            "errors": [vars_of(fault) for fault in held_out.errors],
        }
    return found


def vars_of(fault: Any) -> dict[str, Any]:
    """A fault as JSON values."""
    return {"file": fault.file, "line": fault.line, "kind": fault.kind, "message": fault.message}


def summary(lengths: list[int]) -> dict[str, Any]:
    """Quantiles (nearest rank), mean, and a histogram of equal bins, [from, to, count] with both
    ends included.
    """
    if not lengths:
        return {"count": 0, "histogram": []}
    ordered = sorted(lengths)
    quantile = {f"p{p}": ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 90, 99)}
    low, high = ordered[0], ordered[-1]
    width = max(1, -(-(high - low + 1) // BARS))
    counts = Counter((length - low) // width for length in ordered)
    bins = [
        [low + i * width, min(high, low + (i + 1) * width - 1), counts[i]]
        for i in range((high - low) // width + 1)
    ]
    return {
        "count": len(ordered),
        "min": low,
        "mean": sum(ordered) / len(ordered),
        **quantile,
        "max": high,
        "histogram": bins,
    }


def text_of(
    report: CheckReport,
    held_out: CheckReport | None,
    algorithm: AlgorithmConfig | None,
    render: Callable[[list[Message]], str],
) -> list[str]:
    """The report in lines for a reader."""
    lines = [
        f"{report.path}: {report.rows} rows, {report.prompts} prompts, {len(report.errors)} errors,"
        f" {len(report.warnings)} warnings"
    ]
    if report.left_out:
        lines.append(f"left out by the rules of the mapping: {report.left_out}")
    for name, lengths in (("prompt", report.lengths), ("solution", report.solution_lengths)):
        lines += ["", *length_lines(name, report.unit, summary(lengths))] if lengths else []
    for i, prompt in enumerate(report.shown):
        lines += ["", f"--- row {prompt.id!r}: student reads", render(prompt.messages)]
        teacher = teacher_messages(prompt, algorithm)
        lines += [f"--- row {prompt.id!r}: teacher reads", render(teacher)] if teacher else []
        lines += (
            [f"--- row {prompt.id!r}: answer", prompt.answer] if len(prompt.answer) < 500 or i == 0 else []
        )
    for what, found in (
        ("errors", report.errors),
        ("warnings", report.warnings),
        ("errors of the held-out file", held_out.errors if held_out else []),
    ):
        lines += ["", f"{len(found)} {what}", *map(str, found[:MAX_PRINTED])] if found else []
        lines += (
            [f"... and {len(found) - MAX_PRINTED} more; --json lists all"] if len(found) > MAX_PRINTED else []
        )
    return lines


def length_lines(name: str, unit: str, found: dict[str, Any]) -> list[str]:
    """A histogram of lengths."""
    note = "" if unit == "tokens" else " (--model DIR counts tokens)"
    lines = [
        f"{name} length in {unit}{note}: min {found['min']}, mean {found['mean']:.1f}, p50 {found['p50']},"
        f" p90 {found['p90']}, p99 {found['p99']}, max {found['max']}"
    ]
    most = max(count for _, _, count in found["histogram"])
    return lines + [
        f"{low:>8} - {high:<8} {count:>8} {'#' * math.ceil(40 * count / most)}"
        for low, high, count in found["histogram"]
    ]


def teacher_messages(prompt: Prompt, algorithm: AlgorithmConfig | None) -> list[Message] | None:
    """What the self-teacher would read: the row's solution, its answer, or a stand-in for a sampled
    success. None without a teacher.
    """
    teachers = (
        [stage.teacher for stage in variants(algorithm) if stage.teacher is not None]
        if algorithm is not None
        else []
    )
    teacher = teachers[0] if teachers else None
    if algorithm is not None and teacher is None:
        return None
    context = teacher.context if teacher is not None else "solution"
    if context == "prompt":
        return prompt.messages
    privileged = (
        prompt.answer
        if context == "answer"
        else prompt.solution
        if context in ("solution", "prefix")
        else None
    )
    template = teacher.template if teacher is not None else DEFAULT_TEMPLATE
    return with_solution(prompt.messages, privileged or UNKNOWN_SUCCESS, template=template)


def chat_text(chat: Any) -> Callable[[list[Message]], str]:
    """Messages as the model reads them: its chat template, special tokens included."""
    return lambda messages: chat.tokenizer.decode(chat.encode_prompt(messages), skip_special_tokens=False)


def plain_text(messages: list[Message]) -> str:
    """Messages without a model's template."""
    return "\n".join(f"[{message['role']}] {message['content']}" for message in messages)
