"""What every launcher agrees on: which nodes a run takes, what is said on each, and whether the
config can run there at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megasd.algo.recipes import RECIPES
from megasd.algo.stages import check_stages
from megasd.config.load import load_config, to_yaml
from megasd.config.schema import Config, ConfigError
from megasd.config.validate import validate_values
from megasd.config.validate_files import RUN_FILES
from megasd.config.validate_rollout import needs_engine
from megasd.preemption import PREEMPTED_MARKER
from megasd.types import UserError

# Variables that every job takes from the submitting shell, by name: without PATH a node finds
# neither Slurm nor the environment.
ALWAYS_EXPORTED = ("HOME", "LANG", "PATH", "USER")
# Static, torchrun's default: the first task has rank 0 and holds the store. With c10d the agents
# settle by chance who has rank 0, guess from names who holds the store (Slurm's name of a node need
# not be its host name), and bury the news of a failure under their own.
RENDEZVOUS = ['--node-rank="$SLURM_PROCID"', '--rdzv-endpoint="$MEGASD_RENDEZVOUS"']


@dataclass(frozen=True)
class LaunchJob:
    """A run as a launcher sees it. Paths are relative to the directory that it is submitted from,
    unless run.dir is absolute.
    """

    config: Config
    run_dir: str

    @property
    def ranks(self) -> int:
        """Ranks of the trainer over all its nodes; one on each GPU."""
        return self.config.cluster.actor_nodes * self.config.cluster.gpus_per_node

    @property
    def nodes(self) -> int:
        return self.config.cluster.actor_nodes + self.config.cluster.engine_nodes

    @property
    def folder(self) -> str:
        """Where the submitted config, the script and the job's output lie."""
        return str(PurePosixPath(self.run_dir) / "launch")

    @property
    def yaml(self) -> str:
        """The resolved config that goes with the job: a later change of the files it came from does
        not reach a waiting job.
        """
        return str(PurePosixPath(self.folder) / f"{self.config.cluster.job_name}.yaml")

    @property
    def script(self) -> str:
        return str(PurePosixPath(self.folder) / f"{self.config.cluster.job_name}.sbatch")

    @property
    def exported(self) -> list[str]:
        """Names of the variables that go from the submitting shell to the job."""
        return sorted({*ALWAYS_EXPORTED, *self.config.cluster.env})

    def torchrun(self, *, nodes: bool) -> list[str]:
        """Options of torchrun on each actor node, but for the rendezvous where there is one (`nodes`)."""
        cluster = self.config.cluster
        return [
            *([f"--nnodes={cluster.actor_nodes}"] if nodes else ["--standalone"]),
            f"--nproc-per-node={cluster.gpus_per_node}",
            # The agent hands these on to its ranks, then waits until they have saved before it kills them.
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            f"--shutdown-timeout={cluster.signal_seconds}",
        ]


def read_job(files: list[str], overrides: list[str]) -> LaunchJob:
    """The job of YAML `files` and dotted `overrides`, read and checked as `megasd train` does, but
    for model and data files. Raises ConfigError.
    """
    job = make_launch_job(load_config(files, overrides, RECIPES))
    check_stages(job.config, job.ranks)
    return job


def make_launch_job(config: Config) -> LaunchJob:
    """The job of a config that can run on the machines of its `cluster`. Raises ConfigError; looks
    at no model and no data file, which need not lie on the submitting machine.
    """
    job = LaunchJob(config, config.run.dir)
    _check_resume(config)
    validate_values(config, job.ranks)
    _check_engines(config)
    return job


def write_job_config(job: LaunchJob) -> None:
    """Write the resolved config where the job looks for it. UserError when it cannot be, or when
    another job's run is there.
    """
    text, written = to_yaml(job.config), Path(job.yaml)
    directory = Path(job.run_dir)
    # a launch after "told to leave" goes on
    if job.config.run.resume == "none" and not (directory / PREEMPTED_MARKER).exists():
        held = [name for name in RUN_FILES if (directory / name).exists()]
        if held:
            raise UserError(
                f"run.dir={job.run_dir}: already holds a run ({held[0]}); set run.resume=auto to go on, or"
                " another run.dir"
            )
        if written.is_file() and written.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{job.yaml}: belongs to another job of this name; set run.resume=auto, or another run.dir or"
                " cluster.job_name"
            )
    try:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        written.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"run.dir={job.run_dir}: cannot be written to ({error.strerror}); choose another"
        ) from error


def _check_resume(config: Config) -> None:
    run, cluster = config.run, config.cluster
    days, _, clock = cluster.time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    if cluster.signal_seconds >= (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds:
        raise ConfigError(
            f"cluster.signal_seconds={cluster.signal_seconds}: the run would be told to leave as soon as it"
            f" starts (cluster.time={cluster.time}); lower it"
        )
    if run.resume not in ("none", "auto"):
        raise ConfigError(
            f"run.resume={run.resume}: a job that is queued again goes on from its own run.dir (auto); start"
            " it there, or use megasd train"
        )
    if run.overwrite:
        raise ConfigError(
            "run.overwrite: a job that is queued again would begin anew; set it to false and take another"
            " run.dir"
        )


def _check_engines(config: Config) -> None:
    """Engines of the config against the nodes of the cluster."""
    cluster, engine = config.cluster, config.rollout.engine
    size, gpus = engine.tensor_parallel_size, cluster.gpus_per_node
    if cluster.engine_nodes == 0:
        if engine.served:
            raise ConfigError(
                f"rollout.engine.served={engine.served}: cluster.engine_nodes=0 gives those engines no node;"
                " raise that, or set served to 0"
            )
        if needs_engine(config) and not engine.urls and engine.num_engines * size > gpus:
            raise ConfigError(
                f"rollout.engine.num_engines={engine.num_engines}: of tensor_parallel_size={size} they take"
                f" {engine.num_engines * size} GPUs, and a node has cluster.gpus_per_node={gpus}; lower one"
                " of the two, or give engines nodes (cluster.engine_nodes)"
            )
        return
    lead = f"cluster.engine_nodes={cluster.engine_nodes}:"
    if not needs_engine(config):
        raise ConfigError(f"{lead} this run samples nothing; set it to 0")
    if engine.urls:
        raise ConfigError(f"{lead} rollout.engine.urls names engines that run already; drop one of the two")
    if gpus % size:
        raise ConfigError(
            f"rollout.engine.tensor_parallel_size={size}: does not divide the {gpus} GPUs of an engine node"
            " (cluster.gpus_per_node)"
        )
    engines = cluster.engine_nodes * gpus // size
    if engine.served != engines:
        raise ConfigError(
            f"rollout.engine.served={engine.served}: {cluster.engine_nodes} engine nodes of {gpus} GPUs serve"
            f" {engines} engines of tensor_parallel_size={size}; set rollout.engine.served={engines}"
        )
    if engine.release_memory:
        raise ConfigError(
            "rollout.engine.release_memory: engines on nodes of their own share no GPU with the actor; set it"
            " to false"
        )
