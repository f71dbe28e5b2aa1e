"""One SGLang server: start it or reach it, know whether it is alive, give it weights. HTTP only; sglang is never imported here.

    engine = Engine(config, model_path="runs/q/model", device="cpu", dtype="float32", run_dir=Path("runs/q"), seed=1)
    engine.launch()                                   # a process on loopback; output in runs/q/engine.log
    await engine.wait_ready()                         # until it has generated a token
    await engine.load_weights("runs/q/weights/3", 3)  # and /model_info says 3
    engine.kill()                                     # the whole process tree; also when the trainer is killed

An engine is dead when its process has exited, when it refuses connections repeatedly, or when requests wait in it and none has finished
nor grown by a token for `progress_timeout` seconds: SGLang's own /health goes on answering for a while in each of these cases.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from megasd.config import EngineConfig
from megasd.types import UserError

# Runs before the server, in its process, and survives exec: SIGKILL the server when the trainer's thread that started it ends.
# SGLang's children ask the same of the server, so killing the trainer in any way takes the whole tree with it.
DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
# What torchrun tells its ranks; torch.distributed inside the engine must not read it as its own (it would wait for the trainer's store).
TORCHRUN_VARIABLES = re.compile(r"(TORCHELASTIC_|TORCH_NCCL_|GROUP_|ROLE_|LOCAL_|MASTER_)|(RANK|WORLD_SIZE|OMP_NUM_THREADS)$")
KEEP_ALIVE = 2.0  # seconds; SGLang closes an idle connection after 5, and a request that meets the closing is lost
LOAD_TIMEOUT = 1800.0  # seconds an engine may take to read a pushed directory; a silent one must not hold all ranks for ever
PROBES = 4  # connections refused in a row that make an engine dead


class EngineError(RuntimeError):
    """An engine that did not do what it was asked, and would not if asked again."""


class StartError(EngineError, UserError):
    """An engine that does not start; its log says why, most often about rollout.engine's settings or the machine's memory."""


class Refused(EngineError):
    """HTTP 4xx: asking again would be refused again."""


class Unreachable(Exception):
    """Connection refused, reset or closed, HTTP 5xx, or no progress: worth asking again, perhaps elsewhere."""


def tensor_shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a directory's *.safetensors, read from the headers. UserError if there is none or one is cut."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: holds no *.safetensors; give a Hugging Face directory")
    shapes = {}
    for path in files:
        with path.open("rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            except (struct.error, ValueError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); write it again") from error
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size != 8 + length + end:
            raise UserError(f"{path}: {path.stat().st_size} bytes where its header promises {8 + length + end}; write it again")
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items()})
    return shapes


def check_same_tensors(directory: str | Path, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
    """UserError naming the first missing, unknown or differently shaped tensor. SGLang ignores unknown names and dies of wrong shapes.

    With tied embeddings lm_head.weight may be left out on either side.
    """
    found = tensor_shapes(directory)
    optional = {"lm_head.weight"} if tied else set()
    for name in sorted(expected.keys() - found.keys() - optional):
        raise UserError(f"{directory}: tensor {name} is missing; export every tensor of the start model")
    for name in sorted(found.keys() - expected.keys() - optional):
        raise UserError(f"{directory}: tensor {name} is not in the start model; the engine would ignore it")
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            raise UserError(f"{directory}: tensor {name} has shape {list(found[name])}, the engine holds {list(expected[name])}")


class Engine:
    """A server of this run (`url=None`), or one that somebody else runs at `url`, which is never started, killed or restarted from here.

    Every coroutine and `launch` belong to one event loop, in a thread that lives as long as the engine: the server dies with that thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_path: str,
        device: str,
        dtype: str,
        run_dir: Path,
        seed: int,
        need_text: bool = False,
        url: str | None = None,
    ):
        self.config, self.model_path, self.device, self.seed, self.need_text = config, model_path, device, seed, need_text
        self.dtype = dtype if config.dtype == "auto" else config.dtype
        self.log_path = Path(run_dir) / "engine.log"
        self.owned = url is None
        if url is not None and not re.fullmatch(r"https?://[^\s/?#]+/*", url):
            raise UserError(f"rollout.engine.urls: {url!r} is not of the form http://host:port")
        self.url = (url or "").rstrip("/")
        self.process: subprocess.Popen[bytes] | None = None
        self.session: aiohttp.ClientSession | None = None
        self.up = False  # may be asked
        self.reason = "not started"  # why it is not up, once it was found dead
        self.incarnation = 0  # starts so far
        self.max_tokens: int | None = None  # prompt + response tokens that a request may have
        self.in_flight = 0  # generate requests
        self.hung = False
        self._load: list | None = None  # the scheduler's load when it was last asked
        self._last_progress = 0.0
        self._log_start = 0
        self.lock = asyncio.Lock()  # one caller revives

    # ---- process -------------------------------------------------------------------------------------------------------------------

    def command(self) -> list[str]:
        """The server's argument vector; it carries no secrets."""
        module = "sglang.launch_server" if self.device == "cuda" else "megasd.rollout.sglang_cpu"
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        command = [sys.executable, "-m", module, "--model-path", os.path.abspath(self.model_path), "--host", host, "--port", port]
        command += ["--device", self.device, "--dtype", self.dtype, "--tensor-parallel-size", str(self.config.tensor_parallel_size)]
        command += ["--max-total-tokens", str(self.config.max_total_tokens), "--random-seed", str(self.seed), "--weight-version", "0"]
        command += ["--sleep-on-idle", "--log-level-http", "warning"]  # an idle engine leaves its core to the trainer
        if not self.need_text:
            command += ["--skip-tokenizer-init"]  # responses are read as token ids; only stop strings need text
        return command + list(self.config.extra_args)

    def environment(self) -> dict[str, str]:
        """The trainer's environment without torchrun's variables; the hub stays unasked."""
        environment = {name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLES.match(name)}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        no_proxy = ",".join(filter(None, [environment.get("NO_PROXY") or environment.get("no_proxy"), self.config.host]))
        environment |= {"NO_PROXY": no_proxy, "no_proxy": no_proxy}  # SGLang's warm-up asks itself over HTTP
        if self.device == "cpu":
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
            if self.config.tensor_parallel_size > 1:  # one core a rank; SGLang asks for it where NUMA nodes are fewer than ranks
                cores = sorted(os.sched_getaffinity(0))
                ranks = range(self.config.tensor_parallel_size)
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in ranks)
        return environment

    def launch(self) -> None:
        """Start the process and return at once (nothing to do for a URL). UserError if the port is taken, before any model is loaded."""
        if not self.owned:
            return
        given = {arg.split("=")[0] for arg in self.config.extra_args}
        for flag in ("--api-key", "--admin-api-key"):
            if flag in given:
                raise UserError(f"rollout.engine.extra_args: {flag} would show in process lists and logs; a started engine needs none")
        for flag in ("--host", "--port", "--model-path", "--weight-version", "--trust-remote-code"):
            if flag in given:
                raise UserError(f"rollout.engine.extra_args: {flag} is not to be given here; the run sets it, or refuses it for safety")
        self.url = f"http://{self.config.host}:{self._choose_port()}"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,
            )
        self.incarnation += 1
        self.hung = False

    def _choose_port(self) -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.config.host, self.config.port))
            except OSError as error:
                where = f"rollout.engine.port: {self.config.host}:{self.config.port}"
                raise UserError(f"{where} cannot be bound ({error.strerror}); give another port, or 0 for a free one") from error
            return probe.getsockname()[1]

    def kill(self) -> None:
        """Kill the process tree of an owned engine and wait until it is gone."""
        self.up = False
        if self.process is None:
            return
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(tree, timeout=10)
        self.process = None

    def exit_code(self) -> int | None:
        """Exit status of an owned engine's process; None while it runs, and always for a URL."""
        return self.process.poll() if self.process is not None else None

    def last_error(self) -> str:
        """The last line of this start's log that looks like an error, else its last line."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - 200_000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(\[.*\] *)?([\w.]*(Error|Exception|Killed)\b|[\w.]+: error:)", line)]
        return (errors or lines or ["the log is empty"])[-1][:500]

    # ---- HTTP ----------------------------------------------------------------------------------------------------------------------

    def _session(self) -> aiohttp.ClientSession:
        if self.session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            self.session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self.session

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """The parsed JSON answer. Refused on 4xx; Unreachable on 5xx, on a broken connection and after `timeout` seconds."""
        try:
            async with self._session().request(
                method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=10)
            ) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise Unreachable(f"{self.url}{path}: {type(error).__name__} {error}".strip()) from error
        if 400 <= response.status < 500:
            raise Refused(f"{self.url}{path} answered {response.status}: {_message(text)}")
        if response.status >= 300:
            raise Unreachable(f"{self.url}{path} answered {response.status}: {_message(text)}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise Refused(f"{self.url}{path} answered {_message(text)!r}, which is no JSON; is it an SGLang server?") from error

    async def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """POST /generate for a batch of `input_ids`; one output each, in order. Unreachable when the engine makes no progress."""
        if self.in_flight == 0:
            self._last_progress = time.monotonic()
        self.in_flight += 1
        task = asyncio.ensure_future(self.request("POST", "/generate", body))
        try:
            while True:
                patience = self._last_progress + self.config.progress_timeout - time.monotonic()
                done, _ = await asyncio.wait({task}, timeout=max(patience, 0.0))
                if done:
                    outputs = task.result()
                    self._last_progress = time.monotonic()
                    return outputs
                if time.monotonic() >= self._last_progress + self.config.progress_timeout:
                    if await self._generating():  # long answers: none is finished, and all grow
                        self._last_progress = time.monotonic()
                        continue
                    self.hung = True
                    raise Unreachable(f"{self.url}: no token in {self.config.progress_timeout:g} s")
        finally:
            self.in_flight -= 1
            task.cancel()

    async def _generating(self) -> bool:
        """Whether the scheduler's load (requests and tokens held) has moved since this was last asked; the first answer counts as moved."""
        try:
            answer = await self.request("GET", "/v1/loads", timeout=10)
        except (Unreachable, Refused):
            return False
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        before, self._load = self._load, [[load.get(name) for name in names] for load in answer["loads"]]
        return self._load != before

    async def close(self) -> None:
        """Close the connections and kill an owned engine."""
        if self.session is not None:
            await self.session.close()
            self.session = None
        self.kill()

    # ---- life ----------------------------------------------------------------------------------------------------------------------

    async def wait_ready(self) -> None:
        """Until the engine has generated a token (at most start_timeout). StartError with the log's last error; UserError for a URL."""
        if not self.owned:
            return await self._check_url()
        deadline = time.monotonic() + self.config.start_timeout
        body = {"input_ids": [[0]], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        while True:
            if self.exit_code() is not None:
                raise StartError(
                    f"the engine exited with status {self.exit_code()} while starting: {self.last_error()} (log: {self.log_path})"
                )
            if time.monotonic() > deadline:
                self.kill()
                limit = f"rollout.engine.start_timeout={self.config.start_timeout:g} s"
                raise StartError(f"the engine gave no token within {limit}: {self.last_error()} (log: {self.log_path})")
            try:
                await self.request("POST", "/generate", body, timeout=max(deadline - time.monotonic(), 1.0))
                break
            except Unreachable:
                await asyncio.sleep(0.2)
        await self._read_limits()
        self.up = True

    async def _check_url(self) -> None:
        try:
            info = await self.request("GET", "/model_info", timeout=10)
        except (Unreachable, Refused) as error:
            raise UserError(
                f"rollout.engine.urls: no SGLang server answers there ({error}); start it first, or leave the list empty"
            ) from error
        wanted = json.loads((Path(self.model_path) / "config.json").read_text()).get("architectures")
        if not isinstance(info, dict) or "weight_version" not in info:
            raise UserError(f"rollout.engine.urls: {self.url}/model_info is not that of an SGLang 0.5.23 server")
        if info.get("architectures") != wanted:
            raise UserError(f"rollout.engine.urls: {self.url} serves {info.get('architectures')}, model.path is {wanted}")
        await self._read_limits()
        self.incarnation += 1
        self.hung = False
        self.up = True

    async def _read_limits(self) -> None:
        info = await self.request("GET", "/server_info", timeout=30)
        # SGLang silently shortens max_new_tokens so that prompt + response <= min(context, KV pool) - 2; max_req_input_len is that - 4.
        limit = info.get("max_req_input_len")
        self.max_tokens = None if limit is None else int(limit) + 4

    async def why_dead(self) -> str | None:
        """Why the engine counts as dead, None if it lives. Takes some seconds to be sure of a refused connection."""
        if self.hung:
            return f"no token in {self.config.progress_timeout:g} s"
        reason = ""
        for attempt in range(PROBES):
            if self.exit_code() is not None:
                return f"its process exited with status {self.exit_code()}"
            try:
                await self.request("GET", "/model_info", timeout=10)
                return None
            except (Unreachable, Refused) as error:
                reason = str(error)
            await asyncio.sleep(0.25 * 2**attempt)
        return reason

    async def weight_version(self) -> str:
        """What /model_info says."""
        return str((await self.request("GET", "/model_info", timeout=30))["weight_version"])

    async def load_weights(self, directory: str, version: int) -> None:
        """Load a safetensors directory and stamp it. EngineError if the engine refuses or then names another version."""
        body = {
            "model_path": os.path.abspath(directory),
            "weight_version": str(version),
            "flush_cache": True,
            "abort_all_requests": True,  # whatever still runs belongs to a request that was given up
        }
        try:
            answer = await self.request("POST", "/update_weights_from_disk", body, timeout=LOAD_TIMEOUT)
        except Refused as error:
            raise EngineError(f"the engine did not load {directory}: {error}") from error
        if not answer.get("success"):
            raise EngineError(f"the engine did not load {directory}: {answer.get('message')}")
        served = await self.weight_version()
        if served != str(version):
            raise EngineError(f"{self.url} serves weight version {served} after a push of version {version}")


def _message(text: str) -> str:
    """The server's own words, on one line."""
    try:
        parsed = json.loads(text)
        error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:500]
