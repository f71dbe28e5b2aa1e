"""The report of `megasd data check`: lines for a reader, JSON for a program."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from megasd.algo.stages import variants
from megasd.algo.teacher_context import with_solution
from megasd.config.schema import DEFAULT_TEMPLATE, AlgorithmConfig
from megasd.data.chat import Chat
from megasd.data.check import CheckReport, Fault
from megasd.types import Message, Prompt

# errors and warnings printed, of each kind; --json lists all
MAX_PRINTED = 50
# bars of a histogram
BARS = 10
UNKNOWN_SUCCESS = "[here stands a right answer that the model has sampled]"

# Messages -> the text that a model reads.
Render = Callable[[list[Message]], str]


def report_json(report: CheckReport, held_out: CheckReport | None) -> dict[str, Any]:
    """The report of a file, and of the held-out file if one is given, as JSON values."""
    found: dict[str, Any] = {
        "errors": [fault_json(fault) for fault in report.errors],
        "warnings": [fault_json(fault) for fault in report.warnings],
        "path": report.path,
        "rows": report.rows,
        "prompts": report.prompts,
        "left_out": report.left_out,
        "kinds": dict(Counter(fault.kind for fault in report.errors)),
        "unit": report.unit,
        "prompt_lengths": length_summary(report.lengths),
        "solution_lengths": length_summary(report.solution_lengths),
    }
    if held_out is not None:
        found["against"] = {
            "path": held_out.path,
            "rows": held_out.rows,
            "errors": [fault_json(fault) for fault in held_out.errors],
        }
    return found


def fault_json(fault: Fault) -> dict[str, Any]:
    """A fault as JSON values."""
    return {"file": fault.file, "line": fault.line, "kind": fault.kind, "message": fault.message}


def length_summary(lengths: list[int]) -> dict[str, Any]:
    """Count, quantiles (nearest rank), mean, and a histogram of bins of equal width.

    A bin is [from, to, count]; both ends belong to it.
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


def report_text(
    report: CheckReport,
    held_out: CheckReport | None,
    algorithm: AlgorithmConfig | None,
    render: Render,
) -> list[str]:
    """The report in lines for a reader.

    algorithm: the one whose teacher is shown; None = the solution is shown. render: a chat as text.
    """
    lines = [
        f"{report.path}: {report.rows} rows, {report.prompts} prompts, {len(report.errors)} errors,"
        f" {len(report.warnings)} warnings"
    ]
    if report.left_out:
        lines.append(f"left out by the rules of the mapping: {report.left_out}")
    for name, lengths in (("prompt", report.lengths), ("solution", report.solution_lengths)):
        lines += ["", *length_lines(name, report.unit, length_summary(lengths))] if lengths else []
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
    """The lines of one histogram; `found` comes from `length_summary`."""
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
    """The chat that the self-teacher would read; None for an algorithm without a teacher.

    A context that shows a sampled answer gets a stand-in for it.
    """
    stages = variants(algorithm) if algorithm is not None else []
    teacher = next((stage.teacher for stage in stages if stage.teacher is not None), None)
    if algorithm is not None and teacher is None:
        return None
    context = teacher.context if teacher is not None else "solution"
    if context == "prompt":
        return prompt.messages
    of_row = {"answer": prompt.answer, "solution": prompt.solution, "prefix": prompt.solution}
    template = teacher.template if teacher is not None else DEFAULT_TEMPLATE
    return with_solution(prompt.messages, of_row.get(context) or UNKNOWN_SUCCESS, template=template)


def chat_text(chat: Chat) -> Render:
    """Render a chat as the model reads it: by its chat template, special tokens included."""
    return lambda messages: chat.tokenizer.decode(chat.encode_prompt(messages), skip_special_tokens=False)


def plain_text(messages: list[Message]) -> str:
    """Render a chat without a model's template."""
    return "\n".join(f"[{message['role']}] {message['content']}" for message in messages)
