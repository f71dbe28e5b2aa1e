"""data/prompts.py and data/rows.py: the strict reader of JSONL, parquet, Arrow and directories, and
the resumable order.

Proves that every kind of bad row is refused with one line that names the file, the line and what to
do; that all formats give the same prompts; which directories are refused; and that the iterator
visits every prompt once an epoch, never twice in a batch, and resumes exactly. The `datasets`
directory is written here as Dataset.save_to_disk lays it out. Does not prove that any tokenizer
accepts the text.
"""

import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from megasd.algo.recipes import RECIPES
from megasd.config.load import load_config
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
    # CRLF, and no newline at the end
    content = b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows)
    first, second = load_prompts(write(tmp_path, content))
    assert first == Prompt("a", [{"role": "user", "content": "7+8="}], "15", "7+8=15")
    assert (
        second.id == "rows-1" and second.messages[-1]["content"] == "ü 1\u2028x" and second.solution is None
    )


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
    "NaN": (b'{"prompt": "1", "answer": "1", "x": NaN}', "NaN is no JSON number"),
    "two questions": (b'{"prompt": "1", "question": "2", "answer": "1"}', '"prompt" and "question" disagree'),
    "two answers": (b'{"prompt": "1", "answer": "1", "label": "2"}', '"answer" and "label" disagree'),
    "two solutions": (
        (
            b'{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],'
            b' "answer": "1", "solution": "3"}'
        ),
        '"messages" and "solution" disagree',
    ),
    "label a number": (b'{"prompt": "1", "label": 1}', '"label" is a JSON number'),
    "ground truth a number": (
        b'{"prompt": "1", "reward_model": {"ground_truth": 1}}',
        '"reward_model.ground_truth" is a JSON number',
    ),
    "pass rate": (
        b'{"prompt": "1", "answer": "1", "pass_rate": 1.01}',
        '"pass_rate" is 1.01; give a number from 0 to 1',
    ),
    "pass rate true": (b'{"prompt": "1", "answer": "1", "pass_rate": true}', '"pass_rate" is True'),
    "rubric": (
        b'{"prompt": "1", "answer": "1", "rubric": [{"rule": ["x"]}]}',
        '"rubric[0]" must be an object of strings and numbers',
    ),
    "capital": (b'{"prompt": "1", "answer": "1", "Solution": "2"}', "did you mean 'solution'"),
    "deep nesting": (b'{"x":' + b"[" * 90 + b"}", "not valid JSON"),
    "empty messages": (b'{"prompt": [], "answer": "1"}', "empty list"),
    "bad role": (b'{"prompt": [{"role": "human", "content": "1"}], "answer": "1"}', "has role 'human'"),
    "list role": (b'{"prompt": [{"role": ["user"], "content": "1"}], "answer": "1"}', "has role"),
    "no content": (b'{"prompt": [{"role": "user"}], "answer": "1"}', 'exactly "role" and "content"'),
    "empty content": (b'{"prompt": [{"role": "user", "content": ""}], "answer": "1"}', "prompt[0].content"),
    "parts content": (b'{"prompt": [{"role": "user", "content": ["1"]}], "answer": "1"}', "JSON array"),
    "string message": (b'{"prompt": ["1"], "answer": "1"}', "prompt[0]"),
    "assistant last": (
        (
            b'{"prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}], "answer":'
            b' "1"}'
        ),
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
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.gz").write_bytes(gzip.compress(GOOD))
    (tmp_path / "rows.parquet").write_bytes(GOOD)
    (tmp_path / "rows.arrow").write_bytes(GOOD)
    for path, reason in (
        (tmp_path / "missing.jsonl", "no such file"),
        (tmp_path / "folder", "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (write(tmp_path, b""), "no rows"),
        (tmp_path / "rows.gz", "compressed .gzip.; unpack it first"),
        (tmp_path / "rows.parquet", "cannot be read as parquet after row 0"),
        (tmp_path / "rows.arrow", "cannot be read as arrow after row 0"),
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


ROWS = [
    {
        "id": f"r{i}",
        "prompt": [{"role": "user", "content": f"{i}+1="}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "solution": "thus" if i % 2 else None,
        "pass_rate": 0.5,
        "rubric": [{"rule": "contains", "value": str(i + 1)}],
        "extra_info": {"i": i},
    }
    for i in range(500)
]


def write_stream(path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=200)


def save_to_disk(directory, rows: list[dict]) -> None:
    """Two Arrow streams and state.json, as `datasets` writes them; the second file's name sorts
    before the first's.
    """
    directory.mkdir()
    write_stream(directory / "data-b.arrow", rows[:300])
    write_stream(directory / "data-a.arrow", rows[300:])
    (directory / "dataset_info.json").write_text("{}")
    state = {
        "_data_files": [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}],
        "_split": "train",
        "_format_type": None,
    }
    (directory / "state.json").write_text(json.dumps(state))


def test_every_format_gives_the_same_prompts(tmp_path):
    path = write(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    expected = load_prompts(path)
    assert expected[1] == Prompt(
        "r1", [{"role": "user", "content": "1+1="}], "2", "thus", 0.5, [{"rule": "contains", "value": "2"}]
    )
    table = pa.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "one.parquet", row_group_size=70)
    write_stream(tmp_path / "stream.arrow", ROWS)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "parquet_without_suffix").write_bytes((tmp_path / "one.parquet").read_bytes())
    save_to_disk(tmp_path / "saved", ROWS)
    (tmp_path / "shards").mkdir()
    for i in range(2):
        parquet.write_table(
            table.slice(250 * i, 250), tmp_path / "shards" / f"train-0000{i}-of-00002.parquet"
        )
    (tmp_path / "shards" / "README.md").write_text("what this is")
    (tmp_path / "lines").mkdir()
    for name, rows in (("a.jsonl", ROWS[:1]), ("b.jsonl", ROWS[1:])):
        (tmp_path / "lines" / name).write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    for name in (
        "one.parquet",
        "stream.arrow",
        "file.arrow",
        "parquet_without_suffix",
        "saved",
        "shards",
        "lines",
    ):
        assert load_prompts(tmp_path / name) == expected, name


def test_a_bad_row_of_a_table_is_named_by_file_and_row(tmp_path):
    rows = [{"prompt": f"{i}=", "answer": str(i)} for i in range(400)]
    save_to_disk(tmp_path / "saved", rows[:350] + [{"prompt": " ", "answer": "1"}])
    with pytest.raises(DataError, match=r'saved/data-a.arrow:51: "prompt" is empty'):
        load_prompts(tmp_path / "saved")
    parquet.write_table(
        pa.Table.from_pylist([*rows, {"prompt": "x" * 5000, "answer": "1"}]), tmp_path / "long.parquet"
    )
    with pytest.raises(DataError, match="long.parquet:401: row is longer than data.max_row_bytes=1000"):
        load_prompts(tmp_path / "long.parquet", max_row_bytes=1000)
    not_text = pa.table(
        {"prompt": pa.array([b"a", b"\xff"]).cast(pa.binary()).view(pa.utf8()), "answer": ["1", "2"]}
    )
    parquet.write_table(not_text, tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="bytes.parquet:2: not UTF-8"):
        load_prompts(tmp_path / "bytes.parquet")
    parquet.write_table(pa.table({"prompt": ["1="], "answer": [1]}), tmp_path / "number.parquet")
    with pytest.raises(DataError, match='number.parquet:1: "answer" is a JSON number'):
        load_prompts(tmp_path / "number.parquet")
    parquet.write_table(
        pa.Table.from_pylist([rows[0] | {"id": "a"}, rows[1] | {"id": "a"}]), tmp_path / "ids.parquet"
    )
    with pytest.raises(DataError, match="ids.parquet:2: id 'a' was used on line 1"):
        load_prompts(tmp_path / "ids.parquet")


def test_directories_that_mix_or_lack_files_are_refused(tmp_path):
    def directory(name: str, *files: str):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(GOOD)
        return tmp_path / name

    (split := directory("dict")).joinpath("dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (indices := directory("indices")).joinpath("state.json").write_text(
        '{"_data_files": [{"filename": "a"}], "_indices_data_files": [{}]}'
    )
    (gone := directory("gone")).joinpath("state.json").write_text(
        '{"_data_files": [{"filename": "a.arrow"}]}'
    )
    (outside := directory("outside")).joinpath("state.json").write_text(
        '{"_data_files": [{"filename": "../rows.jsonl"}]}'
    )
    write(tmp_path, GOOD)
    for path, reason in (
        (split, "holds the splits train, test; give one of them, as .*dict/train"),
        (indices, "selection by indices; save it again after dataset.flatten_indices"),
        (gone, "names 'a.arrow', which is not in the directory"),
        (outside, "which is not in the directory"),
        (directory("mixed", "a.jsonl", "b.parquet"), "holds .jsonl and .parquet files"),
        (
            directory("splits", "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
            r"more than one split \(test, train\)",
        ),
        (directory("names", "train.jsonl", "test.jsonl"), r"more than one split \(test, train\)"),
        (
            directory("missing", "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"),
            "shard train-00001-of-00003 is missing",
        ),
        (directory("empty", "README.md"), "holds no .jsonl or .parquet or .arrow file"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            load_prompts(path)
        assert "\n" not in str(caught.value)


def test_columns_of_the_ecosystem(tmp_path):
    question = [{"role": "user", "content": "7+8="}]
    rows = [
        {"messages": [*question, {"role": "assistant", "content": "7+8=15"}], "answer": "15"},
        {"question": "7+8=", "label": "15", "solution": "7+8=15"},
        {"problem": "7+8=", "answer": "15", "reward_model": {"ground_truth": "15"}, "solution": "7+8=15"},
        {
            "prompt": question,
            "question": "7+8= ",
            "answer": " 15",
            "label": "15",
            "solution": "7+8=15",
            "question_id": 3,
            "uid": 4,
        },
        {
            "prompt": "7+8=",
            "question": None,
            "answer": "15",
            "messages": [*question, {"role": "assistant", "content": "7+8=15"}],
        },
    ]
    path = write(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    for prompt in load_prompts(path):
        assert (prompt.messages, prompt.answer.strip(), prompt.solution) == (question, "15", "7+8=15")


def test_pass_rates_and_rubrics_belong_to_the_fingerprint_and_their_absence_does_not():
    plain, rated = make_prompts(3), make_prompts(3)
    before = PromptIterator(plain, 2, seed=1).fingerprint
    # as of runs begun without those fields
    assert before == "0220709b9d90ab6e"
    rated[0].pass_rate = 0.5
    assert PromptIterator(rated, 2, seed=1).fingerprint != before


def test_directories_of_rows_pass_the_command_lines_check(tmp_path):
    from megasd.config.validate_files import check_data

    save_to_disk(tmp_path / "saved", ROWS)
    check_data(
        load_config([], ["model.path=m", f"data.train={tmp_path / 'saved'}", "data.mapping=auto"], RECIPES)
    )


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
    # reshuffled
    assert first[:10] != first[10:]
    # the same on every machine and in every process
    assert first[0] == ["15", "32", "25", "40", "12"]


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
    # 12 prompts: two into the second epoch
    seen = sum(ids(part, 4), [])
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
