"""LaunchJob: what every launcher needs to know of a run, and whether its config can run there."""

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

# Names of variables that every job takes from the submitting shell. Without PATH a node finds
# neither Slurm nor the environment.
ALWAYS_EXPORTED = ("HOME", "LANG", "PATH", "USER")
# Options of torchrun for its static rendezvous, the default: the first task has rank 0 and holds
# the store. With c10d chance decides which agent has rank 0, the agents guess from host names which
# of them holds the store (Slurm's name of a node may differ from its host name), and their own
# errors hide the first failure.
RENDEZVOUS = ['--node-rank="$SLURM_PROCID"', '--rdzv-endpoint="$MEGASD_RENDEZVOUS"']


@dataclass(frozen=True)
class LaunchJob:
    """A run as a launcher sees it.

    Paths are relative to the directory that the run is submitted from, unless run.dir is absolute.
    """

    config: Config
    run_dir: str

    @property
    def ranks(self) -> int:
        """Ranks of the trainer on all actor nodes; one on each GPU."""
        return self.config.cluster.actor_nodes * self.config.cluster.gpus_per_node

    @property
    def nodes(self) -> int:
        """Nodes of the job, for the actor and for engines."""
        return self.config.cluster.actor_nodes + self.config.cluster.engine_nodes

    @property
    def folder(self) -> str:
        """Directory of the submitted config, the script and the job's output."""
        return str(PurePosixPath(self.run_dir) / "launch")

    @property
    def yaml(self) -> str:
        """Path of the resolved config that goes with the job.

        A waiting job reads this copy, so that later changes of the user's files do not reach it.
        """
        return str(PurePosixPath(self.folder) / f"{self.config.cluster.job_name}.yaml")

    @property
    def script(self) -> str:
        """Path of the sbatch script."""
        return str(PurePosixPath(self.folder) / f"{self.config.cluster.job_name}.sbatch")

    @property
    def exported(self) -> list[str]:
        """Names of the variables that go from the submitting shell to the job."""
        return sorted({*ALWAYS_EXPORTED, *self.config.cluster.env})

    def torchrun(self, *, nodes: bool) -> list[str]:
        """Options of torchrun on each actor node.

        nodes: torchrun runs on several nodes; then RENDEZVOUS has to be added.
        """
        cluster = self.config.cluster
        return [
            *([f"--nnodes={cluster.actor_nodes}"] if nodes else ["--standalone"]),
            f"--nproc-per-node={cluster.gpus_per_node}",
            # The agent hands these signals on to its ranks, and kills the ranks only after they
            # have had time to save.
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            f"--shutdown-timeout={cluster.signal_seconds}",
        ]


def read_job(files: list[str], overrides: list[str]) -> LaunchJob:
    """Read and check the job of YAML `files` and dotted `overrides`, as `megasd train` does.

    Model and data files are not checked. Raises ConfigError.
    """
    job = make_launch_job(load_config(files, overrides, RECIPES))
    check_stages(job.config, job.ranks)
    return job


def make_launch_job(config: Config) -> LaunchJob:
    """The job of a config that can run on the machines of its `cluster` section.

    Looks at no model and no data file, which need not lie on the submitting machine. Raises
    ConfigError.
    """
    job = LaunchJob(config, config.run.dir)
    _check_resume(config)
    validate_values(config, job.ranks)
    _check_engines(config)
    return job


def write_job_config(job: LaunchJob) -> None:
    """Write the resolved config where the job looks for it.

    UserError if it cannot be written, or if run.dir holds a run or another job's config.
    """
    text, written = to_yaml(job.config), Path(job.yaml)
    directory = Path(job.run_dir)
    # A launch after a preempted run goes on with that run.
    if job.config.run.resume == "none" and not (directory / PREEMPTED_MARKER).exists():
        present = [name for name in RUN_FILES if (directory / name).exists()]
        if present:
            raise UserError(
                f"run.dir={job.run_dir}: already holds a run ({present[0]}); set run.resume=auto to go on, or"
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
    """Refuse a config whose job could not go on after it is preempted and queued again."""
    run, cluster = config.run, config.cluster
    days, _, clock = cluster.time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    if cluster.signal_seconds >= (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds:
        raise ConfigError(
            f"cluster.signal_seconds={cluster.signal_seconds}: the run would be preempted as soon as it"
            f" starts (cluster.time={cluster.time}); lower it"
        )
    if run.resume not in ("none", "auto"):
        raise ConfigError(
            f"run.resume={run.resume}: a job that is queued again goes on from its own run.dir (auto); start"
            " it there, or use megasd train"
        )
    if run.overwrite:
        raise ConfigError(
            "run.overwrite: a job that is queued again would begin again; set it to false and take another"
            " run.dir"
        )


def _check_engines(config: Config) -> None:
    """Refuse engines of the config that do not fill the nodes of the cluster."""
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
