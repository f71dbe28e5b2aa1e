"""The table of all checks of `megasd doctor`."""

from __future__ import annotations

import functools
import importlib

from megasd.cluster.doctor.report import Check, CheckResult, Machine

# Name of a check -> module of this folder, and its function. Each check imports its module when it
# runs, so that a missing package costs one line of the report and not the command.
CHECKS = {
    "python": ("packages", "check_python"),
    "packages": ("packages", "check_packages"),
    "torch": ("gpus", "check_torch"),
    "gpu": ("gpus", "check_gpus"),
    "links": ("gpus", "check_links"),
    "fp8": ("gpus", "check_fp8"),
    "nccl": ("gpus", "check_nccl"),
    "cpu": ("host", "check_cpu"),
    "memory": ("host", "check_memory"),
    "shared memory": ("host", "check_shared_memory"),
    "limits": ("host", "check_limits"),
    "ports": ("host", "check_ports"),
    "host name": ("host", "check_host_name"),
    "proxy": ("engines", "check_proxy"),
    "disk": ("storage", "check_disk"),
    "sglang": ("engines", "check_sglang"),
    "engines": ("engines", "check_urls"),
    "sandbox": ("host", "check_sandbox"),
    "clock": ("host", "check_clock"),
}


def checks(skip: tuple[str, ...] = ()) -> dict[str, Check]:
    """All checks but those named in `skip`, ready to be called with a Machine."""
    return {name: functools.partial(_check, *where) for name, where in CHECKS.items() if name not in skip}


def _check(module: str, function: str, machine: Machine) -> CheckResult | list[CheckResult]:
    check: Check = getattr(importlib.import_module(f"megasd.cluster.doctor.{module}"), function)
    return check(machine)
