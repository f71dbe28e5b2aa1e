"""rewards/reward_pool.py and its workers: verdicts, and that no check can hang, kill or mislead a run.

Proves, with real worker processes: the verdicts of math-verify that depend on pinned versions; that
a check hung in Python, hung in C, out of memory, raising or killed takes down neither the pool nor
another row's verdict; that an orphaned worker ends by itself; the bomb suite: towers, LaTeX and
programs made to hang or break end within their limit + 1 s, neither right nor wrong, and the pool
goes on; what feedback says, and that it never holds the expected answer. The hostile checks run in
the real worker loop with a check function that misbehaves on request, the bombs in math-verify and
in sandboxes themselves (what programs may do there: test_sandbox.py). Does not prove that
math-verify is right in general.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megasd.config.schema import RewardConfig
from megasd.rewards import sandbox
from megasd.rewards.math_answers import MAX_ANSWER_CHARACTERS
from megasd.rewards.reward_pool import RewardPool
from megasd.types import Group, Prompt, Sample, UserError, Verdict
from tests.clock import Clock

R, W, E, T = Verdict.RIGHT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT

MISBEHAVING_WORKER = """
import os, signal, sys, time
from megasd.rewards import worker as verify_worker

def check(answer, gold):
    print("noise on stdout")
    began = sys.argv[1] + ".began"
    if answer == "wait to be killed" and not os.path.exists(began):
        open(began, "w").close()
        time.sleep(60)
    open(began, "w").close()
    if answer == "hang in Python":
        time.sleep(60)
    if answer == "hang in C":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "die once" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os._exit(3)
    if answer == "raise":
        raise ValueError("bad\\nnews")
    if answer == "memory":
        bytearray(1 << 40)
    if answer == "slow":
        time.sleep(0.4)
    return answer.startswith("yes")

verify_worker.main(sys.argv[2:], check)
"""


def make_group(answers: list[str], gold: str = "g", name: str = "p") -> Group:
    prompt = Prompt(name, [{"role": "user", "content": "?"}], gold)
    texts = [answer if "\\boxed" in answer else f"so \\boxed{{{answer}}}." for answer in answers]
    return Group(prompt, [Sample(name, i, [1], [2], [-0.1], text, "stop", 0) for i, text in enumerate(texts)])


def verdicts(group: Group) -> list[Verdict]:
    return [sample.verdict for sample in group.samples]


@pytest.fixture
def misbehaving(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(MISBEHAVING_WORKER)
    return [sys.executable, str(script), str(tmp_path / "died")]


@pytest.fixture(scope="module")
def math_pool():
    with RewardPool(RewardConfig(verifier="math", workers=2, timeout=6.0)) as pool:
        yield pool


def test_plain_verifiers_need_no_worker():
    for verifier, texts, expected in (
        ("exact_match", [" 933\n", "0933", "<think>x</think>933", ""], [R, W, R, W]),
        ("multiple_choice", ["<answer>933</answer>", "<answer>93</answer>", "A", "?"], [R, W, W, W]),
    ):
        group = Group(
            Prompt("p", [{"role": "user", "content": "?"}], "933 "),
            [Sample("p", i, [], [], [], t, "stop", 0) for i, t in enumerate(texts)],
        )
        with RewardPool(RewardConfig(verifier=verifier)) as pool:
            counts = pool.score([group])
            assert pool.runner.num_workers == 0
        assert verdicts(group) == expected
        assert counts == {
            "right": expected.count(R),
            "wrong": expected.count(W),
            "error": 0.0,
            "timeout": 0.0,
            "restarts": 0.0,
        }


@pytest.mark.parametrize(
    "answer, gold, verdict",
    [
        # wrong under antlr 4.9.3: the pin of antlr4-python3-runtime
        ("10\\%", "0.1", R),
        ("0.1", "10\\%", R),
        ("\\frac12", "0.5", R),
        ("x=3", "3", R),
        ("1,000", "1000", R),
        ("12,34", "1234", W),
        ("(1,2)", "(1,2)", R),
        ("(2,1)", "(1,2)", W),
        ("\\sqrt{8}", "2\\sqrt{2}", R),
        ("\\text{Tuesday}", "Tuesday", R),
        ("Monday", "Tuesday", W),
        ("\\frac{", "1", W),
        # the gold answer's last box
        ("7", "\\boxed{42} \\boxed{7}", R),
        ("$5$", "5", R),
        ("é", "1", W),
    ],
)
def test_math_verdicts(math_pool, answer, gold, verdict):
    group = make_group([answer], gold)
    math_pool.score([group])
    assert verdicts(group) == [verdict], group.samples[0].detail


def test_a_hostile_answer_to_math_verify_costs_only_its_own_row():
    """10^(10^10) is ten billion digits to compute: minutes without a deadline (seen: more than 170 s)."""
    with RewardPool(RewardConfig(verifier="math", workers=2, timeout=3.0)) as pool:
        groups = [make_group(["10^{10^{10}}", "3/6", "7"], "0.5"), make_group(["2/4", "8"], "1/2", name="q")]
        clock = Clock()
        counts = pool.score(groups)
        assert clock.within(60)
        assert verdicts(groups[0])[1:] == [R, W] and verdicts(groups[1]) == [R, W]
        # ERROR where memory ran out first
        assert verdicts(groups[0])[0] in (T, E)
        assert groups[0].pass_rate == 0.5 and counts["timeout"] + counts["error"] == 1


def test_misbehaving_checks_leave_the_other_rows_alone(misbehaving, caplog):
    answers = [
        "yes",
        "hang in Python",
        "no",
        "hang in C",
        "die",
        "die once",
        "raise",
        "memory",
        "yes 2",
        "slow",
    ]
    with RewardPool(
        RewardConfig(verifier="math", workers=2, timeout=3.0), worker_command=misbehaving
    ) as pool:
        group = make_group(answers)
        counts = pool.score([group])
        assert verdicts(group) == [R, T, W, T, E, W, E, E, R, W]
        details = {answer: sample.detail for answer, sample in zip(answers, group.samples, strict=True)}
        assert (
            "within 3 s; answer" in details["hang in Python"]
            and "the worker was killed" in details["hang in C"]
        )
        assert "died twice: killed by SIGKILL" in details["die"]
        assert details["raise"].startswith("ValueError: bad news") and details["memory"].startswith(
            "MemoryError"
        )
        assert "'die'" in details["die"] and details["yes"] == details["die once"] == ""
        # only right and wrong count
        assert group.pass_rate == 2 / 5
        assert counts == {"right": 2, "wrong": 3, "error": 3, "timeout": 2, "restarts": 4}
        assert (
            len([r for r in caplog.records if r.levelname == "WARNING"]) == 5
            and "row p, sample 1: verifier timeout" in caplog.text
        )

        # the pool survives, with all of its workers
        again = make_group(["yes", "no"] * 20)
        assert pool.score([again])["right"] == 20 and pool.runner.num_workers == 2


def test_a_worker_killed_from_outside_is_replaced(misbehaving):
    began = Path(misbehaving[-1] + ".began")
    with RewardPool(
        RewardConfig(verifier="math", workers=1, timeout=50.0), worker_command=misbehaving
    ) as pool:
        pool.score([make_group(["yes"])])
        # idle
        os.kill(pool.runner.workers.workers[0].process.pid, signal.SIGKILL)
        group = make_group(["slow", "yes"])
        assert pool.score([group])["restarts"] == 1 and verdicts(group) == [W, R]

        # in the middle of a check
        def kill(pid: int) -> None:
            while not began.exists():
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)

        began.unlink()
        threading.Thread(target=kill, args=(pool.runner.workers.workers[0].process.pid,), daemon=True).start()
        group = make_group(["wait to be killed", "yes"])
        # sent a second time
        assert pool.score([group])["restarts"] == 1 and verdicts(group) == [W, R]


def test_equal_checks_run_once(misbehaving):
    with RewardPool(
        RewardConfig(verifier="math", workers=1, timeout=0.3), worker_command=misbehaving
    ) as pool:
        run, requested = pool.runner.workers.run, []
        pool.runner.workers.run = lambda requests: (requested.extend(requests), run(requests))[1]
        group = make_group(["hang in Python"] * 30)
        assert pool.score([group])["timeout"] == 30 and len(requested) == 1
        assert group.pass_rate is None


def test_long_answers_and_odd_characters_do_not_block(misbehaving):
    long = "\U0001f600" * MAX_ANSWER_CHARACTERS
    with RewardPool(
        RewardConfig(verifier="math", workers=1, timeout=5.0), worker_command=misbehaving
    ) as pool:
        group = make_group(["yes" + long[:-3], "yes" + long, "yes \n\x00\x85\u2028 \ud800"], gold=long)
        pool.score([group])
        assert verdicts(group) == [R, E, R] and "more than 4096" in group.samples[1].detail
        group = make_group(["yes"], gold=long + "x")
        pool.score([group])
        assert verdicts(group) == [E]


def test_workers_that_cannot_start_are_one_error(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no module named what')"]
    with RewardPool(RewardConfig(verifier="math"), worker_command=command) as pool:
        with pytest.raises(UserError, match="do not start: exit status 1; no module named what") as caught:
            pool.score([make_group(["1"])])
        assert "\n" not in str(caught.value) and pool.runner.num_workers == 0


def test_an_orphan_in_a_hung_check_ends(misbehaving, tmp_path):
    parent = f"""
import os, threading, time
from megasd.config.schema import RewardConfig
from megasd.rewards.reward_pool import RewardPool
from megasd.types import Group, Prompt, Sample
pool = RewardPool(RewardConfig(verifier="math", workers=1, timeout=3.0), worker_command={misbehaving!r})
score = lambda text: pool.score([Group(Prompt("p", [], "g"), [Sample("p", 0, [], [], [], text, "stop", 0)])])
score("\\\\boxed{{yes}}")
print(pool.runner.workers.workers[0].process.pid, flush=True)
began = {misbehaving[-1] + ".began"!r}
os.unlink(began)
def leave():
    while not os.path.exists(began):
        time.sleep(0.01)
    os._exit(1)
threading.Thread(target=leave, daemon=True).start()
score("\\\\boxed{{hang in C}}")
"""
    run = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=400)
    assert run.returncode == 1, run.stderr
    pid, end = int(run.stdout), time.monotonic() + 120
    while os.path.exists(f"/proc/{pid}") and not is_zombie(pid):
        assert time.monotonic() < end, "the orphan lives on"
        time.sleep(0.1)


def is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_workers_import_neither_torch_nor_transformers():
    program = (
        "import sys; from megasd.rewards import math_answers, reward_pool, worker;"
        "assert 'sympy' not in sys.modules;"
        "math_answers.check_math('1', '2'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=400)


def test_bad_settings_are_one_line():
    for config in (RewardConfig(verifier="nonsense"), RewardConfig(workers=0), RewardConfig(timeout=0.0)):
        with pytest.raises(UserError, match="reward"):
            RewardPool(config)


# ---- bombs ----

BOMB_SECONDS = 0.6
MATH_BOMBS = {
    "tower": "9^{9^{9^{9}}}",
    "power of a power": "10^{10^{10}}",
    "factorial": "(10^{9})!",
    "integral": r"\int_0^1 \sin(\cos(\tan(x^{x^{x}}))) dx",
    "product": r"\prod_{i=1}^{10^{9}} i",
    "deep braces": "{" * 1500 + "1" + "}" * 1500,
    "deep fractions": r"\frac{1}{" * 400 + "2" + "}" * 400,
    "deep roots": r"\sqrt{" * 500 + "2" + "}" * 500,
    "long product": "*".join(["(x+1)"] * 600),
    "huge": "1+" * 500_000 + "1",
}


@pytest.fixture(scope="module")
def bomb_pool():
    with RewardPool(RewardConfig(verifier="math", workers=1, timeout=BOMB_SECONDS)) as pool:
        # a worker is up
        pool.score([make_group(["1/2"], "0.5")])
        yield pool
        # on a busy machine this too may run out of its time
        for _ in range(50):
            warm = make_group(["3/6"], "0.5")
            pool.score([warm])
            if verdicts(warm) != [T]:
                break
        # after all of them the pool goes on
        assert verdicts(warm) == [R]


@pytest.mark.parametrize("name", MATH_BOMBS)
def test_a_math_bomb_costs_its_limit_and_is_neither_right_nor_wrong(bomb_pool, name):
    group = make_group([MATH_BOMBS[name]], "0.5")
    # the last bomb had to be killed; starting is no part of a check's time
    if not bomb_pool.runner.workers.workers[0].ready:
        bomb_pool.score([make_group(["2/4"], "0.5")])
    clock = Clock()
    bomb_pool.score([group])
    assert clock.within(BOMB_SECONDS + 1)
    assert verdicts(group)[0] in (T, E) and group.pass_rate is None, group.samples[0].detail


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


def code_group(programs: list[str], **tests: object) -> Group:
    answer = json.dumps(
        {"inputs": ["3 4\n", "5 6\n"], "outputs": ["7", "11\n"], "fn_name": None, "time_limit": 5} | tests
    )
    samples = [Sample("c", i, [1], [2], [-0.1], program, "stop", 0) for i, program in enumerate(programs)]
    return Group(Prompt("c", [{"role": "user", "content": "Add."}], answer), samples)


def no_sandbox() -> bool:
    try:
        return not sandbox.find_kind()
    except UserError:
        return True


needs_sandbox = pytest.mark.skipif(no_sandbox(), reason="no sandbox works on this machine")
ADD = "a, b = map(int, input().split())\nprint(a + b)"
CODE_BOMBS = {
    "loop": "while True: pass",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "x = bytearray(1 << 40)",
    "flood": "while True: print('x' * 1000)",
    "network": "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)",
    "network, and then the answer": (
        f"import urllib.request\ntry: urllib.request.urlopen('http://192.0.2.1')\nexcept OSError: pass\n{ADD}"
    ),
    "child that stays": f"import os, time\nif os.fork() == 0: time.sleep(60)\n{ADD}",
    "after the first test": f"{ADD}\nif a == 5:\n    while True: pass",
}


@needs_sandbox
@pytest.mark.parametrize("name", CODE_BOMBS)
def test_a_code_bomb_costs_its_limit_and_is_neither_right_nor_wrong(name):
    with RewardPool(RewardConfig(verifier="code", workers=2, code_memory_mib=256)) as pool:
        seconds = 1.0 if name in ("loop", "fork bomb", "child that stays", "after the first test") else 5.0
        group, fine = (
            code_group([fenced(CODE_BOMBS[name])], time_limit=seconds),
            code_group([fenced(ADD)], time_limit=50),
        )
        clock = Clock()
        pool.score([group, fine])
        # a sandbox to start and two tests; test_sandbox.py times the runs
        assert clock.within(seconds + 1.5)
    assert verdicts(group)[0] in (T, E) and verdicts(fine) == [R]
    assert group.pass_rate is None and group.samples[0].detail.startswith("test ")


@needs_sandbox
def test_programs_are_right_only_when_every_test_passes():
    texts = [
        fenced(ADD),
        fenced("a, b = map(int, input().split())\nprint(7)"),
        fenced("print(1 / 0)"),
        "no program",
        # cut off
        "```python\nprint(7)",
        # the last block counts
        fenced("print(7)") + fenced(ADD),
        f"<think>{fenced(ADD)}</think>{fenced('print(7)')}",
        # lines are stripped
        fenced("a, b = map(int, input().split())\nprint(f' {a + b} \\n\\n')"),
    ]
    with RewardPool(RewardConfig(verifier="code", workers=2)) as pool:
        group = code_group(texts)
        pool.score([group])
        assert verdicts(group) == [R, W, W, W, W, R, W, R]
        feedback = [sample.feedback for sample in group.samples]
        assert feedback[0] == "" and "gave a wrong result on this input:\n5 6\nIt printed:\n7" in feedback[1]
        assert (
            "ZeroDivisionError" in feedback[2]
            and "sandbox_program" not in feedback[2]
            and 'File "program.py", line 1' in feedback[2]
        )
        assert feedback[3] == feedback[4] == "No complete fenced code block was found."
        # nowhere what was expected
        assert not any("11" in text for text in feedback)

        method = "class Solution:\n    def add(self, a, b):\n        print('noise')\n        return [a + b]"
        tests = {"inputs": ["3\n4", [5, 6]], "outputs": ["[7]", [11]], "fn_name": "add"}
        group = code_group(
            [fenced(method), fenced("def add(a, b): return (a + b,)"), fenced("def sub(a): pass")], **tests
        )
        group.samples.append(
            Sample("c", 3, [1], [2], [-0.1], fenced("def add(a, b): return a + b"), "stop", 0)
        )
        pool.score([group])
        assert verdicts(group) == [R, R, W, W] and "defines no function add" in group.samples[2].feedback

        slow = code_group([fenced("import time; time.sleep(0.4)\n" + ADD)] * 2)
        with RewardPool(RewardConfig(verifier="code", code_seconds=0.5)) as short:
            short.score([slow])
        # each test is in time, both are not
        assert verdicts(slow) == [T, T]


def test_a_row_without_tests_is_named_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(sandbox, "find_kind", lambda: "namespaces")
    pool = RewardPool(RewardConfig(verifier="code"))
    for answer in ("7", "{}", '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}', "[1]"):
        with pytest.raises(UserError, match='row c: "answer" holds no tests') as caught:
            pool.check_rows([Prompt("c", [], answer)])
        assert "\n" not in str(caught.value)
    group = Group(Prompt("c", [], "7"), code_group([fenced(ADD)]).samples)
    pool.score([group])
    assert verdicts(group) == [E] and "holds no tests" in group.samples[0].detail


def test_no_sandbox_no_pool(monkeypatch):
    monkeypatch.setattr(sandbox, "probe_sandbox", lambda kind: "not here")
    sandbox.find_kind.cache_clear()
    try:
        with pytest.raises(UserError, match="no sandbox works on this machine"):
            RewardPool(RewardConfig(verifier="code"))
    finally:
        monkeypatch.undo()
        sandbox.find_kind.cache_clear()


def test_feedback_says_what_is_wrong_and_not_what_is_right():
    for verifier, gold, texts, words in (
        (
            "math",
            "933",
            [r"\boxed{12}", "12", r"\boxed{933}"],
            ["not equal to the reference", "No \\boxed{} answer", ""],
        ),
        (
            "multiple_choice",
            "C",
            ["<answer>B</answer>", "none", "C"],
            ["not the right one", "No chosen option", ""],
        ),
        (
            "exact_match",
            "933",
            ["12", "<think>", "933"],
            ["not the expected text", "No answer was found", ""],
        ),
    ):
        samples = [Sample("p", i, [], [], [], text, "stop", 0) for i, text in enumerate(texts)]
        with RewardPool(RewardConfig(verifier=verifier)) as pool:
            pool.score([Group(Prompt("p", [], gold), samples)])
        assert [word in sample.feedback for word, sample in zip(words, samples, strict=True)] == [True] * 3
        assert samples[2].feedback == "" and not any(gold in sample.feedback for sample in samples[:2])
