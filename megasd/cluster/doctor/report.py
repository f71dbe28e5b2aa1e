"""The result of a check, and how all checks are run: in threads, within a time limit.

A check is a function of a Machine that returns one CheckResult or a list of them. An exception in a
check becomes a CheckResult, never a traceback.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megasd.config.schema import Config

# Time limit of all checks together.
SECONDS = 14.0
# Time limit of one command that a check runs.
COMMAND_SECONDS = 11.0
REPORT = "report this line and the command that printed it: a check of megasd doctor is broken"

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class CheckResult:
    """One line of the report. `fix` is None if the status is ok, and a text if it is not."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None

    def __post_init__(self) -> None:
        if (self.fix is None) != (self.status == "ok"):
            raise ValueError(f"{self.name}: a finding has a fix exactly where it is not ok")


def ok(name: str, detail: str) -> CheckResult:
    """A result: all is well."""
    return CheckResult(name, "ok", detail)


def warn(name: str, detail: str, fix: str) -> CheckResult:
    """A result: a run works, but something is lost."""
    return CheckResult(name, "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> CheckResult:
    """A result: a run would not work."""
    return CheckResult(name, "fail", detail, fix)


@dataclass
class Machine:
    """Where the checks look. The fields are parameters so that a test can plant a fault.

    config: None if no config was given; then a check does not know what the run needs. files: the
    YAML files of the config. packages: directories of installed packages; None means sys.path.
    """

    config: Config | None = None
    files: list[str] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    packages: list[str] | None = None
    shm: Path = Path("/dev/shm")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    @property
    def run_dir(self) -> Path:
        """The directory of the run; without a config, the current directory."""
        return Path(self.config.run.dir if self.config else ".").absolute()


Check = Callable[[Machine], "CheckResult | list[CheckResult]"]


def run_checks(checks: Mapping[str, Check], machine: Machine, seconds: float = SECONDS) -> list[CheckResult]:
    """Run every check in a thread of its own; return the findings in the order of `checks`.

    A check that does not end within `seconds` gives a warning, and its thread is left behind.
    Secrets of the environment are taken out of all texts.
    """
    threads = [_CheckThread(name, check, machine) for name, check in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    found: list[CheckResult] = []
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for thread in threads:
        found += thread.found or [_late(thread.name, seconds)]
    return [_without_secrets(finding, machine.environment) for finding in found]


class _CheckThread(threading.Thread):
    """Runs one check; `found` is empty until the check has ended."""

    def __init__(self, name: str, check: Check, machine: Machine) -> None:
        super().__init__(name=name, daemon=True)
        self.check, self.machine = check, machine
        self.found: list[CheckResult] = []

    def run(self) -> None:
        self.found = _run_check(self.name, self.check, self.machine)


def _run_check(name: str, check: Check, machine: Machine) -> list[CheckResult]:
    """What the check finds; an exception becomes a finding."""
    try:
        found = check(machine)
    except ModuleNotFoundError as error:
        install = f"pip install {error.name} (make install puts everything in)"
        return [fail(name, f"cannot be checked: {error}", install)]
    # Whatever is wrong with one check, the other checks are still worth reading.
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}")
        return [fail(name, f"the check itself failed: {text}", REPORT)]
    return found if isinstance(found, list) else [found]


def _late(name: str, seconds: float) -> CheckResult:
    late = f"no answer within {seconds:g} s"
    slow = (
        "run it again on an idle machine; if it stays so, a file system or a driver hangs: see the last lines"
        " of dmesg"
    )
    return warn(name, late, slow)


def _without_secrets(finding: CheckResult, environment: Mapping[str, str]) -> CheckResult:
    fix = None if finding.fix is None else redact(finding.fix, environment)
    return CheckResult(
        redact(finding.name, environment), finding.status, redact(finding.detail, environment), fix
    )


def command(
    arguments: list[str], *, seconds: float = COMMAND_SECONDS, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command and return (exit status, stdout, or stderr if stdout is empty).

    Status 127: there is no such command. Status 124: the command did not end in time.
    """
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=environment,
        )
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"{arguments[0]} did not end within {seconds:g} s"
    return done.returncode, done.stdout.strip() or done.stderr.strip()


def one_line(text: str, limit: int = 300) -> str:
    """The text on one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def redact(text: str, environment: Mapping[str, str]) -> str:
    """The text without secrets.

    Taken out are user and password of a URL, and the values of variables that are named like
    secrets (API_KEY, HF_TOKEN ...).
    """
    text = re.sub(r"//[^/@\s]+@", "//", text)
    for name, value in environment.items():
        if len(value) >= 6 and SECRET.search(name):
            text = text.replace(value, "***")
    return text


def gib(nbytes: float) -> str:
    """Bytes as a reader wants them: "24.0 GiB", "64 MiB"."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
