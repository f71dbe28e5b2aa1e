"""What can be wrong with the answer of a row: no verifier reads it, or the prompt gives it away.

    # ("answer", '"answer" has unbalanced braces, so that no verifier can read ...')
    unreadable_answer(Prompt("a", [{"role": "user", "content": "7+8="}], "\\\\frac{1}{"), "math", [])

A finding is (kind, message) or None. The file also has the plain form of an answer (`normal`,
`number`), and the answer that a solution states.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megasd.data.check_text import TextFinding
from megasd.data.rows import short
from megasd.rewards import code as code_task
from megasd.rewards import rubric, tool_use
from megasd.rewards.math_answers import MAX_ANSWER_CHARACTERS, last_boxed
from megasd.types import Prompt, UserError

COMMAND = re.compile(r"\\[A-Za-z]+")
BARE_MATHS = re.compile(r"[\d\s.,+\-*/^=()\[\]{}xyzn]+")
OPTION = re.compile(r"(?m)^[ \t]*[(\[]?([A-Za-z])[)\].:][ \t]+\S")
INLINE_OPTION = re.compile(r"[(\[]([A-Z])[)\]]\s")
LABELLED = re.compile(r"[(\[{<]*([A-Za-z])[)\].:}>]+(?:\s.*)?", re.DOTALL)
ANSWER_LINE = re.compile(r"(?i)\banswer\s*(?:is|:|=)\s*(.+?)\s*$")
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
SLASH = re.compile(r"([+-]?\d+)/(\d+)")
FRACTION = re.compile(r"([+-]?)\\frac\{?(\d+)\}?\{?(\d+)\}?")
LAST_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def unreadable_answer(prompt: Prompt, verifier: str | None, labels: list[str]) -> TextFinding:
    """An answer that the verifier could never find in a response.

    `verifier` None: an answer that no verifier could find. `labels`: labels of the options.
    """
    answer = prompt.answer.strip()
    is_json = answer[0] in "[{"
    if verifier == "code" or (verifier is None and is_json and '"inputs"' in answer):
        return _refused(lambda: code_task.parse_tests(answer, "", 6.0))
    if verifier == "tool_use" or (verifier is None and is_json and '"action' in answer.lower()):
        return _refused(lambda: tool_use.parse_gold(answer, ""))
    if prompt.rubric and (verifier == "rubric" or all("rule" in criterion for criterion in prompt.rubric)):
        if finding := _refused(lambda: rubric.RuleJudge().judge(prompt, "")):
            return "field", finding[1]
    if verifier not in (None, "math", "multiple_choice"):
        return None
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return (
            "answer",
            (
                f'"answer" has {len(answer)} characters, and verifiers read {MAX_ANSWER_CHARACTERS}; give the'
                " final answer only"
            ),
        )
    if "####" in answer:
        return (
            "answer",
            (
                '"answer" holds "####", a whole solution as in GSM8K; keep what follows the mark, and the'
                ' rest as "solution"'
            ),
        )
    if labels and (finding := _bad_choice(answer, labels, verifier)):
        return finding
    if verifier == "multiple_choice":
        return (
            None
            if len(answer) <= 3
            else (
                "answer",
                f'"answer" is {short(answer)}, and multiple_choice compares letters; give the letter',
            )
        )
    reason = broken_latex(answer)
    return (
        ("answer", f'"answer" {reason}, so that no verifier can read {short(answer)}; correct it')
        if reason
        else None
    )


def options(prompt: Prompt) -> list[str]:
    """Labels of the options that the last turn lists, in order: A, B, ... Empty without options."""
    text = prompt.messages[-1]["content"]
    for found, least in ((OPTION.findall(text), 2), (INLINE_OPTION.findall(text), 3)):
        for first in ("A", "a"):
            labels: list[str] = []
            for label in found[found.index(first) :] if first in found else ():
                if ord(label) == ord(first) + len(labels):
                    labels.append(label)
            if len(labels) >= least:
                return labels
    return []


def listed_options(values: dict[str, Any] | None) -> list[str]:
    """Labels of the options in the column "choices" or "options" of a row.

    The column is a list of texts, {"label": [...]}, or {"A": text, ...}.
    """
    for name in ("choices", "options"):
        listed = (values or {}).get(name)
        if isinstance(listed, dict):
            labels = listed.get("label", list(listed))
            if (
                isinstance(labels, list)
                and len(labels) > 1
                and all(isinstance(label, str) and len(label) == 1 for label in labels)
            ):
                return labels
        elif (
            isinstance(listed, list)
            and 1 < len(listed) <= 26
            and all(isinstance(text, str) for text in listed)
        ):
            return [chr(ord("A") + i) for i in range(len(listed))]
    return []


def _bad_choice(answer: str, labels: list[str], verifier: str | None) -> TextFinding:
    bare = LABELLED.fullmatch(answer)
    if bare and bare[1] in labels:
        return "answer", f'"answer" is {short(answer)}, and verifiers compare letters; give {bare[1]} alone'
    letter = bare[1] if bare and len(answer) <= 3 else answer
    # Small letters may also number the parts of a question, and then the answer may be a variable.
    is_letter = (
        len(letter) == 1
        and letter.isalpha()
        and (labels[0] == "A" or (len(labels) > 2 and letter in "abcdefghij"))
    )
    if answer not in labels and (is_letter or verifier == "multiple_choice"):
        return (
            "answer",
            (
                f'"answer" is {short(answer)}, which is not among the options {labels[0]} to {labels[-1]};'
                " correct it"
            ),
        )
    return None


def broken_latex(text: str) -> str | None:
    """What keeps LaTeX or a bare expression from being read, such as "has unbalanced braces".

    None: nothing was found.
    """
    if "\\boxed" in text:
        inside = last_boxed(text)
        if inside is None:
            return "has a \\boxed{ that never closes"
        if not inside:
            return "has an empty \\boxed{}"
    if not COMMAND.search(text) and "$" not in text:
        opened, closed = (sum(text.count(c) for c in brackets) for brackets in ("([{", ")]}"))
        if not BARE_MATHS.fullmatch(text):
            return None
        if opened != closed:
            return "has unbalanced brackets"
        if re.search(r"[-+*/^=,]\s*$|^\s*[*/^=,]", text):
            return "begins or ends on an operator"
        return "divides by 0" if re.search(r"/\s*0+(?![\d.])", text) else None
    plain = re.sub(r"\\[\\{}$]", "", text)
    if plain.count("{") != plain.count("}") or _closes_early(plain):
        return "has unbalanced braces"
    if plain.count("$") % 2 and COMMAND.search(text):
        return "has a $ that never closes"
    if len(re.findall(r"\\left(?![a-z])", text)) != len(re.findall(r"\\right(?![a-z])", text)):
        return "has \\left without \\right"
    if sorted(re.findall(r"\\begin\{(.*?)\}", text)) != sorted(re.findall(r"\\end\{(.*?)\}", text)):
        return "has \\begin without \\end"
    if re.search(r"(?<!\\)(?:\\\\)*\\$", text):
        return "ends with a backslash"
    for command, count in ((r"\\[dt]?frac(?![a-z])", 2), (r"\\sqrt(?![a-z])(?:\s*\[[^\]]*\])?", 1)):
        for found in re.finditer(command, text):
            if not _has_arguments(text, found.end(), count):
                return f"has a {found[0].split('[')[0].strip()} that lacks an argument"
    return None


def _closes_early(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return True
    return False


def _has_arguments(text: str, position: int, count: int) -> bool:
    """Whether `count` arguments follow: a group in braces that is not empty, a command, or a character.

    The braces of `text` are balanced.
    """
    for _ in range(count):
        rest = text[position:]
        found = re.match(r"\s*(\\[A-Za-z]+|\\.|[^\s{}$&])", rest)
        if not found:
            opened = re.match(r"\s*\{", rest)
            if not opened:
                return False
            end, depth = opened.end(), 1
            while end < len(rest) and depth:
                depth += (rest[end] == "{") - (rest[end] == "}")
                end += 1
            if not rest[opened.end() : end - 1].strip():
                return False
            position += end
        else:
            position += found.end()
    return True


def _refused(read: Callable[[], object]) -> TextFinding:
    """The error with which a verifier refuses an answer or a rubric, as a finding."""
    try:
        read()
    except UserError as error:
        return "answer", str(error).removeprefix("row : ")
    return None


def shown_answer(prompt: Prompt) -> TextFinding:
    """A prompt that ends on its own answer, boxes it, or holds the whole solution."""
    text, answer = prompt.messages[-1]["content"].strip(), normal(prompt.answer)
    lines = text.splitlines()
    if len(text) <= len(prompt.answer) + 20 and normal(text) == answer:
        return "shown", "the prompt is its own answer; correct one of them"
    if (
        "nswer" in lines[-1].lower()
        and (line := ANSWER_LINE.search(lines[-1]))
        and normal(line[1].strip("\"'*` .")) == answer
    ):
        return "shown", f"the prompt ends on its answer ({short(line[0])}); take it out"
    if (
        text.count("\\boxed{") == 1
        and len(answer) + answer.isdigit() > 1
        and normal(last_boxed(text) or "") == answer
    ):
        return "shown", "the prompt holds its answer in \\boxed{}; take it out"
    if prompt.solution and len(prompt.solution.strip()) >= 16 and prompt.solution.strip() in text:
        return "shown", "the prompt holds its whole solution; take it out"
    return None


def stated_answer(solution: str) -> tuple[str | None, str | None]:
    """(the answer that a solution ends on, None), or (None, what is wrong with the solution).

    The answer is the last box, or the text after the last "####" (GSM8K). (None, None): it has neither.
    """
    if "\\boxed" in solution:
        inside = last_boxed(solution)
        if inside is None and "\\boxed{" in solution:
            return None, "has a \\boxed{ that never closes"
        return (inside, None) if inside else (None, "has an empty \\boxed{}" if inside == "" else None)
    return (solution.rpartition("####")[2].strip() or None, None) if "####" in solution else (None, None)


def normal(text: str) -> str:
    """An answer in plain form: without box, dollars and spacing, and with one spelling of LaTeX."""
    text = text.strip()
    if text.isalnum():
        return text
    text = (last_boxed(text) or text) if "\\boxed{" in text else text
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:| |quad)(?![a-z])|\\[()\[\]]|[$\s]", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = (
        text.replace("dfrac", "frac")
        .replace("tfrac", "frac")
        .replace("\\%", "%")
        .replace("{,}", ",")
        .rstrip(".")
    )
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def number(text: str) -> Fraction | None:
    """The number that an answer is: 15, -0.5, 1/2, \\frac{1}{2}. None: the answer is no such number."""
    text = normal(text)
    if len(text) > 40:
        return None
    if NUMBER.fullmatch(text):
        return Fraction(text)
    if (found := SLASH.fullmatch(text)) and int(found[2]):
        return Fraction(int(found[1]), int(found[2]))
    if (found := FRACTION.fullmatch(text)) and int(found[3]):
        return Fraction(int(f"{found[1]}{found[2]}"), int(found[3]))
    return None


def last_number(solution: str) -> Fraction | None:
    """The last number of the last line of a solution; None without a number."""
    found = LAST_NUMBER.findall(solution.strip().splitlines()[-1][-200:]) if solution.strip() else []
    return number(found[-1].rstrip(",")) if found else None
