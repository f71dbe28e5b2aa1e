"""What a check says, and how all of them are run: side by side, each on its own, within a time.

A check is a function of a Machine that returns one Finding or a list of them. An exception in it
becomes a finding, never a traceback.
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

# for all checks together
SECONDS = 14.0
# for one command that a check runs
COMMAND_SECONDS = 11.0
REPORT = "report this line and the command that printed it: a check of megasd doctor is broken"

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class CheckResult:
    """One line of the report. `fix` is None exactly where the status is ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None

    def __post_init__(self) -> None:
        if (self.fix is None) != (self.status == "ok"):
            raise ValueError(f"{self.name}: a finding has a fix exactly where it is not ok")


def ok(name: str, detail: str) -> CheckResult:
    return CheckResult(name, "ok", detail)


def warn(name: str, detail: str, fix: str) -> CheckResult:
    return CheckResult(name, "warn", detail, fix)


def fail(name: str, detail: str, fix: str) -> CheckResult:
    return CheckResult(name, "fail", detail, fix)


@dataclass
class Machine:
    """Where the checks look. The fields are parameters so that a test can plant a fault."""

    # None: what a run needs is not known
    config: Config | None = None
    # the YAML files that the config comes from
    files: list[str] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    # directories of installed packages; None = sys.path
    packages: list[str] | None = None
    shm: Path = Path("/dev/shm")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir if self.config else ".").absolute()


Check = Callable[[Machine], "CheckResult | list[CheckResult]"]


def run_checks(checks: Mapping[str, Check], machine: Machine, seconds: float = SECONDS) -> list[CheckResult]:
    """Every check in a thread of its own; the findings in the order of `checks`. One that has not
    ended in time is left behind.
    """
    found: dict[str, list[CheckResult]] = {}

    def call(name: str, check: Check) -> None:
        try:
            said = check(machine)
            found[name] = said if isinstance(said, list) else [said]
        except ModuleNotFoundError as error:
            found[name] = [
                fail(
                    name,
                    f"cannot be checked: {error}",
                    f"pip install {error.name} (make install puts everything in)",
                )
            ]
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one check, the others are still worth reading
            found[name] = [
                fail(name, f"the check itself failed: {one_line(f'{type(error).__name__}: {error}')}", REPORT)
            ]

    threads = [threading.Thread(target=call, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    said = [finding for name in checks for finding in found.get(name) or [_late(name, seconds)]]
    return [_without_secrets(finding, machine.environment) for finding in said]


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
    """(exit status, stdout, or stderr where that is empty) of a command. 127: there is no such
    command; 124: it did not end in time.
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
    """The text without what may be secret: user and password of a URL, and values of variables that
    are named like secrets.
    """
    text = re.sub(r"//[^/@\s]+@", "//", text)
    for name, value in environment.items():
        if len(value) >= 6 and SECRET.search(name):
            text = text.replace(value, "***")
    return text


def gib(nbytes: float) -> str:
    """Bytes as a reader wants them: "24.0 GiB", "64 MiB"."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
