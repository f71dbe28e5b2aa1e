"""Run a small Slurm on this machine, for tests: two nodes, fake GPUs, accounting.

It runs as root, without systemd, and keeps all its state in one directory.

    python tools/slurm_here.py run COMMAND ...   start Slurm, run COMMAND, stop Slurm in any case;
                                                 the exit code is COMMAND's
    python tools/slurm_here.py start             start Slurm and print the line that makes a shell
                                                 use it (export SLURM_CONF=...)
    python tools/slurm_here.py status            its nodes and jobs; exit code 1 if it does not run
    python tools/slurm_here.py stop              end its jobs and daemons, remove what they wrote

Options come first: --dir DIR (default $TMPDIR/megasd-slurm; start ends and removes what it finds
there), --gpus N (device files that hold nothing, so that --gpus-per-node=N is granted; default 1),
--proctrack linuxproc|cgroup (how Slurm finds the processes that it signals: linuxproc signals all
of a step's, cgroup only the first of each task, as most clusters do; needs cgroup version 1 with
the freezer).

Missing programs are installed with apt-get (Debian, Ubuntu). /etc/hosts has lines for n1 and n2
until stop. The daemons (munged, mariadbd, slurmdbd, slurmctld, slurmd twice) take free ports of
this machine; Slurm's ask for the key that lies in DIR. The database asks the users of this machine
for nothing (root has no password): this is for tests, on a machine of one's own.

It is one file on purpose: it runs where only Python is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server")
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "slurmstepd", "munged", "mariadbd")
HOSTS = Path("/etc/hosts")
FREEZER = Path("/sys/fs/cgroup/freezer/slurm")

# cred_expire is also how long a requeued job waits (120 s unless set). AccountingStoragePass is
# munge's socket once more.
SLURM_CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdLogFile={dir}/slurmd.%n.log
SlurmdSpoolDir={dir}/spool.%n
StateSaveLocation={dir}/state
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
KillWait=10
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={dir}/munge/socket
{nodes}
PartitionName=here Nodes={names} Default=YES MaxTime=60 State=UP
"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
"""


def fail(message: str) -> NoReturn:
    sys.exit(f"slurm_here: {message}")


def install_packages() -> None:
    """Install Slurm, munge and MariaDB by apt-get, if one of their programs is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        fail(
            f"{missing[0]} is missing, and there is no apt-get to install it; install Slurm, munge and"
            " MariaDB"
        )
    print(f"slurm_here: {missing[0]} is missing; installing {', '.join(PACKAGES)}", file=sys.stderr)
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", *command], check=True, env=env, stdout=sys.stderr)


class Cluster:
    """The cluster whose state lies in `dir`."""

    def __init__(self, directory: Path, gpus: int, proctrack: str) -> None:
        self.dir, self.gpus, self.proctrack = directory, gpus, proctrack
        self.conf = directory / "slurm.conf"
        self.env = os.environ | {"SLURM_CONF": str(self.conf)}
        self.mark = f"# slurm_here {directory}"

    def start(self) -> None:
        """Start every daemon and wait until both nodes are idle.

        If a daemon does not come up, everything is removed, and SystemExit has the reason.
        """
        if os.geteuid():
            fail("root starts it, since Slurm's daemons act for other users")
        if self.proctrack == "cgroup" and not FREEZER.parent.is_dir():
            fail(f"--proctrack cgroup: there is no {FREEZER.parent} here; take linuxproc")
        install_packages()
        self.stop()
        (self.dir / "state").mkdir(parents=True)
        self.dir.chmod(0o755)
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_daemons(self) -> None:
        sql_port, dbd_port, ctld_port, *node_ports = free_ports(3 + len(NODES))
        self._start_munge()
        self._start_accounting(sql_port, dbd_port)
        self._write_conf(ctld_port, dbd_port, node_ports)
        self._run("slurmctld", "-c", "-f", str(self.conf))
        for name in NODES:
            (self.dir / f"spool.{name}").mkdir()
            self._run("slurmd", "-N", name, "-f", str(self.conf))
        self._wait("the nodes", self.is_idle)

    def _start_munge(self) -> None:
        directory = self.dir / "munge"
        directory.mkdir()
        key = directory / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for path in (directory, key):
            shutil.chown(path, "munge", "munge")
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "seed",
        }
        self._run(
            "munged",
            *(f"--{option}={directory / name}" for option, name in files.items()),
            user="munge",
            group="munge",
        )

    def _start_accounting(self, sql_port: int, dbd_port: int) -> None:
        directory, password = self.dir / "db", secrets.token_hex(16)
        directory.mkdir()
        shutil.chown(directory, "mysql", "mysql")
        where = ["--no-defaults", f"--datadir={directory}/data"]
        self._run(
            "mariadb-install-db",
            *where,
            "--user=mysql",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )
        options = [
            f"--socket={directory}/socket",
            f"--pid-file={directory}/mariadbd.pid",
            "--bind-address=127.0.0.1",
            f"--port={sql_port}",
        ]
        with (self.dir / "mariadbd.log").open("wb") as log:
            subprocess.Popen(
                ["mariadbd", *where, *options, "--user=mysql", "--innodb-flush-log-at-trx-commit=0"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        sql = ["mariadb", "--no-defaults", f"--socket={directory}/socket", "--user=root", "--execute"]
        self._wait("MariaDB", lambda: subprocess.run([*sql, "select 1"], capture_output=True).returncode == 0)
        user = "slurm@'127.0.0.1'"
        self._run(
            *sql,
            f"create user {user} identified by '{password}'; create database slurm; grant all on slurm.* to"
            f" {user}",
        )
        conf = self.dir / "slurmdbd.conf"
        conf.touch(0o600)
        conf.write_text(
            SLURMDBD_CONF.format(
                dir=self.dir,
                host=socket.gethostname(),
                dbd_port=dbd_port,
                sql_port=sql_port,
                password=password,
            )
        )
        self._run("slurmdbd", env=self.env | {"SLURM_CONF": str(conf)})
        self._wait("slurmdbd", lambda: answers(dbd_port))

    def _write_conf(self, ctld_port: int, dbd_port: int, node_ports: list[int]) -> None:
        host, cpus = socket.gethostname(), os.cpu_count()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.1.{i} Port={port} CPUs={cpus}"
            f" RealMemory=8000 Gres=gpu:{self.gpus}"
            for i, (name, port) in enumerate(zip(NODES, node_ports, strict=True), start=1)
        )
        self.conf.write_text(
            SLURM_CONF.format(
                dir=self.dir,
                host=host,
                ctld_port=ctld_port,
                dbd_port=dbd_port,
                proctrack=self.proctrack,
                nodes=nodes,
                names=",".join(NODES),
            )
        )
        (self.dir / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n" if self.proctrack == "cgroup" else ""
        )
        for i in range(self.gpus):
            # The device numbers of /dev/null.
            os.mknod(self.dir / f"gpu{i}", 0o20666, os.makedev(1, 3))
        (self.dir / "gres.conf").write_text(
            "".join(f"Name=gpu File={self.dir}/gpu{i}\n" for i in range(self.gpus))
        )
        # torchrun and the engines look up the nodes by name.
        with HOSTS.open("a") as hosts:
            hosts.writelines(f"127.0.1.{i} {name} {self.mark}\n" for i, name in enumerate(NODES, start=1))

    def _run(self, *command: str, env: dict[str, str] | None = None, **options: str) -> None:
        """Run one command of the start.

        Its output goes to a file, since a daemon would keep a pipe open.
        """
        log = self.dir / f"start-{command[0]}.log"
        with log.open("ab") as file:
            done = subprocess.run(
                command,
                env=env or self.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=120,
                cwd="/",
                **options,
            )
        if done.returncode:
            fail(f"{' '.join(command)}: exit code {done.returncode}\n{log.read_text()[-2000:]}")

    def _wait(self, what: str, is_there: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not is_there():
            if time.monotonic() > end:
                logs = [
                    f"{path.name}: {path.read_text(errors='replace')[-1000:]}"
                    for path in sorted(self.dir.glob("slurm*.log"))
                ]
                fail("\n".join([f"{what} did not come up in {seconds:.0f} s", *logs]))
            time.sleep(0.1)

    def is_idle(self) -> bool:
        """Whether both nodes are up and free."""
        states = self._ask("sinfo", "--noheader", "--Node", "--format=%T")
        return states.split() == ["idle"] * len(NODES)

    def _ask(self, *command: str) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=10).stdout
        return ""

    def status(self) -> int:
        """Print the nodes and jobs; the exit code."""
        nodes = self._ask("sinfo", "--Node", "--long") if self.conf.is_file() else ""
        print(
            nodes + self._ask("squeue", "--long") if nodes else f"no Slurm in {self.dir}",
            end="" if nodes else "\n",
        )
        return 0 if nodes else 1

    def stop(self) -> None:
        """End jobs and daemons and remove all files. Does nothing if there is no cluster."""
        if not self.dir.exists():
            return
        if not (self.dir / "state").is_dir() and any(self.dir.iterdir()):
            fail(f"{self.dir} is not of slurm_here; give another directory with --dir")
        end_processes(self.processes)
        lines = HOSTS.read_text().splitlines(keepends=True)
        if any(self.mark in line for line in lines):
            # Written in place, since the file may be a mount.
            HOSTS.write_text("".join(line for line in lines if self.mark not in line))
        if self.proctrack == "cgroup" or FREEZER.with_name("slurm_n1").is_dir():
            remove_cgroups()
        shutil.rmtree(self.dir)

    def processes(self) -> list[int]:
        """Process ids of the daemons and of the jobs.

        Daemons are found by their arguments, processes of jobs by their environment.
        """
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                env = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                # A process of the kernel, or one that has just ended.
                continue
            is_daemon = Path(os.fsdecode(words[0])).name.rstrip(":") in DAEMONS and (
                any(os.fsencode(f"{self.dir}/") in word for word in words + env)
            )
            is_job = os.fsencode(f"SLURM_CONF={self.conf}") in env and any(
                word.startswith(b"SLURM_JOB_ID=") for word in env
            )
            if is_daemon or is_job:
                found.append(int(entry.name))
        return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def end_processes(find: Callable[[], list[int]]) -> None:
    """Send SIGTERM, after ten seconds SIGKILL, to the processes of `find` until there are none."""
    start = time.monotonic()
    told: set[int] = set()
    while pids := find():
        late = time.monotonic() - start > 10
        if time.monotonic() - start > 30:
            fail(f"processes {pids} do not end")
        for pid in pids:
            if late or pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(0.2)


def remove_cgroups() -> None:
    """Remove the empty cgroups that slurmd and its steps made."""
    for top in Path("/sys/fs/cgroup").glob("*/slurm*"):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def run(cluster: Cluster, command: list[str]) -> int:
    """Run `command` with the cluster and return its exit code.

    The cluster is stopped even if a signal ends this process.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def on_signal(number: int, frame: FrameType | None) -> NoReturn:
        # The first signal ends the command. A second one must not interrupt the stopping.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, on_signal)
    process = None
    try:
        cluster.start()
        process = subprocess.Popen(command, env=cluster.env)
        return process.wait()
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        if process is not None and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        cluster.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir(), "megasd-slurm"))
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--proctrack", choices=("linuxproc", "cgroup"), default="linuxproc")
    parser.add_argument("action", choices=("run", "start", "status", "stop"))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if (args.action == "run") != bool(args.command):
        parser.error("run COMMAND ...; the other actions take none")
    cluster = Cluster(args.dir.resolve(), args.gpus, args.proctrack)
    if args.action == "run":
        return run(cluster, args.command)
    if args.action == "status":
        return cluster.status()
    getattr(cluster, args.action)()
    if args.action == "start":
        print(f"export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
