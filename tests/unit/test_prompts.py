"""data/prompts.py: the strict JSONL reader and the resumable order.

Proves that every kind of bad row is refused with one line that names the file, the line and what to do, and that the iterator visits every
prompt once an epoch, never twice in a batch, and resumes exactly. Does not prove that any tokenizer accepts the text.
"""

import json
import os

import pytest

from megasd.data.prompts import DataError, PromptIterator, load_prompts
from megasd.types import Prompt

GOOD = b'{"prompt": "7+8=", "answer": "15"}\n'


def write(tmp_path, content: bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    return path


def test_good_rows(tmp_path):
    rows = [
        {"id": "a", "prompt": "7+8=", "answer": "15", "solution": "7+8=15"},
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "ü 1\u2028x"}],
            "answer": "1",
            "level": 3,
            "solution": None,
        },
    ]
    content = b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)  # CRLF, and no newline at the end
    first, second = load_prompts(write(tmp_path, content))
    assert first == Prompt("a", [{"role": "user", "content": "7+8="}], "15", "7+8=15")
    assert second.id == "rows-1" and second.messages[-1]["content"] == "ü 1\u2028x" and second.solution is None


BAD = {
    "bad JSON": (b'{"prompt": "1"', "not valid JSON"),
    "two rows on a line": (b'{"prompt": "1", "answer": "1"} {}', "not valid JSON"),
    "array": (b"[1]", "JSON array, not an object"),
    "string": (b'"x"', "JSON string, not an object"),
    "null": (b"null", "JSON null, not an object"),
    "blank line": (b"  ", "blank line"),
    "no prompt": (b'{"answer": "1"}', 'no "prompt"'),
    "no answer": (b'{"prompt": "1"}', 'no "answer"'),
    "empty prompt": (b'{"prompt": " ", "answer": "1"}', '"prompt" is empty'),
    "empty answer": (b'{"prompt": "1", "answer": ""}', '"answer" is empty'),
    "number answer": (b'{"prompt": "1", "answer": 15}', "quote it"),
    "null answer": (b'{"prompt": "1", "answer": null}', "JSON null"),
    "number prompt": (b'{"prompt": 3, "answer": "1"}', "a string or a list of messages"),
    "number id": (b'{"id": 3, "prompt": "1", "answer": "1"}', '"id" is a JSON number'),
    "number solution": (b'{"prompt": "1", "answer": "1", "solution": 2}', '"solution" is a JSON number'),
    "look-alike key": (b'{"prompt": "1", "answer": "1", "solutoin": "2"}', "did you mean 'solution'"),
    "key twice": (b'{"prompt": "1", "prompt": "2", "answer": "1"}', "a key occurs twice"),
    "duplicate id": (b'{"id": "rows-0", "prompt": "1", "answer": "1"}', "was used on line 1"),
    "Latin-1": ('{"prompt": "é", "answer": "1"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16": ('{"prompt": "1"}'.encode("utf-16"), "not UTF-8"),
    "BOM": (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    "NUL byte": (b'{"prompt": "1\0", "answer": "1"}', "NUL byte"),
    "NUL escape": (b'{"prompt": "1\\u0000", "answer": "1"}', "NUL character"),
    "half a surrogate": (b'{"prompt": "\\ud800", "answer": "1"}', "surrogate"),
    "oversize": (b'{"prompt": "' + b"x" * 500 + b'", "answer": "1"}', "data.max_row_bytes=200"),
    "deep nesting": (b'{"x":' + b"[" * 90 + b"}", "not valid JSON"),
    "empty messages": (b'{"prompt": [], "answer": "1"}', "empty list"),
    "bad role": (b'{"prompt": [{"role": "human", "content": "1"}], "answer": "1"}', "has role 'human'"),
    "list role": (b'{"prompt": [{"role": ["user"], "content": "1"}], "answer": "1"}', "has role"),
    "no content": (b'{"prompt": [{"role": "user"}], "answer": "1"}', 'exactly "role" and "content"'),
    "empty content": (b'{"prompt": [{"role": "user", "content": ""}], "answer": "1"}', "prompt[0].content"),
    "parts content": (b'{"prompt": [{"role": "user", "content": ["1"]}], "answer": "1"}', "JSON array"),
    "string message": (b'{"prompt": ["1"], "answer": "1"}', "prompt[0]"),
    "assistant last": (
        b'{"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}], "answer": "1"}',
        "end with a user",
    ),
    "late system": (
        b'{"prompt": [{"role": "user", "content": "1"}, {"role": "system", "content": "1"}], "answer": "1"}',
        "only the first message",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path, name):
    row, reason = BAD[name]
    path = write(tmp_path, GOOD + row + b"\n")
    with pytest.raises(DataError) as caught:
        load_prompts(path, max_row_bytes=200)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and reason in message, message
    assert "\n" not in message and len(message) < 400 + len(str(path))


def test_a_bad_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (write(tmp_path, b""), "no rows"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            load_prompts(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bom_on_the_first_line_and_the_exact_size_limit(tmp_path):
    with pytest.raises(DataError, match=":1: starts with a byte order mark"):
        load_prompts(write(tmp_path, b"\xef\xbb\xbf" + GOOD))
    size = len(GOOD) - 1
    assert len(load_prompts(write(tmp_path, GOOD), max_row_bytes=size)) == 1
    with pytest.raises(DataError, match="longer than"):
        load_prompts(write(tmp_path, GOOD), max_row_bytes=size - 1)


def test_solutions_can_be_required(tmp_path):
    with pytest.raises(DataError, match=':1: no "solution"'):
        load_prompts(write(tmp_path, GOOD), require_solution=True)


def make_prompts(n: int) -> list[Prompt]:
    return [Prompt(str(i), [{"role": "user", "content": str(i)}], str(i)) for i in range(n)]


def ids(iterator: PromptIterator, batches: int) -> list[list[str]]:
    return [[prompt.id for prompt in iterator.next()] for _ in range(batches)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_prompts, batch_size", [(10, 3), (10, 10), (10, 7), (10, 9), (7, 1), (12, 4)])
def test_every_epoch_visits_each_prompt_once_and_no_batch_repeats_one(num_prompts, batch_size, shuffle):
    iterator = PromptIterator(make_prompts(num_prompts), batch_size, seed=3, shuffle=shuffle)
    batches = ids(iterator, 6 * num_prompts)
    assert all(len(set(batch)) == batch_size for batch in batches)
    stream = sum(batches, [])
    for start in range(0, len(stream) - num_prompts + 1, num_prompts):
        assert sorted(stream[start : start + num_prompts], key=int) == [str(i) for i in range(num_prompts)]
    if not shuffle:
        assert stream[: 2 * num_prompts] == [str(i) for i in range(num_prompts)] * 2


def test_order_depends_on_seed_and_epoch_only():
    one, same, other = (PromptIterator(make_prompts(50), 5, seed=seed) for seed in (1, 1, 2))
    first, again, different = ids(one, 20), ids(same, 20), ids(other, 20)
    assert first == again != different
    assert first[:10] != first[10:]  # reshuffled
    assert first[0] == ["15", "32", "25", "40", "12"]  # the same on every machine and in every process


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7, 10, 23])
def test_resume_goes_on_with_the_same_batches(stop):
    whole = PromptIterator(make_prompts(10), 3, seed=5)
    batches = ids(whole, 40)
    part = PromptIterator(make_prompts(10), 3, seed=5)
    ids(part, stop)
    state = json.loads(json.dumps(part.state_dict()))
    resumed = PromptIterator(make_prompts(10), 3, seed=5)
    resumed.load_state_dict(state)
    assert ids(resumed, 40 - stop) == batches[stop:]


def test_resume_with_another_batch_size_still_visits_each_prompt_once():
    part = PromptIterator(make_prompts(10), 3, seed=5)
    seen = sum(ids(part, 4), [])  # 12 prompts: two into the second epoch
    resumed = PromptIterator(make_prompts(10), 4, seed=5)
    resumed.load_state_dict(part.state_dict())
    seen += sum(ids(resumed, 2), [])
    assert sorted(seen[10:], key=int) == [str(i) for i in range(10)]


def test_iterator_refusals_are_one_line():
    with pytest.raises(DataError, match="rollout.num_prompts=4 is more than the 3 rows"):
        PromptIterator(make_prompts(3), 4, seed=1)
    with pytest.raises(DataError, match="at least 1"):
        PromptIterator(make_prompts(3), 0, seed=1)
    state = PromptIterator(make_prompts(3), 2, seed=1).state_dict()
    for other, what in (
        (PromptIterator(make_prompts(4), 2, seed=1), "other rows"),
        (PromptIterator(make_prompts(3), 2, seed=2), "run.seed"),
        (PromptIterator(make_prompts(3), 2, seed=1, shuffle=False), "data.shuffle"),
    ):
        with pytest.raises(DataError, match=what):
            other.load_state_dict(state)
