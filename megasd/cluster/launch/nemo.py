"""A run through nemo-run (0.11.1, the extra `launch`): its executors and scripts from a config, and
an experiment of them.

Here: LocalExecutor, which starts torchrun. On Slurm: SlurmExecutor, each task of which starts on
every one of its nodes, as a script that sets up and becomes torchrun or `megasd serve`. (nemo-run's
own Torchrun launcher would serve one kind of task only, and knows nothing of the signals that ask a
run to save.) Engine nodes are the second part of a heterogeneous job. Values of variables reach the
job by #SBATCH --export=NAMES: nemo-run's env_vars would put them into the script, and its `set -x`
into logs.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from shlex import quote
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

import psutil

from megasd.cluster.launch.job import RENDEZVOUS, LaunchJob, write_job_config
from megasd.config.schema import ConfigError
from megasd.preemption import EXIT_PREEMPTED, PREEMPTED_MARKER
from megasd.types import UserError

if TYPE_CHECKING:
    import nemo_run

# of an experiment: its directory, and the job's name after the prefix
TASK = "train"

# Lines of the batch script, before the steps. The template traces what it runs (set -x), so the key
# is made with that off.
BATCH = """\
# The steps take over what is exported here, although sbatch --export named variables.
export SLURM_EXPORT_ENV=ALL
# Unbuffered, srun gives each task a terminal, and its output is all progress bars; Python's own is unbuffered by PYTHONUNBUFFERED.
unset SLURM_UNBUFFEREDIO
export MEGASD_RENDEZVOUS="$head_node:{port}"
rm -f -- {marker}
# Queued again only when the run was told to leave and has saved; a crash is not repeated.
scontrol() {{ if [ "$1" != requeue ] || [ -e {marker} ]; then command scontrol "$@"; fi; }}
"""  # noqa: E501
ENGINE_KEY = """\
{ set +x; } 2>/dev/null
export MEGASD_ENGINE_KEY="${MEGASD_ENGINE_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \\n')}"
set -x
"""
# What every node of a task runs. /nemo_run is the experiment's directory: nemo-run writes the real
# one in its place without a container.
NODE = """\
set -e
cd "$SLURM_SUBMIT_DIR"
{setup}# The code as it was when the job was submitted, where the packager took it along.
export PYTHONPATH="/nemo_run/code${{PYTHONPATH:+:$PYTHONPATH}}"
{program}
"""


def launch(job: LaunchJob, *, executor: str, dry_run: bool, detach: bool) -> int:
    """Run the job in an experiment of `executor` (local or slurm) and wait for it; 0 when it
    succeeded, else 1. With `detach` (slurm) only submit it; with `dry_run` print what would be run.
    Raises UserError.
    """
    run = _nemo_run()
    if executor == "local":
        return _launch_here(run, job, dry_run=dry_run, detach=detach)
    if dry_run:
        sys.stdout.write(rendered(job))
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found on this machine; run this where Slurm is, or see the script with --dry-run"
        )
    write_job_config(job)
    with run.Experiment(job.config.cluster.job_name) as experiment:
        add(experiment, job)
        experiment.run(detach=detach, tail_logs=not detach)
    return 0 if detach or _succeeded(experiment) else 1


def add(experiment: nemo_run.Experiment, job: LaunchJob, home: str | None = None) -> None:
    """Add the job's tasks to an experiment on Slurm: the trainer, and the engines where there are
    engine nodes. home: nemo-run's directory, if not $NEMORUN_HOME.
    """
    executor = actor_executor(job, home)
    if job.config.cluster.engine_nodes:
        experiment.add(
            [train_script(job), serve_script(job)], executor=[executor, engine_executor(job, home)], name=TASK
        )
    else:
        experiment.add(train_script(job), executor=executor, name=TASK)


def local_executor(job: LaunchJob) -> nemo_run.LocalExecutor:
    """The ranks of this machine, under torchrun."""
    run, cluster = _nemo_run(), job.config.cluster
    if job.nodes > 1:
        raise ConfigError(
            f"cluster.actor_nodes={cluster.actor_nodes}, engine_nodes={cluster.engine_nodes}: --executor"
            " local is this machine alone; set them to 1 and 0"
        )
    # torchrun takes its options from PET_<OPTION> too; the executor has none for these.
    options = dict(
        option.removeprefix("--").split("=")
        for option in job.torchrun(nodes=False)
        if option.startswith("--s") and "=" in option
    )
    env = {
        "LOGLEVEL": "WARNING",
        **{f"PET_{name.upper().replace('-', '_')}": value for name, value in options.items()},
    }
    return run.LocalExecutor(
        launcher=run.Torchrun(rdzv_id=_number(job)), ntasks_per_node=cluster.gpus_per_node, env_vars=env
    )


def local_script(job: LaunchJob) -> nemo_run.Script:
    """What each rank of this machine runs."""
    run = _nemo_run()
    return run.Script(
        path="megasd.cli", m=True, entrypoint="python", args=["train", job.yaml, "run.resume=auto"]
    )


def actor_executor(job: LaunchJob, home: str | None = None) -> nemo_run.SlurmExecutor:
    """The nodes that train, one task each. home: nemo-run's directory, if not $NEMORUN_HOME."""
    executor = _slurm_executor(job, job.config.cluster.actor_nodes, home)
    executor.heterogeneous = job.config.cluster.engine_nodes > 0
    return executor


def engine_executor(job: LaunchJob, home: str | None = None) -> nemo_run.SlurmExecutor:
    """The nodes of engines, one task each."""
    return _slurm_executor(job, job.config.cluster.engine_nodes, home)


def train_script(job: LaunchJob) -> nemo_run.Script:
    """torchrun on an actor node."""
    several = job.config.cluster.actor_nodes > 1
    options = job.torchrun(nodes=several)
    if several:
        options[1:1] = RENDEZVOUS
    return _script(
        job, f"exec torchrun {' '.join(options)} -m megasd.cli train {quote(job.yaml)} run.resume=auto"
    )


def serve_script(job: LaunchJob) -> nemo_run.Script:
    """`megasd serve` on an engine node; USR1 is the trainer's affair."""
    return _script(job, f"trap '' USR1\nexec megasd serve {quote(job.yaml)} --host \"$SLURMD_NODENAME\"")


def rendered(job: LaunchJob) -> str:
    """The batch script that nemo-run would submit and the scripts of its tasks, as text.
    $NEMORUN_HOME stands for its value, and the experiment, which nemo-run numbers by the clock, has
    the number 0.
    """
    run, title = _nemo_run(), job.config.cluster.job_name
    with tempfile.TemporaryDirectory() as home:
        with run.Experiment(
            title, id=f"{title}_0", base_dir=home, log_level="ERROR", clean_mode=True
        ) as experiment:
            add(experiment, job, home)
            experiment.dryrun(log=False, delete_exp_dir=False)
        directory = Path(home, "experiments", title, f"{title}_0")
        files = [*directory.glob("*_sbatch.sh"), *sorted((directory / TASK / "scripts").glob("*.sh"))]
        parts = [
            f"# ---- {file.relative_to(home)}\n{file.read_text(encoding='utf-8').strip()}\n" for file in files
        ]
    return "".join(parts).replace(home, "$NEMORUN_HOME")


def _launch_here(run: ModuleType, job: LaunchJob, *, dry_run: bool, detach: bool) -> int:
    """Run the job on this machine. SIGUSR1 and SIGTERM are handed to torchrun, whose ranks then save."""
    if detach:
        raise UserError(
            "--detach: nemo-run cannot leave a local run alone; take --executor slurm, or drop it"
        )
    if dry_run:
        print(_local_command(job))
        return 0
    write_job_config(job)
    # of an earlier launch
    (Path(job.run_dir) / PREEMPTED_MARKER).unlink(missing_ok=True)
    with run.Experiment(job.config.cluster.job_name) as experiment:
        experiment.add(local_script(job), executor=local_executor(job), name=TASK, tail_logs=True)
        experiment.run()
        # torchx has taken SIGTERM to kill the job
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, _hand_on)
    if (Path(job.run_dir) / PREEMPTED_MARKER).exists():
        return EXIT_PREEMPTED
    return 0 if _succeeded(experiment) else 1


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the agents that this process has started."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(Path(word).name == "torchrun" for word in child.cmdline()[:2]):
                child.send_signal(number)


def _local_command(job: LaunchJob) -> str:
    """The command of `local_script` under `local_executor`."""
    from nemo_run.run.torchx_backend.packaging import package

    executor = local_executor(job)
    role = package(TASK, local_script(job), executor, serialize_metadata_for_scripts=False).roles[0]
    return " ".join(
        [
            *(f"{name}={value}" for name, value in sorted(executor.env_vars.items())),
            role.entrypoint,
            *role.args,
        ]
    )


def _slurm_executor(job: LaunchJob, nodes: int, home: str | None) -> nemo_run.SlurmExecutor:
    run, cluster = _nemo_run(), job.config.cluster
    mounts = (
        ["$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR", *cluster.container_mounts]
        if cluster.container_image is not None
        else []
    )
    options = dict(option.removeprefix("--").partition("=")[::2] for option in cluster.sbatch)
    return run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix=f"{cluster.job_name}.",
        nodes=nodes,
        ntasks_per_node=1,
        gpus_per_node=cluster.gpus_per_node,
        mem="0",
        exclusive=True,
        time=cluster.time,
        # to every step: the script has no trap
        signal=f"USR1@{cluster.signal_seconds}",
        container_image=cluster.container_image,
        container_mounts=mounts,
        additional_parameters={
            "export": ",".join(job.exported),
            **{name: value or True for name, value in options.items()},
        },
        srun_args=["--cpu-bind=none"],
        setup_lines=_batch_lines(job),
        retries=cluster.max_requeues,
        packager=run.Packager() if home else _packager(run),
        tunnel=run.LocalTunnel(job_dir=str(Path(home or _home(), "experiments"))),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=5,
    )


def _batch_lines(job: LaunchJob) -> str:
    lines = BATCH.format(port=29500 + _number(job), marker=quote(f"{job.run_dir}/{PREEMPTED_MARKER}"))
    return lines + (ENGINE_KEY if job.config.cluster.engine_nodes else "")


def _script(job: LaunchJob, program: str) -> nemo_run.Script:
    setup = "".join(f"{line}\n" for line in job.config.cluster.setup)
    return _nemo_run().Script(inline=NODE.format(setup=setup, program=program))


def _packager(run: ModuleType) -> nemo_run.Packager:
    """The commit checked out here, if this is a checkout of megasd; else nothing: the nodes have it
    installed.
    """
    done = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and Path(done.stdout.strip(), "megasd", "cli.py").is_file():
        return run.GitArchivePackager()
    return run.Packager()


def _number(job: LaunchJob) -> int:
    """A number below 1000 that differs between names of jobs, for ports and rendezvous."""
    return zlib.crc32(job.config.cluster.job_name.encode()) % 1000


def _home() -> str:
    from nemo_run.config import get_nemorun_home

    return get_nemorun_home()


def _succeeded(experiment: nemo_run.Experiment) -> bool:
    return all(str(job.state) == "SUCCEEDED" for job in experiment.jobs)


def _nemo_run() -> ModuleType:
    """nemo_run, which takes seconds to import. UserError that names the extra when it cannot be."""
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(f"nemo-run cannot be imported ({error}); pip install 'megasd[launch]'") from error
    return nemo_run
