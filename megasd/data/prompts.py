"""Prompts from strict rows, and the resumable order in which a run reads them. Plain Python.

    {"id": "gsm-17", "prompt": "7+8=", "answer": "15", "solution": "7+8=15"}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+8="}],
     "answer": "15", "pass_rate": 0.25}

A row must have a prompt and an answer. `id` defaults to "<file stem>-<row number from 0>".
`pass_rate` is the pass rate of the start model (the frozen rate of PACED, arXiv 2603.11178), `rubric`
a list of criteria. Other columns are metadata and are ignored, except look-alikes of known columns: a
"solutoin" would silently be no solution. data/rows.py reads files, data/columns.py reads columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasd.data.column_values import Mapped
from megasd.data.columns import MAPPINGS
from megasd.data.rows import DataError, Place, Row, kind_name, read_rows, short
from megasd.types import Message, Prompt

ROLES = ("system", "user", "assistant")

logger = logging.getLogger(__name__)


def load_prompts(
    path: str | Path, *, max_row_bytes: int = 262144, require_solution: bool = False, mapping: str = "auto"
) -> list[Prompt]:
    """Every prompt of a file or directory, in order. DataError names the first bad row.

    Nothing is trimmed or guessed. `max_row_bytes` bounds the size of a row, without the newline.
    `require_solution` refuses rows without a solution (for the teacher context "solution", and for NLL
    on the solutions of rows). `mapping`: a name in data/columns.py. Prompts that the rules of the
    mapping leave out are counted in a logged warning.
    """
    prompts: list[Prompt] = []
    first: dict[str, tuple[Place, Prompt]] = {}
    left_out = 0
    for row, found in read_prompts(path, max_row_bytes=max_row_bytes, mapping=mapping):
        if isinstance(found, DataError):
            raise found
        for prompt in found:
            if prompt is None or (
                MAPPINGS[mapping].drops_repeats
                and prompt.id in first
                and is_repeat(prompt, first[prompt.id][1])
            ):
                left_out += 1
                continue
            if require_solution and prompt.solution is None:
                raise no_solution(row)
            if prompt.id in first:
                raise used_id(row, prompt.id, first[prompt.id][0])
            first[prompt.id] = (row.place, prompt)
            prompts.append(prompt)
    if not prompts and not left_out:
        raise DataError(f"{path}: no rows; write one JSON object per line")
    if not prompts:
        raise DataError(
            f"{path}: none of its {left_out} rows is one that mapping {mapping} takes; check data.mapping"
        )
    if left_out:
        logger.warning(
            "%s: mapping %s took %d prompts and left %d out, as its rules say",
            path,
            mapping,
            len(prompts),
            left_out,
        )
    return prompts


def read_prompts(
    path: str | Path, *, max_row_bytes: int, mapping: str = "auto"
) -> Iterator[tuple[Row, list[Prompt | None] | DataError]]:
    """Every row with its prompts, or with the error of the row. DataError: a bad file.

    A prompt that the mapping leaves out is None. Ids are not compared with each other here.
    """
    if mapping not in MAPPINGS:
        raise DataError(f"data.mapping: {mapping!r} is not one of {', '.join(MAPPINGS)}")
    read = MAPPINGS[mapping].read
    for row in read_rows(path, max_row_bytes=max_row_bytes):
        if isinstance(row.values, DataError):
            yield row, row.values
            continue
        default_id = f"{row.path.stem}-{row.number - 1}"
        try:
            found: list[Prompt | None] | DataError = [
                None if mapped is None else _to_prompt(mapped, row.where, default_id)
                for mapped in read(row.values, row.where)
            ]
        except DataError as error:
            found = error
        yield row, found


def no_solution(row: Place) -> DataError:
    """The error of a row without a reference solution."""
    return DataError(
        f'{row.where}: no "solution", which this algorithm reads; add one or drop the row', "missing"
    )


def used_id(row: Place, used: str, earlier: Place) -> DataError:
    """The error of a row whose id an earlier row has."""
    there = f"on line {earlier.number}" if earlier.path == row.path else f"in {earlier.where}"
    return DataError(
        f'{row.where}: id {short(used)} was used {there}; make every "id" unique or drop them all', "id"
    )


def is_repeat(one: Prompt, other: Prompt) -> bool:
    """Whether two rows with one id have the same messages and answer."""
    return one.messages == other.messages and one.answer == other.answer


def _to_prompt(mapped: Mapped, where: str, default_id: str) -> Prompt:
    values, names = mapped
    return Prompt(
        id=_text(values, "id", where) if "id" in values else default_id,
        messages=_messages(values, where, names.get("prompt", "prompt")),
        answer=_text(values, "answer", where, name=names.get("answer")),
        solution=(
            _text(values, "solution", where, name=names.get("solution"))
            if values.get("solution") is not None
            else None
        ),
        pass_rate=_pass_rate(values, where),
        rubric=_rubric(values, where),
    )


def _messages(values: dict[str, Any], where: str, name: str) -> list[Message]:
    prompt = values.get("prompt")
    if not isinstance(prompt, list):
        return [
            {
                "role": "user",
                "content": _text(values, "prompt", where, name=name, wanted="a string or a list of messages"),
            }
        ]
    if not prompt:
        raise DataError(f'{where}: "{name}" is an empty list; give at least one user message', "messages")
    messages: list[Message] = []
    for i, message in enumerate(prompt):
        place = f"{name}[{i}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(
                f'{where}: "{place}" must be an object with exactly "role" and "content"; rewrite it',
                "messages",
            )
        role = message["role"]
        if role not in ROLES:
            raise DataError(
                f'{where}: "{place}" has role {short(role)}; use one of {", ".join(ROLES)}', "role"
            )
        if role == "system" and i > 0:
            raise DataError(
                f'{where}: "{place}" is a system message; only the first message may be one, move it', "role"
            )
        messages.append({"role": role, "content": _text(message, "content", where, name=f"{place}.content")})
    if messages[-1]["role"] != "user":
        raise DataError(
            f'{where}: the last message of "{name}" has role {messages[-1]["role"]!r}; end with a user'
            " message",
            "role",
        )
    return messages


def _text(
    values: dict[str, Any], key: str, where: str, *, name: str | None = None, wanted: str = "a string"
) -> str:
    """values[key] as a string that holds something."""
    name = name or key
    if key not in values:
        raise DataError(f'{where}: no "{name}"; add {wanted}', "missing")
    value = values[key]
    if not isinstance(value, str):
        what = "quote it" if _is_number(value) else "rewrite it"
        raise DataError(f'{where}: "{name}" is a JSON {kind_name(value)}, not {wanted}; {what}', "type")
    if not value.strip():
        raise DataError(f'{where}: "{name}" is empty; fill it in or drop the row', "empty")
    if "\0" in value:
        raise DataError(f'{where}: "{name}" holds a NUL character; remove it', "encoding")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair; UTF-8 cannot
        message = (
            f'{where}: "{name}" holds half of a surrogate pair (\\ud800-\\udfff); write the character itself'
        )
        raise DataError(message, "encoding") from error
    return value


def _pass_rate(values: dict[str, Any], where: str) -> float | None:
    rate = values.get("pass_rate")
    if rate is None:
        return None
    if not _is_number(rate) or not 0 <= rate <= 1:
        raise DataError(f'{where}: "pass_rate" is {short(rate)}; give a number from 0 to 1, or none', "field")
    return float(rate)


def _rubric(values: dict[str, Any], where: str) -> list[dict[str, str | float]] | None:
    rubric = values.get("rubric")
    if rubric is None:
        return None
    if not isinstance(rubric, list) or not rubric:
        raise DataError(f'{where}: "rubric" must be a list of criteria; rewrite it or leave it out', "field")
    for i, criterion in enumerate(rubric):
        is_flat = isinstance(criterion, dict) and all(
            isinstance(value, (str, int, float)) for value in criterion.values()
        )
        if not is_flat or not criterion:
            raise DataError(
                f'{where}: "rubric[{i}]" must be an object of strings and numbers; rewrite it', "field"
            )
    return rubric


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class PromptIterator:
    """Batches of distinct prompts without end.

    Each epoch visits every prompt once, in an order drawn from (seed, epoch). A batch that reaches the
    end of an epoch is filled from the next epoch, so no prompt is dropped. Prompts that this batch
    already has come later in the next epoch, so no prompt is in a batch twice.

        batches = PromptIterator(prompts, batch_size=32, seed=1, shuffle=True)
        batches.next()                                          # list[Prompt], 32 of them
        other.load_state_dict(batches.state_dict())             # goes on with the same batches
    """

    def __init__(self, prompts: list[Prompt], batch_size: int, *, seed: int, shuffle: bool = True) -> None:
        if batch_size < 1:
            raise DataError(f"rollout.num_prompts={batch_size}: must be at least 1")
        if batch_size > len(prompts):
            raise DataError(
                f"rollout.num_prompts={batch_size} is more than the {len(prompts)} rows of data.train; lower"
                " it or add rows"
            )
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = _fingerprint(prompts)
        self.epoch = self.position = self._num_filling = 0
        self._carried: list[int] = []
        self._order: list[int] = []
        self._start_epoch(epoch=0, carried=[], num_filling=0)

    def next(self) -> list[Prompt]:
        """The next `batch_size` prompts."""
        batch = self._order[self.position : self.position + self.batch_size]
        self.position += len(batch)
        if len(batch) < self.batch_size:
            num_filling = self.batch_size - len(batch)
            self._start_epoch(epoch=self.epoch + 1, carried=batch, num_filling=num_filling)
            batch = batch + self._order[:num_filling]
            self.position = num_filling
        return [self.prompts[i] for i in batch]

    def _start_epoch(self, *, epoch: int, carried: list[int], num_filling: int) -> None:
        """Draw the order of an epoch.

        `carried`: the row numbers of the batch that began in the last epoch; the batch takes
        `num_filling` more from this epoch.
        """
        order = list(range(len(self.prompts)))
        if self.shuffle:
            # Python hashes a string seed with SHA-512, the same on every machine.
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
        taken = set(carried)
        filling = [i for i in order if i not in taken][:num_filling]
        chosen = set(filling)
        self._order = filling + [i for i in order if i not in chosen]
        self.epoch, self.position = epoch, 0
        self._carried, self._num_filling = carried, num_filling

    def state_dict(self) -> dict[str, Any]:
        """The position, as a JSON value with at most one batch of row numbers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "carried": list(self._carried),
            "num_filling": self._num_filling,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. DataError: it belongs to other rows, another seed or another order."""
        for key, mine, what in (
            ("fingerprint", self.fingerprint, "data.train holds other rows"),
            ("seed", self.seed, "run.seed differs"),
            ("shuffle", self.shuffle, "data.shuffle differs"),
        ):
            if state[key] != mine:
                raise DataError(
                    f"cannot resume the prompt order: {what} ({state[key]!r} in the checkpoint, {mine!r}"
                    " now); restore it or start again"
                )
        self._start_epoch(
            epoch=state["epoch"], carried=list(state["carried"]), num_filling=state["num_filling"]
        )
        self.position = state["position"]


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        extra = (
            [] if prompt.pass_rate is None and prompt.rubric is None else [prompt.pass_rate, prompt.rubric]
        )
        digest.update(
            json.dumps([prompt.id, prompt.messages, prompt.answer, prompt.solution, *extra]).encode()
        )
    return digest.hexdigest()[:16]
