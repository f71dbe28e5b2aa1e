"""A place to run programs that nobody has read.

Inside there is no network, no environment and no file of the machine except Python's own, and there
are hard limits.

    with Sandbox("print(int(input()) + 1)") as sandbox:      # UserError where the machine offers no sandbox
        # Outcome(limit=None, status=0, stdout="42\\n", ...)
        sandbox.run("41\\n", seconds=2.0)

There are two kinds: bubblewrap, and namespaces that sandbox_init.py makes itself (user, mount, pid,
network, ipc, uts). The first kind that passes a real probe is used. There is no third kind: a program
never runs outside a sandbox.

Inside, sandbox_init.py is process 1 and runs each test as a process. This side keeps the clock and
the memory account. It kills process 1 to kill everything at once.

System calls are not filtered. A hole in the kernel is a hole in the sandbox: do not train on hostile
data on a machine that matters.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megasd.rewards import sandbox_init, sandbox_program
from megasd.types import UserError

INIT, PROGRAM = os.path.abspath(sandbox_init.__file__), os.path.abspath(sandbox_program.__file__)
# how long process 1 may take to answer, on a busy machine
START_SECONDS = 20.0
# Process 1 ends a test at its limit. So many seconds later the whole sandbox is killed.
SLACK = 0.4
# how often the memory of all processes together is measured
WATCH_SECONDS = 0.05
# The limit that a failed program met -> how the error looks at the left margin of its traceback. A
# program that met a limit is not judged.
SIGNS = {
    "memory": re.compile(r"^[\w.]*MemoryError\b|Errno 12\]"),
    "processes": re.compile(r"Errno 11\]|can't start new thread"),
    "files": re.compile(r"Errno (24|27|28)\]"),
    "network": re.compile(r"Errno (97|99|100|101|110|111|113)\]|gaierror"),
}
PROBE = """
import ctypes, errno, json, os, signal, socket, struct, sys
bad = []
fd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).fileno()
if ctypes.CDLL(None).connect(fd, struct.pack("=HH4s8x", 2, 0x5000, bytes([192, 0, 2, 1])), 16) == 0:
    bad.append("the network is reachable")
for path in ("/etc/passwd", "/etc/shadow", "/root/.ssh", "/home", "/var", "/sys"):
    if os.path.exists(path):
        bad.append(path + " can be seen")
for path in ("/x", "/usr/x", "/in/x"):
    try:
        open(path, "w")
        bad.append(path + " can be written")
    except OSError:
        pass
if os.getuid() == 0 or os.getppid() != 1:
    bad.append("the program has a user or parent it should not have")
children = []
try:
    for _ in range(40):
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
    bad.append("processes are not limited")
except BlockingIOError:
    pass
for child in children:
    os.kill(child, signal.SIGKILL)
print(json.dumps({"bad": bad, "environment": sorted(os.environ)}))
"""


@dataclass(frozen=True)
class Limits:
    """What the processes of one sandbox may use."""

    # address space of each process, and resident memory of all processes together
    memory_bytes: int = 1 << 30
    # size of each file that is written
    file_bytes: int = 16 << 20
    # size of /tmp
    tmp_bytes: int = 64 << 20
    # length of stdout, and of stderr
    output_bytes: int = 1 << 20
    # processes and threads at once
    processes: int = 16


@dataclass(frozen=True)
class Outcome:
    """The end of one run.

    `limit` stopped it: time, memory, processes, output, files, network or killed. None: the program
    ended by itself.
    """

    limit: str | None
    # exit status, or minus the number of the signal; None when this side killed the program
    status: int | None
    stdout: str
    # the last characters
    stderr: str
    seconds: float


class Sandbox:
    """One program in a sandbox, to `run` on any number of inputs.

    fn_name   None: the program is a script that reads standard input. Otherwise the function, or the
              method of `class Solution`, to call. The input is a JSON list of arguments, `stdout` is
              the JSON result, and prints of the program go to `stderr`.
    kind      "bubblewrap" or "namespaces"; None: find_kind().

    Not thread-safe. Several sandboxes may exist at once. UserError: the machine offers no sandbox.
    """

    def __init__(
        self,
        program: str,
        *,
        fn_name: str | None = None,
        limits: Limits | None = None,
        kind: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        kind = kind or find_kind()
        self._folder = Path(tempfile.mkdtemp(prefix="megasd-code-"))
        try:
            # the program runs as nobody
            self._folder.chmod(0o755)
            (self._folder / "program.py").write_bytes(program.encode("utf-8", "replace"))
            self._start(kind, fn_name)
        except BaseException:
            self.close()
            raise

    def run(self, text: str, *, seconds: float) -> Outcome:
        """Run the program on one input. Returns within `seconds` + 1, whatever the program does."""
        process = self._process
        if process is None:
            return _stopped("killed", 0.0)
        (self._folder / "input").write_bytes(text.encode("utf-8", "replace"))
        begun = time.monotonic()
        request = {"input": "/in/input", "seconds": seconds}
        reply, reason = self._ask(process, request, begun + seconds + SLACK)
        if reply is None:
            self.close()
            return _stopped(reason, time.monotonic() - begun)
        outcome = Outcome(reply["limit"], reply["status"], reply["stdout"], reply["stderr"], reply["seconds"])
        return outcome if outcome.limit else _with_limit(outcome)

    def close(self) -> None:
        """Kill everything inside and remove the files. May be called twice."""
        if self._process is not None:
            tree = _descendants(self._process.pid)
            # The kernel ends a namespace with its process 1, which is in the tree.
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            for pipe in _pipes(self._process):
                pipe.close()
            self._process = None
            _wait_gone(tree)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, kind: str, fn_name: str | None) -> None:
        binds, links, site_packages = _python_files()
        binds = [
            *binds,
            (INIT, "/sandbox_init.py"),
            (PROGRAM, "/sandbox_program.py"),
            (str(self._folder), "/in"),
        ]
        spec = asdict(self.limits) | {
            "unshare": kind == "namespaces",
            "binds": binds,
            "links": links,
            "site_packages": site_packages,
            "fn_name": fn_name,
        }
        python = os.path.realpath(sys.executable)
        command = [python, "-I", "-S", "-B", INIT, json.dumps(spec)]
        if kind == "bubblewrap":
            command = [
                *_bubblewrap(binds, links, self.limits),
                python,
                "-I",
                "-S",
                "-B",
                "/sandbox_init.py",
                json.dumps(spec),
            ]
        with tempfile.TemporaryFile() as errors:
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={},
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
            reply, _ = self._ask(process, None, time.monotonic() + START_SECONDS)
            if reply is None or not reply["ready"]:
                errors.seek(0)
                said = errors.read()[-500:].decode("utf-8", "replace").strip().splitlines()
                raise _Unusable(reply["reason"] if reply else said[-1] if said else "it did not start")

    def _ask(
        self, process: subprocess.Popen[bytes], request: dict[str, Any] | None, deadline: float
    ) -> tuple[dict[str, Any] | None, str]:
        """(reply of process 1, ""), or (None, why there is no reply)."""
        stdin, stdout = _pipes(process)
        if request is not None:
            try:
                stdin.write(json.dumps(request).encode() + b"\n")
            except BrokenPipeError:
                return None, "killed"
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                return None, "time"
            if select.select([stdout], [], [], min(left, WATCH_SECONDS))[0]:
                data = os.read(stdout.fileno(), 1 << 16)
                if not data:
                    return None, "killed"
                self._buffer += data
            elif request is not None and _resident_bytes(process.pid) > self.limits.memory_bytes:
                return None, "memory"
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line), ""


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """stdin and stdout of a process that was started with both."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process was started without pipes")
    return process.stdin, process.stdout


class _Unusable(Exception):
    """This kind of sandbox does not work on this machine."""


@functools.cache
def find_kind() -> str:
    """The kind that works on this machine, probed once. UserError, one line, when no kind works."""
    reasons = []
    for kind in SANDBOX_KINDS:
        reason = probe_sandbox(kind)
        if reason is None:
            return kind
        reasons.append(f"{kind}: {reason}")
    raise UserError(
        f"reward.verifier=code: no sandbox works on this machine ({'; '.join(reasons)}), and programs are not"
        " run without one; install bubblewrap, or allow user namespaces (a container: with CAP_SYS_ADMIN or"
        " a seccomp profile that allows unshare)"
    )


def probe_sandbox(kind: str) -> str | None:
    """Why this kind does not work, or does not hold; None when it does both.

    A program looks around from the inside.
    """
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        with Sandbox(PROBE, kind=kind) as sandbox:
            outcome = sandbox.run("", seconds=10.0)
    except (_Unusable, OSError) as error:
        return str(error)
    if outcome.limit or outcome.status:
        return (
            outcome.limit
            or (outcome.stderr.strip().splitlines() or [f"the probe ended with status {outcome.status}"])[-1]
        )
    found = json.loads(outcome.stdout)
    if set(found["environment"]) - set(sandbox_init.ENVIRONMENT) - {"LC_CTYPE", "PWD"}:
        found["bad"].append("the environment is not empty")
    return found["bad"][0] if found["bad"] else None


SANDBOX_KINDS = ("bubblewrap", "namespaces")


def _python_files() -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """(directories to read inside, links, site-packages).

    The libraries of the system and of this Python, and nothing of a project or a home.
    """
    binds: list[tuple[str, str]] = [("/usr", "/usr")]
    links: list[tuple[str, str]] = []
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            links.append((name, os.readlink(name)))
        elif os.path.isdir(name):
            binds.append((name, name))
    binds += [(path, path) for path in ("/etc/ld.so.cache", "/etc/alternatives") if os.path.exists(path)]
    packages = list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    wanted = [os.path.join(os.path.realpath(sys.base_prefix), name) for name in ("bin", "lib", "lib64")]
    for path in [*wanted, *packages]:
        covered = any(path == target or path.startswith(target + "/") for _, target in binds)
        if (
            os.path.isdir(path)
            and not os.path.islink(path)
            and not covered
            and path != site.getusersitepackages()
        ):
            binds.append((path, path))
    return binds, links, packages


def _bubblewrap(binds: list[tuple[str, str]], links: list[tuple[str, str]], limits: Limits) -> list[str]:
    command = [
        "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--die-with-parent",
        "--new-session",
    ]
    # For root there is no user namespace: sandbox_init.py leaves root, so that RLIMIT_NPROC binds.
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    command += ["--as-pid-1", "--clearenv"]
    # /tmp comes first: Python itself may live below it.
    command += ["--perms", "1777", "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp"]
    parents = {str(parent) for _, target in binds for parent in Path(target).parents} - {"/", "/tmp"}
    for folder in sorted(parents):
        # By itself, bwrap would make these directories for root alone.
        command += ["--perms", "0755", "--dir", folder]
    for source, target in binds:
        command += ["--ro-bind", source, target]
    for link, target in links:
        command += ["--symlink", target, link]
    for name in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [*command, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/", "--"]


def _with_limit(outcome: Outcome) -> Outcome:
    """The outcome of a program that ended by itself; with the limit, if a limit made it end."""
    if outcome.status == sandbox_program.NETWORK:
        return Outcome("network", **{k: v for k, v in asdict(outcome).items() if k != "limit"})
    said = [line for line in outcome.stderr.splitlines() if line[:1].strip()] if outcome.status else []
    met = next((name for name, sign in SIGNS.items() if any(map(sign.search, said))), None)
    return Outcome(met, outcome.status, outcome.stdout, outcome.stderr, outcome.seconds)


def _stopped(reason: str, seconds: float) -> Outcome:
    return Outcome(reason, None, "", "", seconds)


def _descendants(pid: int) -> list[int]:
    """The process and all processes below it.

    Process 1 of the sandbox adopts the children of a dead parent, so none is missed.
    """
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    found += [int(child) for child in file.read().split()]
        except OSError:
            # the process ended meanwhile
            continue
    return found


def _resident_bytes(pid: int) -> int:
    return sum(_statm(child) for child in _descendants(pid)) * os.sysconf("SC_PAGE_SIZE")


def _statm(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1])
    except OSError:
        return 0


def _wait_gone(pids: list[int], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.005)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
