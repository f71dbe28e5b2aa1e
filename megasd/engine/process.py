"""The process of one SGLang server: its command, its environment, its start and its end.

sglang is never imported here.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from megasd.config.schema import LOOPBACK, EngineConfig
from megasd.engine.auth import VARIABLE, engine_key
from megasd.types import UserError

# This runs before the server, in its process, and its effects survive exec. Linux sends SIGKILL to
# the server when the trainer's thread that started it ends. SIGUSR1, which preempts a run and may
# reach every process of a job, is ignored. SGLang's children die with the server in the same way:
# however the trainer is killed, the whole tree goes with it.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
# Variables that torchrun sets for its ranks. torch.distributed inside the engine must not read them,
# or it would wait for the trainer's store.
TORCHRUN_VARIABLES = re.compile(
    r"(TORCHELASTIC_|TORCH_NCCL_|GROUP_|ROLE_|LOCAL_|MASTER_)|(RANK|WORLD_SIZE|OMP_NUM_THREADS)$"
)
# This environment variable names the python of SGLang's own environment, if that is not the
# trainer's environment.
ENGINE_PYTHON = "MEGASD_ENGINE_PYTHON"
SEED_STRIDE = 1_000_003
# Flags that the run sets itself, or refuses for safety.
OURS = (
    "--host",
    "--port",
    "--model-path",
    "--weight-version",
    "--trust-remote-code",
    "--base-gpu-id",
    "--served-model-name",
)
ENGINE_TP, ENGINES = "rollout.engine.tensor_parallel_size", "rollout.engine.num_engines (several engines)"
# With these flags an engine could not be given weights. Each value names the setting to use
# instead.
NOT_HERE = {
    "--tp": ENGINE_TP, "--tp-size": ENGINE_TP, "--tensor-parallel-size": ENGINE_TP,
    "--dp": ENGINES, "--dp-size": ENGINES, "--data-parallel-size": ENGINES,
    "--pp-size": ENGINE_TP, "--pipeline-parallel-size": ENGINE_TP, "--nnodes": ENGINES,
}  # fmt: skip
# Free ports are chosen from this range. Linux gives ports from 32768 on to any program that asks
# for any port.
OWN_PORTS = 20000, 32768


class EngineProcess:
    """A server that this run starts and kills (`url=None`, `owned`), or a server at `url`.

    A server at a URL ("": not known yet) belongs to somebody else: it is never started or killed
    from here. incarnation: the number of starts so far. It tells which start a failed request met.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_path: str,
        device: str,
        dtype: str,
        log_path: Path,
        seed: int,
        need_text: bool = False,
        url: str | None = None,
        index: int = 0,
    ) -> None:
        """Describe the index-th of config.num_engines engines, without starting it.

        The engine takes the index-th tensor_parallel_size GPUs and, if config.port is given, the
        port config.port + index.
        """
        self.config, self.model_path, self.device, self.need_text = config, model_path, device, need_text
        # Engines with the same seed would give equal samples of a prompt.
        self.index, self.seed = index, (seed + SEED_STRIDE * index) % 2**31
        self.dtype = dtype if config.dtype == "auto" else config.dtype
        self.log_path = log_path
        self.owned = url is None
        # The name that the process is started under; /server_info returns it.
        self.name: str | None = None
        if url and not re.fullmatch(r"https?://[^\s/?#]+/*", url):
            raise UserError(f"rollout.engine.urls: {url!r} is not of the form http://host:port")
        self.url = (url or "").rstrip("/")
        self.process: subprocess.Popen[bytes] | None = None
        self.incarnation = 0
        # The size of the log when this start began.
        self._log_start = 0

    def command(self) -> list[str]:
        """The server's argument vector; it carries no secrets (see auth.py)."""
        module = "megasd.engine.sglang_cpu"
        if self.device == "cuda":
            module = "sglang.launch_server" if engine_key() is None else "megasd.engine.sglang_with_key"
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        python = os.environ.get(ENGINE_PYTHON) or sys.executable
        if not os.access(python, os.X_OK) or os.path.isdir(python):
            raise UserError(
                f"environment: {ENGINE_PYTHON}={python}: no program is there; give the path of a python, or"
                " unset it"
            )
        command = [
            python,
            "-m",
            module,
            "--model-path",
            os.path.abspath(self.model_path),
            "--host",
            host,
            "--port",
            port,
        ]
        command += [
            "--device",
            self.device,
            "--dtype",
            self.dtype,
            "--tensor-parallel-size",
            str(self.config.tensor_parallel_size),
        ]
        command += [
            "--max-total-tokens",
            str(self.config.max_total_tokens),
            "--random-seed",
            str(self.seed),
            "--weight-version",
            "0",
        ]
        # With this flag an idle engine leaves its core to the trainer.
        command += ["--sleep-on-idle", "--log-level-http", "warning"]
        if self.device == "cuda":
            # Every engine sees all GPUs and starts at its own first GPU. An engine that saw only
            # its own GPUs could not map the trainer's buffer.
            command += ["--base-gpu-id", str(self.index * self.config.tensor_parallel_size)]
        if self.config.mem_fraction_static is not None:
            command += ["--mem-fraction-static", str(self.config.mem_fraction_static)]
        # torch_memory_saver has no CPU build.
        if self.config.release_memory and self.device == "cuda":
            command.append("--enable-memory-saver")
        if self.name is not None:
            command += ["--served-model-name", self.name]
        if not self.need_text:
            # Responses are read as token ids; only stop strings need text.
            command += ["--skip-tokenizer-init"]
        return command + list(self.config.extra_args)

    def environment(self) -> dict[str, str]:
        """The trainer's environment without torchrun's variables, and without hub access."""
        environment = {
            name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLES.match(name)
        }
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        no_proxy = ",".join(
            filter(None, [environment.get("NO_PROXY") or environment.get("no_proxy"), self.config.host])
        )
        # In its warm-up, SGLang sends requests to itself over HTTP.
        environment |= {"NO_PROXY": no_proxy, "no_proxy": no_proxy}
        if self.device == "cpu":
            # Huge pages: the buffers that receive an update are fresh memory, and page faults were half
            # of its cost.
            environment |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "OMP_NUM_THREADS": "1",
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            }
            if self.config.tensor_parallel_size > 1:
                # Bind one core to each rank. SGLang needs that if there are fewer NUMA nodes than
                # ranks.
                cores, size = sorted(os.sched_getaffinity(0)), self.config.tensor_parallel_size
                ranks = range(self.index * size, (self.index + 1) * size)
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                    str(cores[rank % len(cores)]) for rank in ranks
                )
        return environment

    def launch(self) -> None:
        """Start the process and return at once (nothing to do for a URL).

        UserError if the port is taken, before any model is loaded.
        """
        if not self.owned:
            return
        given = {arg.split("=")[0] for arg in self.config.extra_args}
        for flag in ("--api-key", "--admin-api-key"):
            if flag in given:
                raise UserError(
                    f"rollout.engine.extra_args: {flag} would show in process lists and logs; a started"
                    " engine needs none"
                )
        if self.config.host not in LOOPBACK and engine_key() is None:
            raise UserError(
                f"engine on {self.config.host}: SGLang lets in whoever reaches it; set {VARIABLE} here and"
                " where the run starts"
            )
        for flag in OURS:
            if flag in given:
                raise UserError(
                    f"rollout.engine.extra_args: {flag} is not to be given here; the run sets it, or refuses"
                    " it for safety"
                )
        for flag, key in NOT_HERE.items():
            if flag in given:
                raise UserError(
                    f"rollout.engine.extra_args: {flag} is not to be given here; set {key} instead"
                )
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

    def _choose_port(self) -> int:
        """The engine's configured port, or a free port; UserError if the configured port is taken.

        A free port is chosen below the range that the kernel gives out, since the engine binds the
        port only seconds later.
        """
        if self.config.port == 0:
            for _ in range(100):
                port = random.SystemRandom().randrange(*OWN_PORTS)
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
                    probe.bind((self.config.host, port))
                    return port
        port = self.config.port + (self.index if self.config.port else 0)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.config.host, port))
            except OSError as error:
                where = f"rollout.engine.port: {self.config.host}:{port}"
                raise UserError(
                    f"{where} cannot be bound ({error.strerror}); give another port, or 0 for a free one"
                ) from error
            return probe.getsockname()[1]

    def kill(self) -> None:
        """Kill the process tree of an owned engine and wait until it is gone."""
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
        """The exit status of an owned engine's process; None while it runs, and for a URL."""
        return self.process.poll() if self.process is not None else None

    def port_was_taken(self) -> bool:
        """Whether another process took the port before the server could bind it.

        The server does not exit in that case.
        """
        return self.owned and self.config.port == 0 and "address already in use" in self.last_error()

    def last_error(self) -> str:
        """The last line of this start's log that looks like an error, or its last line."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - 200_000))
            lines = [
                line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()
            ]
        errors = [
            line
            for line in lines
            if re.match(r"(\[.*\] *)?([\w.]*(Error|Exception|Killed)\b|[\w.]+: error:)", line)
        ]
        return (errors or lines or ["the log is empty"])[-1][:500]
