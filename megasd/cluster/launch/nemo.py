"""A run through nemo-run (0.11.1, the extra `launch`): executors and scripts from a config.

On this machine a LocalExecutor starts torchrun. On Slurm a SlurmExecutor starts a script on every
node of a task. The script sets up the node and becomes torchrun or `megasd serve`. Engine nodes are
the second part of a heterogeneous job.

nemo-run's own Torchrun launcher is not used on Slurm: it has one kind of task only, and does not
hand on the signals that make a run save. Values of variables reach the job by
#SBATCH --export=NAMES: nemo-run's env_vars would put them into the script, and its `set -x` into
logs.
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

# Name of an experiment's task: its directory, and the job's name after the prefix.
TASK = "train"

# Lines of the batch script before its steps. nemo-run's template traces what it runs (set -x).
# ENGINE_KEY turns that off while it makes the key.
BATCH = """\
# The steps take over what is exported here, although sbatch --export named variables.
export SLURM_EXPORT_ENV=ALL
# Unbuffered, srun gives each task a terminal, and its output is all progress bars; \
Python's own is unbuffered by PYTHONUNBUFFERED.
unset SLURM_UNBUFFEREDIO
export MEGASD_RENDEZVOUS="$head_node:{port}"
rm -f -- {marker}
# Queued again only when the run was preempted and has saved; a crash is not repeated.
scontrol() {{ if [ "$1" != requeue ] || [ -e {marker} ]; then command scontrol "$@"; fi; }}
"""
ENGINE_KEY = """\
{ set +x; } 2>/dev/null
export MEGASD_ENGINE_KEY="${MEGASD_ENGINE_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \\n')}"
set -x
"""
# What every node of a task runs. /nemo_run is the experiment's directory in a container; without a
# container nemo-run replaces it by the real path.
NODE = """\
set -e
cd "$SLURM_SUBMIT_DIR"
{setup}# The code as it was when the job was submitted, where the packager took it along.
export PYTHONPATH="/nemo_run/code${{PYTHONPATH:+:$PYTHONPATH}}"
{program}
"""


def launch(job: LaunchJob, *, executor: str, dry_run: bool, detach: bool) -> int:
    """Run the job in an experiment of `executor` (local or slurm) and wait for its end.

    With `detach` (slurm only) the job is submitted and not waited for. With `dry_run` it is only
    printed. Returns 0 if the job succeeded, else 1; locally EXIT_PREEMPTED if it was preempted.
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
    """Add the job's tasks to an experiment on Slurm: the trainer, and engines on engine nodes.

    home: nemo-run's directory; None means $NEMORUN_HOME.
    """
    executor = actor_executor(job, home)
    if job.config.cluster.engine_nodes:
        experiment.add(
            [train_script(job), serve_script(job)], executor=[executor, engine_executor(job, home)], name=TASK
        )
    else:
        experiment.add(train_script(job), executor=executor, name=TASK)


def local_executor(job: LaunchJob) -> nemo_run.LocalExecutor:
    """The executor of this machine, which starts the ranks by torchrun."""
    run, cluster = _nemo_run(), job.config.cluster
    if job.nodes > 1:
        raise ConfigError(
            f"cluster.actor_nodes={cluster.actor_nodes}, engine_nodes={cluster.engine_nodes}: --executor"
            " local is this machine alone; set them to 1 and 0"
        )
    # The executor has no argument for these options of torchrun, which reads them from the
    # variables PET_<OPTION> too.
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
    """The script that each rank of this machine runs."""
    run = _nemo_run()
    return run.Script(
        path="megasd.cli", m=True, entrypoint="python", args=["train", job.yaml, "run.resume=auto"]
    )


def actor_executor(job: LaunchJob, home: str | None = None) -> nemo_run.SlurmExecutor:
    """The executor of the actor nodes, one task each. home: None means $NEMORUN_HOME."""
    executor = _slurm_executor(job, job.config.cluster.actor_nodes, home)
    executor.heterogeneous = job.config.cluster.engine_nodes > 0
    return executor


def engine_executor(job: LaunchJob, home: str | None = None) -> nemo_run.SlurmExecutor:
    """The executor of the engine nodes, one task each. home: None means $NEMORUN_HOME."""
    return _slurm_executor(job, job.config.cluster.engine_nodes, home)


def train_script(job: LaunchJob) -> nemo_run.Script:
    """The script of an actor node, which becomes torchrun."""
    several = job.config.cluster.actor_nodes > 1
    options = job.torchrun(nodes=several)
    if several:
        options[1:1] = RENDEZVOUS
    return _script(
        job, f"exec torchrun {' '.join(options)} -m megasd.cli train {quote(job.yaml)} run.resume=auto"
    )


def serve_script(job: LaunchJob) -> nemo_run.Script:
    """The script of an engine node, which becomes `megasd serve` and ignores USR1."""
    return _script(job, f"trap '' USR1\nexec megasd serve {quote(job.yaml)} --host \"$SLURMD_NODENAME\"")


def rendered(job: LaunchJob) -> str:
    """The batch script that nemo-run would submit and the scripts of its tasks, as text.

    The text has "$NEMORUN_HOME" in place of the directory. The experiment has the number 0, where
    nemo-run would take a number from the clock.
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
    """Run the job on this machine; on SIGUSR1 and SIGTERM the ranks save and end."""
    if detach:
        raise UserError(
            "--detach: nemo-run cannot leave a local run alone; take --executor slurm, or drop it"
        )
    if dry_run:
        print(_local_command(job))
        return 0
    write_job_config(job)
    # A marker that is here was left by an earlier launch.
    (Path(job.run_dir) / PREEMPTED_MARKER).unlink(missing_ok=True)
    with run.Experiment(job.config.cluster.job_name) as experiment:
        experiment.add(local_script(job), executor=local_executor(job), name=TASK, tail_logs=True)
        experiment.run()
        # torchx would kill the job on SIGTERM; hand the signals to torchrun instead.
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, _hand_on)
    if (Path(job.run_dir) / PREEMPTED_MARKER).exists():
        return EXIT_PREEMPTED
    return 0 if _succeeded(experiment) else 1


def _hand_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to every torchrun that this process has started."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(Path(word).name == "torchrun" for word in child.cmdline()[:2]):
                child.send_signal(number)


def _local_command(job: LaunchJob) -> str:
    """The command that starts `local_script` under `local_executor`, as text."""
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
    """An executor that starts one task on each of `nodes` nodes."""
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
        # Slurm sends it to every step, since the script has no trap.
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
    """Package the commit that is checked out here.

    Outside a checkout of megasd nothing is packaged, and the nodes must have megasd installed.
    """
    done = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and Path(done.stdout.strip(), "megasd", "cli.py").is_file():
        return run.GitArchivePackager()
    return run.Packager()


def _number(job: LaunchJob) -> int:
    """A number below 1000 made of the job's name, for ports and rendezvous."""
    return zlib.crc32(job.config.cluster.job_name.encode()) % 1000


def _home() -> str:
    from nemo_run.config import get_nemorun_home

    return get_nemorun_home()


def _succeeded(experiment: nemo_run.Experiment) -> bool:
    return all(str(job.state) == "SUCCEEDED" for job in experiment.jobs)


def _nemo_run() -> ModuleType:
    """Import nemo_run, which takes seconds. UserError names the extra if it cannot be imported."""
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(f"nemo-run cannot be imported ({error}); pip install 'megasd[launch]'") from error
    return nemo_run
