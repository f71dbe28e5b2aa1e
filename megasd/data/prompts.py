"""Prompts from strict JSONL, and the resumable order in which a run reads them. Plain Python.

    {"id": "gsm-17", "prompt": "7+8=", "answer": "15", "solution": "7+8=15"}
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7+8="}], "answer": "15"}

`prompt` and `answer` are required; `id` defaults to "<file stem>-<row number from 0>". Other keys are metadata and are left alone,
except look-alikes of the known ones (a "solutoin" would silently be no solution).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from megasd.types import Message, Prompt, UserError

KEYS = ("id", "prompt", "answer", "solution")
ROLES = ("system", "user", "assistant")


class DataError(UserError):
    """A bad row or data file: "path:line: reason; what to do", one line."""


def load_prompts(path: str | Path, *, max_row_bytes: int = 262144, require_solution: bool = False) -> list[Prompt]:
    """Every row of a JSONL file, in file order. DataError names the first bad row; nothing is skipped, trimmed or guessed.

    `max_row_bytes` bounds a row's size in bytes, its newline excluded. `require_solution` refuses rows without one
    (teacher context "solution", and NLL on the rows' own solutions).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file; give the path of a JSONL file")
    if not path.is_file():  # a directory, or a pipe that would block
        raise DataError(f"{path}: not a regular file; give the path of a JSONL file")
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(max_row_bytes + 2):  # at most one row in memory, however long it is
                number += 1
                where = f"{path}:{number}"
                prompt = _parse_row(line, where, default_id=f"{path.stem}-{number - 1}", max_row_bytes=max_row_bytes)
                if require_solution and prompt.solution is None:
                    raise DataError(f'{where}: no "solution", which this algorithm reads; add one or drop the row')
                if prompt.id in line_of:
                    raise DataError(
                        f'{where}: id {_short(prompt.id)} was used on line {line_of[prompt.id]}; make every "id" unique or drop them all'
                    )
                line_of[prompt.id] = number
                prompts.append(prompt)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not prompts:
        raise DataError(f"{path}: no rows; write one JSON object per line")
    return prompts


def _parse_row(line: bytes, where: str, *, default_id: str, max_row_bytes: int) -> Prompt:
    row_bytes = line.rstrip(b"\r\n")
    if len(row_bytes) > max_row_bytes:
        raise DataError(f"{where}: row is longer than data.max_row_bytes={max_row_bytes}; shorten it or raise the limit")
    if row_bytes.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{where}: starts with a byte order mark; save the file as UTF-8 without BOM")
    try:
        text = row_bytes.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    if "\0" in text:
        raise DataError(f"{where}: holds a NUL byte; the file is damaged or not UTF-8 text, write it again")
    if not text.strip():
        raise DataError(f"{where}: blank line; remove it")
    try:
        row = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON ({reason}); write one JSON object per line") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: the row is a JSON {_kind(row)}, not an object; write {{"prompt": ..., "answer": ...}}')
    for key in row:
        if key not in KEYS and (close := difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.8)):
            raise DataError(f"{where}: unknown key {_short(key)}; did you mean {close[0]!r}? Rename it")
    return Prompt(
        id=_text(row, "id", where) if "id" in row else default_id,
        messages=_messages(row, where),
        answer=_text(row, "answer", where),
        solution=_text(row, "solution", where) if row.get("solution") is not None else None,
    )


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return [{"role": "user", "content": _text(row, "prompt", where, wanted="a string or a list of messages")}]
    if not prompt:
        raise DataError(f'{where}: "prompt" is an empty list; give at least one user message')
    messages: list[Message] = []
    for i, message in enumerate(prompt):
        name = f"prompt[{i}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(f'{where}: "{name}" must be an object with exactly "role" and "content"; rewrite it')
        role = message["role"]
        if role not in ROLES:
            raise DataError(f'{where}: "{name}" has role {_short(role)}; use one of {", ".join(ROLES)}')
        if role == "system" and i > 0:
            raise DataError(f'{where}: "{name}" is a system message; only the first message may be one, move it')
        messages.append({"role": role, "content": _text(message, "content", where, name=f"{name}.content")})
    if messages[-1]["role"] != "user":
        raise DataError(f'{where}: the last message of "prompt" has role {messages[-1]["role"]!r}; end with a user message')
    return messages


def _text(values: dict[str, Any], key: str, where: str, *, name: str | None = None, wanted: str = "a string") -> str:
    """values[key] as a string that holds something."""
    name = name or key
    if key not in values:
        raise DataError(f'{where}: no "{name}"; add {wanted}')
    value = values[key]
    if not isinstance(value, str):
        raise DataError(f'{where}: "{name}" is a JSON {_kind(value)}, not {wanted}; {"quote it" if _is_scalar(value) else "rewrite it"}')
    if not value.strip():
        raise DataError(f'{where}: "{name}" is empty; fill it in or drop the row')
    if "\0" in value:
        raise DataError(f'{where}: "{name}" holds a NUL character; remove it')
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON may spell half of a surrogate pair; UTF-8 cannot
        raise DataError(f'{where}: "{name}" holds half of a surrogate pair (\\ud800-\\udfff); write the character itself')
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _is_scalar(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class PromptIterator:
    """Batches of distinct prompts without end; each epoch visits every prompt once, in an order drawn from (seed, epoch).

    A batch that reaches the end of an epoch is filled from the next one, so no prompt is dropped. The prompts it already took
    are put behind those it still takes, hence no prompt stands twice in a batch.

        batches = PromptIterator(prompts, batch_size=32, seed=1, shuffle=True)
        batches.next()                                          # list[Prompt], 32 of them
        other.load_state_dict(batches.state_dict())             # goes on with the same batches
    """

    def __init__(self, prompts: list[Prompt], batch_size: int, *, seed: int, shuffle: bool = True) -> None:
        if batch_size < 1:
            raise DataError(f"rollout.num_prompts={batch_size}: must be at least 1")
        if batch_size > len(prompts):
            raise DataError(f"rollout.num_prompts={batch_size} is more than the {len(prompts)} rows of data.train; lower it or add rows")
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.fingerprint = _fingerprint(prompts)
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
        """Draw the epoch's order. `carried`: row numbers that end the last epoch, in a batch that takes `num_filling` of this one."""
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}:{epoch}").shuffle(order)  # a string seed is hashed with SHA-512, the same on every machine
        taken = set(carried)
        filling = [i for i in order if i not in taken][:num_filling]
        chosen = set(filling)
        self._order = filling + [i for i in order if i not in chosen]
        self.epoch, self.position = epoch, 0
        self._carried, self._num_filling = carried, num_filling

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands; JSON-able, at most one batch of row numbers."""
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
        """Go on from `state`. DataError when it belongs to other rows, another seed or another order."""
        for key, mine, what in (
            ("fingerprint", self.fingerprint, "data.train holds other rows"),
            ("seed", self.seed, "run.seed differs"),
            ("shuffle", self.shuffle, "data.shuffle differs"),
        ):
            if state[key] != mine:
                raise DataError(
                    f"cannot resume the prompt order: {what} ({state[key]!r} in the checkpoint, {mine!r} now); restore it or start anew"
                )
        self._start_epoch(epoch=state["epoch"], carried=list(state["carried"]), num_filling=state["num_filling"])
        self.position = state["position"]


def _fingerprint(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.messages, prompt.answer, prompt.solution]).encode())
    return digest.hexdigest()[:16]
