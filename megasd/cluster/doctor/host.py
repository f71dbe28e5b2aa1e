"""Checks of the machine: cores, memory, limits, shared memory, ports, name, clock, code sandbox."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

from megasd.cluster.doctor.report import CheckResult, Machine, fail, gib, ok, one_line, warn
from megasd.config.schema import Config
from megasd.types import UserError

# torchrun's port if none is given.
RENDEZVOUS = 29500
# Names of files in /dev/shm that killed engines and runs leave behind.
LEFTOVER = re.compile(r"sglang_loads_.*\.shm$|sgl_shm_|nccl-|cuda\.shm\.|megasd-\d+-")
SKEW_SECONDS = 5.0
# STA_UNSYNC of linux/timex.h
UNSYNCHRONISED = 0x40


def check_cpu(machine: Machine) -> CheckResult:
    """Check the cores that this process may use, by affinity and cgroup."""
    total = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores(machine)
    usable = min(cores, quota or cores)
    detail = f"{cores} of {total} cores" + (f", cgroup gives {quota:g}" if quota else "")
    wanted = machine.config.run.num_processes if machine.config else 0
    if usable < max(2, wanted):
        return warn(
            "cpu",
            f"{detail}; ranks, engine and verifiers share them",
            "ask for more (sbatch --cpus-per-task, docker run --cpus)",
        )
    load = os.getloadavg()[0]
    if load > 3 * total:
        fix = (
            "end other processes (top shows them); else raise rollout.engine.start_timeout and"
            " progress_timeout"
        )
        return warn("cpu", f"{detail}, load {load:.0f}: engines and gloo may run into their timeouts", fix)
    return ok("cpu", f"{detail}, load {load:.1f}")


def check_memory(machine: Machine) -> CheckResult:
    """Check the memory that is free, within the limit of the cgroup."""
    # Read without psutil, which may be missing.
    words = [line.split() for line in (machine.proc / "meminfo").read_text().splitlines()]
    memory = {word[0].rstrip(":"): int(word[1]) << 10 for word in words}
    limit = cgroup_memory(machine)
    free = min(memory["MemAvailable"], limit - _cgroup_used(machine)) if limit else memory["MemAvailable"]
    detail = f"{gib(free)} free of {gib(memory['MemTotal'])}" + (
        f", cgroup allows {gib(limit)}" if limit else ""
    )
    if free < 4 << 30:
        return warn(
            "memory",
            f"{detail}; a small engine and a rank take 4 GiB",
            "end other processes, or raise the limit (sbatch --mem)",
        )
    return ok("memory", detail)


def cgroup_cores(machine: Machine) -> float | None:
    """Cores that the cgroup's quota allows; None without a quota.

    Read from cpu.max (cgroup v2) or cpu.cfs_quota_us (v1). The tightest quota from this process's
    cgroup up to the root counts.
    """
    found = []
    for folder in _cgroups(machine, "cpu"):
        quota = (
            _read(folder / "cpu.max")
            or f"{_read(folder / 'cpu.cfs_quota_us')} {_read(folder / 'cpu.cfs_period_us')}"
        ).split()
        if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal():
            found.append(int(quota[0]) / int(quota[1]))
    return min(found, default=None)


def cgroup_memory(machine: Machine) -> int | None:
    """Bytes that the cgroup allows, None without a limit."""
    values = [
        _read(folder / name)
        for folder in _cgroups(machine, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min((int(value) for value in values if value.isdecimal() and int(value) < 1 << 60), default=None)


def _cgroup_used(machine: Machine) -> int:
    """Bytes that the cgroup uses; 0 if that is not known."""
    for folder in _cgroups(machine, "memory"):
        for name in ("memory.current", "memory.usage_in_bytes"):
            if (value := _read(folder / name)).isdecimal():
                return int(value)
    return 0


def _cgroups(machine: Machine, controller: str) -> list[Path]:
    """The directories of this process's cgroup, the innermost first."""
    root = machine.sys / "fs/cgroup"
    for line in _read(machine.proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.lstrip("/")
        return [folder, *[parent for parent in folder.parents if parent == base or base in parent.parents]]
    return []


def check_shared_memory(machine: Machine) -> list[CheckResult]:
    """Check size and room of /dev/shm, and what killed processes have left there."""
    if not machine.shm.is_dir():
        return [
            fail(
                "shared memory", f"{machine.shm} is missing", "mount a tmpfs there; docker run --shm-size=16g"
            )
        ]
    usage = shutil.disk_usage(machine.shm)
    left = leftovers(machine)
    return [
        judge_shared_memory(usage.total, usage.free, machine.config),
        judge_leftovers(left, usage.total, machine.shm),
    ]


def judge_shared_memory(total: int, free: int, config: Config | None) -> CheckResult:
    """Judge total and free bytes of /dev/shm.

    Docker gives 64 MiB, in which NCCL, SGLang's processes and a push of weights do not fit.
    """
    detail, fix = (
        f"{gib(free)} free of {gib(total)}",
        "docker run --shm-size=16g (or --ipc=host); mount -o remount,size=16g /dev/shm",
    )
    if total < 1 << 30:
        return fail("shared memory", f"{detail}; NCCL, SGLang and pushes of weights share it", fix)
    if free < 1 << 30:
        return warn(
            "shared memory",
            f"{detail}; a push of weights then goes through run.dir",
            f"remove what lies there, or {fix}",
        )
    if config and config.sync.transport == "colocated" and free < 4 * (config.sync.bucket_mib or 512) << 20:
        return warn(
            "shared memory",
            f"{detail}; sync.transport=colocated keeps buckets there",
            f"lower sync.bucket_mib, or {fix}",
        )
    return ok("shared memory", detail)


def leftovers(machine: Machine) -> list[Path]:
    """Files and staging directories of engines and runs that no process holds any more."""
    found = [path for path in machine.shm.iterdir() if LEFTOVER.match(path.name)]
    if not found:
        return []
    held = "\n".join(_read(maps) for maps in machine.proc.glob("[0-9]*/maps"))
    return [path for path in found if path.name not in held and not _owned(path, machine)]


def _owned(path: Path, machine: Machine) -> bool:
    """Whether `path` is a staging directory whose run is still alive."""
    owner = _read(path / "owner") if path.is_dir() else ""
    return owner.isdecimal() and (machine.proc / owner).exists()


def judge_leftovers(left: list[Path], total: int, shm: Path) -> CheckResult:
    """Judge the files that `leftovers` found, on the file system `shm` of `total` bytes."""
    nbytes = sum(
        file.stat().st_size
        for path in left
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )
    detail = f"{len(left)} files of killed engines and runs in {shm}, {gib(nbytes)}"
    if nbytes > 0.05 * total or len(left) > 1000:
        fix = f"while no run and no engine is alive: rm -r {shm}/sglang_loads_*.shm {shm}/megasd-*"
        return warn("shared memory leftovers", detail, fix)
    return ok("shared memory leftovers", detail)


def check_limits(machine: Machine) -> list[CheckResult]:
    """Check how many open files, processes and locked bytes of memory a process may have."""
    files, processes, locked = (
        resource.getrlimit(kind)[0]
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)
    )
    wanted = 4096 + 4 * (machine.config.rollout.max_concurrency if machine.config else 0)
    return [
        judge_limit(
            "open files",
            files,
            wanted,
            "ulimit -n 65536 (Slurm: LimitNOFILE of slurmd; docker run --ulimit nofile=65536)",
        ),
        judge_limit("processes", processes, 4096, "ulimit -u unlimited (docker run --ulimit nproc=-1)"),
        judge_locked(locked, (machine.sys / "class/infiniband").is_dir()),
    ]


def judge_limit(name: str, value: int, wanted: int, fix: str) -> CheckResult:
    """Warn if the limit `value` is below `wanted`."""
    shown = "unlimited" if value == resource.RLIM_INFINITY else str(value)
    if value != resource.RLIM_INFINITY and value < wanted:
        return warn(name, f"{shown} allowed, {wanted} may be needed", fix)
    return ok(name, f"{shown} allowed")


def judge_locked(value: int, fabric: bool) -> CheckResult:
    """Judge the bytes that may be locked; fabric: the machine has InfiniBand."""
    if value == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    if fabric:
        fix = "ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity of slurmd; docker run --ulimit memlock=-1)"
        return warn("locked memory", f"{gib(value)}; NCCL cannot register its buffers with InfiniBand", fix)
    return ok("locked memory", f"{gib(value)}, enough without InfiniBand")


def check_ports(machine: Machine) -> list[CheckResult]:
    """Check the loopback interface, torchrun's port, and the ports that the config fixes."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return [
            fail(
                "ports",
                f"127.0.0.1 cannot be bound: {error.strerror}",
                "bring the loopback interface up: ip link set lo up",
            )
        ]
    taken = port_error("127.0.0.1", RENDEZVOUS)
    found = [ok("ports", f"loopback can be bound, {RENDEZVOUS} is free")]
    if taken:
        fix = (
            "give torchrun another port (--rdzv-endpoint HOST:PORT or MASTER_PORT); see who has it: ss -ltnp"
            f" 'sport = :{RENDEZVOUS}'"
        )
        found = [warn("ports", f"{RENDEZVOUS}, torchrun's port where none is given, is taken ({taken})", fix)]
    engine = machine.config.rollout.engine if machine.config else None
    if engine and engine.port and not engine.urls:
        for port in range(engine.port, engine.port + engine.num_engines):
            taken, where = port_error(engine.host, port), f"rollout.engine.port {engine.host}:{port}"
            fix = f"give another one, or 0 for a free one; see who has it: ss -ltnp 'sport = :{port}'"
            found.append(
                fail("engine port", f"{where} cannot be bound ({taken})", fix)
                if taken
                else ok("engine port", f"{where} is free")
            )
    return found


def port_error(host: str, port: int) -> str:
    """Why a port cannot be bound; "" if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def check_host_name(machine: Machine) -> CheckResult:
    """Check that the machine's own name has an address, which gloo and torchrun look up."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        fix = (
            "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME (lo on one machine) and NCCL_SOCKET_IFNAME"
        )
        return warn("host name", f"{name} has no address ({error})", fix)
    return ok("host name", f"{name} is {address}")


def check_clock(machine: Machine) -> list[CheckResult]:
    """Check the wall clock.

    It must run like the monotonic clock, be kept by NTP, and agree with the file system of run.dir.
    """
    begun = time.time(), time.monotonic()
    time.sleep(0.2)
    jump = (time.time() - begun[0]) - (time.monotonic() - begun[1])
    return [
        judge_clock(jump, file_skew(machine.run_dir), clock_status(), time.strftime("%Y-%m-%d %H:%M:%S %Z"))
    ]


def judge_clock(jump: float, skew: float | None, status: int | None, now: str) -> CheckResult:
    """Judge the wall clock.

    jump: seconds that it gained on the monotonic clock. skew: seconds that the file server's clock
    is ahead of it. status: the kernel's flags. None: not known.
    """
    ntp = "enable chronyd or systemd-timesyncd on the host"
    if abs(jump) > 0.05:
        return fail(
            "clock",
            f"{now}; the wall clock jumped {jump:+.2f} s in 0.2 s",
            f"something sets it by force: {ntp}",
        )
    if skew is not None and abs(skew) > SKEW_SECONDS:
        fix = f"{ntp}, and on the file server: times of files and of this machine must agree"
        return warn("clock", f"{now}; new files in run.dir are stamped {skew:+.0f} s off", fix)
    if status is not None and status & UNSYNCHRONISED:
        return warn(
            "clock",
            f"{now}; the kernel says that nothing keeps it synchronised",
            f"{ntp}; else logs of machines drift apart",
        )
    return ok("clock", f"{now}; synchronised" if status is not None else now)


def clock_status() -> int | None:
    """The status word of adjtimex; None if this process may not read it."""
    # The words of struct timex: modes, offset, freq, maxerror, esterror, status.
    words = (ctypes.c_long * 64)()
    with contextlib.suppress(AttributeError, OSError):
        if ctypes.CDLL(None).adjtimex(words) >= 0 and ctypes.sizeof(ctypes.c_long) == 8:
            return int(words[5]) & 0xFFFFFFFF
    return None


def file_skew(folder: Path) -> float | None:
    """Seconds that the clock of a directory's file system is ahead of ours.

    None if nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)) as file:
            file.write(b"x")
            file.flush()
            return os.fstat(file.fileno()).st_mtime - time.time()
    except OSError:
        return None


def nearest(folder: Path) -> Path:
    """The directory if it exists, else the nearest directory above it that does."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_sandbox(machine: Machine) -> CheckResult:
    """Check that programs of reward.verifier=code have a sandbox to run in."""
    from megasd.rewards.sandbox import find_kind

    try:
        return ok("sandbox", f"programs of reward.verifier=code run in {find_kind()}")
    except UserError as error:
        bad = fail if machine.config and machine.config.reward.verifier == "code" else warn
        reason = one_line(str(error).removeprefix("reward.verifier=code: "))
        return bad(
            "sandbox", reason, "apt-get install bubblewrap; docker run --security-opt seccomp=unconfined"
        )


def _read(path: Path) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
