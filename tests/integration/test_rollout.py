"""The rollout against a real SGLang server on the CPU and Hugging Face transformers on the same weights.

Proves: P x G samples exactly once, in order, with log-probs of the sampled tokens; pushes change
what is computed and what is stamped; what would kill or fool the engine is refused before it is
sent; a dead scheduler, a dead server and a frozen one lose and double nothing and never bring the
start weights back; URLs; no process outlives the trainer. Does not prove: CUDA, several engines at
once on several machines, tensor parallelism of the engine, speed.
"""

from __future__ import annotations

import functools
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from megasd.config.schema import EngineConfig, RolloutConfig
from megasd.engine.client import EngineClient
from megasd.engine.errors import EngineError
from megasd.engine.sampler import Sampler, make_sampler
from megasd.types import Group, Prompt, UserError
from tests.launch import generating

VOCAB, STOP, CONTEXT = 128, 2, 512
# seconds; a safety net
PATIENCE = 120
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def make_model(directory: Path, seed: int) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(directory)
    return directory


@functools.cache
def hf_model(directory: Path) -> torch.nn.Module:
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)


def hf_logps(
    directory: Path, prompt_ids: list[int], response_ids: list[int], temperature: float
) -> torch.Tensor:
    with torch.no_grad():
        logits = hf_model(directory)(torch.tensor([prompt_ids + response_ids])).logits[0]
    logps = torch.log_softmax(logits / temperature, dim=-1)[len(prompt_ids) - 1 : -1]
    return logps.gather(1, torch.tensor(response_ids)[:, None]).squeeze(1)


def hf_greedy(directory: Path, ids: list[int], n: int) -> list[int]:
    model, out = hf_model(directory), []
    with torch.no_grad():
        while len(out) < n and STOP not in out:
            out.append(int(model(torch.tensor([ids + out])).logits[0, -1].argmax()))
    return out


def questions(num: int, *, length: int = 12) -> tuple[list[Prompt], list[list[int]]]:
    generator = torch.Generator().manual_seed(num)
    ids = [torch.randint(3, VOCAB, (length + p % 5,), generator=generator).tolist() for p in range(num)]
    return [Prompt(f"q{p}", [{"role": "user", "content": "?"}], "") for p in range(num)], ids


def decode(ids: list[int]) -> str:
    return " ".join(str(token) for token in ids if token != STOP)


def ask(
    rollout: Sampler,
    num: int,
    num_samples: int,
    max_response_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Group]:
    prompts, ids = questions(num)
    return rollout.generate(
        prompts,
        ids,
        decode,
        step=0,
        num_samples=num_samples,
        temperature=temperature,
        top_p=top_p,
        max_response_tokens=max_response_tokens,
    )


def check_groups(
    groups: list[Group],
    directory: Path,
    num: int,
    num_samples: int,
    *,
    version: int,
    temperature: float = 1.0,
    compare: int = 8,
) -> None:
    """Exactly P x G samples in order, of one version, with the log-probs that transformers gives
    them under `directory`.
    """
    prompts, ids = questions(num)
    assert [group.prompt for group in groups] == prompts
    assert [[(s.prompt_id, s.index) for s in group.samples] for group in groups] == [
        [(p.id, g) for g in range(num_samples)] for p in prompts
    ]
    samples = [s for group in groups for s in group.samples]
    assert {s.version for s in samples} == {version}
    assert all(
        s.prompt_ids == ids[i // num_samples] and s.text == decode(s.response_ids)
        for i, s in enumerate(samples)
    )
    long = [tuple(s.response_ids) for s in samples if len(s.response_ids) > 4]
    # no output was given out twice
    assert len(set(long)) == len(long)
    for sample in samples[:: max(1, len(samples) // compare)]:
        expected = hf_logps(directory, sample.prompt_ids, sample.response_ids, temperature)
        assert (torch.tensor(sample.response_logps) - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("start"), 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="module")
def rollout(start: Path, tmp_path_factory: pytest.TempPathFactory):
    """One engine for the whole file, started (and restarted) as by a torchrun rank. Afterwards none
    of its processes is left.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TORCHRUN.items():
            patch.setenv(name, value)
        config = RolloutConfig(engine=EngineConfig(start_timeout=500, max_restarts=2))
        with make_rollout(config, start, tmp_path_factory.mktemp("run")) as rollout:
            tree = engine_processes(rollout)
            yield rollout
            tree += engine_processes(rollout)
        assert not psutil.wait_procs(tree, timeout=PATIENCE)[1]


def engine_processes(rollout: Sampler) -> list[psutil.Process]:
    """The server first, then its children; none when it is down."""
    if rollout.pool.engines[0].process is None:
        return []
    server = psutil.Process(rollout.pool.engines[0].process.pid)
    return [server, *server.children(recursive=True)]


def make_rollout(config: RolloutConfig, model_path: Path, run_dir: Path) -> Sampler:
    return make_sampler(
        config,
        model_path=str(model_path),
        device="cpu",
        dtype="float32",
        run_dir=run_dir,
        seed=1,
        stop_token_ids=[STOP],
        vocab_size=VOCAB,
    )


@pytest.mark.parametrize("temperature, max_response_tokens", [(1.0, 6), (0.7, 40)])
def test_samples_match_transformers(
    rollout: Sampler, start: Path, temperature: float, max_response_tokens: int
) -> None:
    groups = ask(rollout, 6, 4, max_response_tokens, temperature=temperature)
    check_groups(groups, start, 6, 4, version=0, temperature=temperature)
    tokens = sum(len(s.response_ids) for group in groups for s in group.samples)
    assert {k: v for k, v in rollout.stats.items() if k != "seconds"} == {
        "samples": 24,
        "response_tokens": tokens,
        "retries": 0,
        "restarts": 0,
        "aborted": 0,
        "stale": 0,
    }


def test_logps_are_those_before_top_p(rollout: Sampler, start: Path) -> None:
    check_groups(ask(rollout, 4, 4, 12, top_p=0.7), start, 4, 4, version=0)


def test_responses_end_at_the_stop_token(rollout: Sampler) -> None:
    samples = [s for group in ask(rollout, 8, 8, 60) for s in group.samples]
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for sample in samples:
        if sample.finish_reason == "stop":
            assert sample.response_ids.index(STOP) == len(sample.response_ids) - 1
        else:
            assert STOP not in sample.response_ids and len(sample.response_ids) == 60


def test_greedy_and_score_match_transformers(rollout: Sampler, start: Path) -> None:
    for ids in questions(4)[1]:
        response, logps = rollout.greedy(ids, 10)
        assert response == hf_greedy(start, ids, 10)
        assert (torch.tensor(logps) - hf_logps(start, ids, response, 1.0)).abs().max() < 1e-4
        assert (torch.tensor(rollout.score(ids)) - hf_logps(start, ids[:1], ids[1:], 1.0)).abs().max() < 1e-4


def test_what_the_engine_could_not_take_is_refused_first(rollout: Sampler, start: Path) -> None:
    prompts, ids = questions(2)
    settings = dict(step=0, num_samples=1, temperature=1.0, top_p=1.0)
    for bad, room, words in (
        ([[5], [VOCAB]], 4, "prompt q1: token id 128"),
        ([[5], [-1]], 4, "prompt q1: token id -1"),
        ([[5], []], 4, "prompt q1: the prompt is empty"),
        (ids, CONTEXT - 2, "prompt q0: 12 prompt [+] 510 response tokens exceed the engine's 510"),
    ):
        with pytest.raises(UserError, match=words):
            rollout.generate(prompts, bad, decode, max_response_tokens=room, **settings)
    # the bound is exact: all the room is used, and not silently less
    sample = rollout.generate(prompts[:1], ids[:1], decode, max_response_tokens=CONTEXT - 2 - 12, **settings)[
        0
    ].samples[0]
    assert sample.finish_reason == "stop" or len(sample.response_ids) == CONTEXT - 2 - 12


def test_a_4xx_names_the_prompt_and_is_not_retried(rollout: Sampler) -> None:
    with pytest.raises(EngineError, match="prompt q0: .*answered 400.*temperature"):
        ask(rollout, 2, 2, 4, temperature=-1.0)
    assert rollout.stats["retries"] == 0 and rollout.stats["restarts"] == 0
    check_len = ask(rollout, 2, 2, 4)
    assert [len(group.samples) for group in check_len] == [2, 2]


def test_wrong_tensors_are_refused_before_sending(rollout: Sampler, other: Path, tmp_path: Path) -> None:
    tensors = load_file(other / "model.safetensors")
    norm = "model.norm.weight"
    for name, changed, words in (
        (
            "shape",
            tensors | {norm: torch.ones(64)},
            rf"tensor {norm} has shape \[64\], the engine holds \[128\]",
        ),
        ("missing", {k: v for k, v in tensors.items() if k != norm}, f"tensor {norm} is missing"),
        (
            "unknown",
            tensors | {"model.norm.bias": torch.ones(64)},
            "tensor model.norm.bias is not in the start model",
        ),
    ):
        directory = tmp_path / name
        directory.mkdir()
        save_file(changed, directory / "model.safetensors")
        with pytest.raises(UserError, match=words):
            rollout.weights.push(str(directory), 9)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match="its header promises"):
        rollout.weights.push(str(cut), 9)
    assert rollout.weights.version == 0
    # raises if the engine said version 9
    rollout.score([5, 6, 7])


def test_push_changes_outputs_and_version(rollout: Sampler, other: Path) -> None:
    rollout.weights.push(str(other), 7)
    assert rollout.weights.version == 7
    check_groups(ask(rollout, 4, 4, 12), other, 4, 4, version=7)
    ids = questions(1)[1][0]
    assert rollout.greedy(ids, 10)[0] == hf_greedy(other, ids, 10)


def test_a_url_is_used_and_foreign_weights_are_noticed(
    rollout: Sampler, start: Path, other: Path, tmp_path: Path
) -> None:
    """A second run on the same server puts its weights there; the first one sees foreign versions
    and puts its own back.
    """
    url = rollout.pool.engines[0].url
    with make_rollout(RolloutConfig(engine=EngineConfig(urls=[url + "/"])), start, tmp_path) as second:
        check_groups(ask(second, 2, 2, 6), start, 2, 2, version=0)
        groups = ask(rollout, 4, 2, 6)
        check_groups(groups, other, 4, 2, version=7)
        assert rollout.stats["stale"] == 8 and rollout.stats["restarts"] == 0
        second.config.allow_stale = True
        check_groups(ask(second, 2, 2, 6), other, 2, 2, version=7)
        assert second.stats["stale"] == 4 and second.weights.version == 0


class Strike(threading.Thread):
    """Does something in the middle of a rollout: once the engine has requests in flight, and the
    server at `url` is at work on one.
    """

    def __init__(self, engine: EngineClient, act: Callable[[], object], url: str | None = None):
        super().__init__(daemon=True)
        self.engine, self.act, self.url, self.in_flight = engine, act, url or engine.url, 0

    def run(self) -> None:
        while self.engine.in_flight < 2 or not generating(self.url):
            time.sleep(0.005)
        self.in_flight = self.engine.in_flight
        self.act()


def scheduler_of(rollout: Sampler) -> psutil.Process:
    return next(process for process in engine_processes(rollout) if "scheduler" in process.name())


def test_a_frozen_url_is_named(rollout: Sampler, other: Path, tmp_path: Path) -> None:
    """It accepts requests and finishes none. It belongs to somebody else, so it is reported, not
    restarted; thawed, it serves on.
    """
    engine = EngineConfig(urls=[rollout.pool.engines[0].url], progress_timeout=5.0)
    with make_rollout(RolloutConfig(engine=engine), other, tmp_path) as guest:
        scheduler = scheduler_of(rollout)
        strike = Strike(guest.pool.engines[0], scheduler.suspend)
        strike.start()
        try:
            with pytest.raises(
                UserError,
                match=f"rollout.engine.urls: no engine is left.*{guest.pool.engines[0].url}.*no token in 5 s",
            ):
                ask(guest, 8, 8, 300)
        finally:
            strike.join()
            scheduler.resume()
        assert strike.in_flight > 0
        guest.config.engine.progress_timeout = 120.0
        check_groups(ask(guest, 2, 2, 6), other, 2, 2, version=0)


def test_aborted_samples_are_asked_again(rollout: Sampler, other: Path) -> None:
    def abort_all() -> None:
        url = rollout.pool.engines[0].url + "/abort_request"
        request = urllib.request.Request(url, b'{"abort_all": true}', {"Content-Type": "application/json"})
        # nothing is finished before the order has come
        scheduler.suspend()
        try:
            urllib.request.urlopen(request).close()
        finally:
            scheduler.resume()

    scheduler = scheduler_of(rollout)
    strike = Strike(rollout.pool.engines[0], abort_all)
    strike.start()
    groups = ask(rollout, 8, 8, 300)
    strike.join()
    check_groups(groups, other, 8, 8, version=rollout.weights.version)
    assert rollout.stats["aborted"] > 0 and rollout.stats["retries"] == 0


FORWARD = """
import asyncio, sys
async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def connect(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)
async def main():
    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


def test_another_engine_takes_over(rollout: Sampler, other: Path, tmp_path: Path) -> None:
    """Two URLs of which one goes away for good in the middle of a rollout. (Both lead to one
    engine, the second through a forwarder.)
    """
    url = rollout.pool.engines[0].url
    with subprocess.Popen(
        [sys.executable, "-c", FORWARD, url.rsplit(":", 1)[1]], stdout=subprocess.PIPE, text=True
    ) as forwarder:
        urls = [f"http://127.0.0.1:{forwarder.stdout.readline().strip()}", url]
        with make_rollout(RolloutConfig(engine=EngineConfig(urls=urls)), other, tmp_path) as guest:
            strike = Strike(guest.pool.engines[0], forwarder.kill)
            strike.start()
            groups = ask(guest, 8, 8, 300)
            strike.join()
            assert strike.in_flight > 0
            check_groups(groups, other, 8, 8, version=0)
            assert guest.stats["retries"] > 0
            # To whom is left: a push waits until it is sure who that is. Samples do not, and may
            # have been there before.
            guest.weights.push(str(other), 1)
            assert [engine.alive for engine in guest.pool.engines] == [False, True]
            check_groups(ask(guest, 2, 2, 6), other, 2, 2, version=1)


@pytest.mark.parametrize("victim", ["scheduler", "server"])
def test_a_dead_engine_loses_and_doubles_nothing(rollout: Sampler, other: Path, victim: str) -> None:
    """Killed in the middle of a rollout, it comes back with the pushed weights, not with those it
    started from.
    """
    server = engine_processes(rollout)[0]
    strike = Strike(
        rollout.pool.engines[0], server.kill if victim == "server" else scheduler_of(rollout).kill
    )
    strike.start()
    groups = ask(rollout, 8, 8, 300)
    strike.join()
    assert strike.in_flight > 0
    check_groups(groups, other, 8, 8, version=7)
    assert rollout.stats["restarts"] == 1 and rollout.stats["retries"] > 0
    assert engine_processes(rollout)[0].pid != server.pid


def test_restarts_are_bounded(rollout: Sampler) -> None:
    """The last test of the shared engine: it has used up its restarts."""
    engine_processes(rollout)[0].kill()
    with pytest.raises(
        EngineError, match=r"died again after rollout.engine.max_restarts=2: .*status -9.*engine\.log"
    ):
        ask(rollout, 1, 1, 4)


def test_port_in_use(start: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"rollout.engine.port: 127.0.0.1:{port} cannot be bound"):
            make_rollout(RolloutConfig(engine=EngineConfig(port=port)), start, tmp_path).pool.start()
    assert not (tmp_path / "engine.log").exists()


def test_bad_urls_and_secrets(start: Path, tmp_path: Path) -> None:
    for url, words in (
        ("localhost:30000", "is not of the form http://host:port"),
        ("http://127.0.0.1:9", "no SGLang server answers"),
    ):
        with pytest.raises(UserError, match=f"rollout.engine.urls: .*{words}"):
            make_rollout(RolloutConfig(engine=EngineConfig(urls=[url])), start, tmp_path).pool.start()
    with pytest.raises(UserError, match="--api-key would show"):
        make_rollout(
            RolloutConfig(engine=EngineConfig(extra_args=["--api-key", "secret"])), start, tmp_path
        ).pool.start()


def test_an_engine_that_cannot_start_says_why(start: Path, tmp_path: Path) -> None:
    """It exits (here over a config.json without a model_type), or it takes too long."""
    broken = shutil.copytree(start, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    with pytest.raises(
        EngineError, match="exited with status 1 while starting: KeyError: 'model_type' .*engine.log"
    ):
        make_rollout(RolloutConfig(), broken, tmp_path).pool.start()
    with pytest.raises(EngineError, match="no token within rollout.engine.start_timeout=0.5 s: .*engine.log"):
        make_rollout(RolloutConfig(engine=EngineConfig(start_timeout=0.5)), start, tmp_path).pool.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_no_server(start: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SGLang's own children ask the same of the server; here the server itself is watched."""
    code = f"""
import sys, time
from pathlib import Path
from megasd.config.schema import RolloutConfig
from megasd.engine.sampler import Sampler, make_sampler
rollout = make_sampler(RolloutConfig(), model_path={str(start)!r}, device="cpu", dtype="float32", run_dir=Path({str(tmp_path)!r}), seed=1,
                  stop_token_ids=[2], vocab_size=128)
rollout.pool.launch()
print(rollout.pool.engines[0].process.pid, flush=True)
time.sleep(600)
"""  # noqa: E501
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    server = psutil.Process(int(trainer.stdout.readline()))
    assert server.is_running()
    trainer.send_signal(number)
    trainer.wait()
    trainer.stdout.close()
    gone, alive = psutil.wait_procs([server], timeout=PATIENCE)
    assert not alive
