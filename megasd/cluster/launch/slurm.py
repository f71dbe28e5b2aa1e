"""The sbatch script of a run, rendered from its config.

Rendering is pure: the same config gives the same bytes on every machine, and no value of an
environment variable is read.

The script starts torchrun on the actor nodes by one srun. If there are engine nodes, a second srun
starts `megasd serve` on them, in the background. Before the time is over Slurm sends USR1, and the
script hands it to the trainer's step, which saves and ends. The file <run.dir>/preempted says so,
since torchrun's exit code is 1 whatever a rank's was. The job then queues itself again and goes on
from the saved checkpoint.
"""

from __future__ import annotations

from shlex import quote

from megasd.cluster.launch.job import RENDEZVOUS, LaunchJob
from megasd.config.schema import ClusterConfig

HEADER = """\
#!/bin/bash
# {about}
# Made by `megasd launch slurm`; values of variables are taken from the submitting shell, by name.
{options}
# For shellcheck: lines of cluster.setup may source what it cannot see, and the functions below \
run on the nodes.
# shellcheck disable=SC1090,SC1091,SC2317,SC2329
set -u
run_dir={run_dir}
config={config}
if [ ! -f "$config" ]; then
    echo "$config: missing in $PWD; submit with megasd launch slurm, which writes it" >&2
    exit 2
fi
# What an earlier start of this job left must not be taken for the end of this one.
rm -f -- "$run_dir/preempted"
"""

TRAINER = """
train() {{
    set -e
{setup}    exec {torchrun}
}}
"""

ENGINES = """
serve() {{
    set -e
{setup}    trap '' USR1 # the trainer's affair
    exec megasd serve "$1" --host "$SLURMD_NODENAME"
}}
"""

START_ENGINES = """\
# Only who knows this key may ask the engines for anything; the steps inherit it.
MEGASD_ENGINE_KEY=${MEGASD_ENGINE_KEY:-$(od -An -N24 -tx1 /dev/urandom | tr -d ' \\n')}
export MEGASD_ENGINE_KEY
"""

WAIT = """\
trap 'echo "preempted: the trainer saves"; kill -USR1 "$trainer"' USR1
while kill -0 "$trainer" 2>/dev/null; do wait "$trainer"; done
wait "$trainer"
code=$?
"""

WAIT_WITH_ENGINES = """\
trap 'echo "preempted: the trainer saves"; kill -USR1 "$trainer"' USR1
engines_code=0
while kill -0 "$trainer" 2>/dev/null; do
    if [ -n "$engines" ] && ! kill -0 "$engines" 2>/dev/null; then
        wait "$engines"
        engines_code=$?
        engines=
        # With 0 they end because the run is over: the trainer then has a minute to be gone.
        for _ in {{1..60}}; do
            [ "$engines_code" -eq 0 ] && kill -0 "$trainer" 2>/dev/null && {{ sleep 1 & wait $!; }}
        done
        if [ "$engines_code" -eq 0 ] && kill -0 "$trainer" 2>/dev/null; then
            engines_code=1
        fi
        if [ "$engines_code" -ne 0 ]; then
            echo "the engines ended before the run (exit code $engines_code): the trainer is told to save" >&2
            kill -USR1 "$trainer"
            (sleep {seconds}; kill "$trainer") 2>/dev/null &
        fi
    fi
    sleep 1 &
    wait $!
done
wait "$trainer"
code=$?
# Engines close when the run is over; those that do not are ended.
for _ in {{1..30}}; do
    [ -n "$engines" ] && kill -0 "$engines" 2>/dev/null && sleep 1
done
[ -z "$engines" ] || kill "$engines" 2>/dev/null
if [ "$engines_code" -ne 0 ]; then
    exit "$engines_code"
fi
"""

REQUEUE = """\
if [ -e "$run_dir/preempted" ]; then
    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
        echo "saved; queued again (start ${{SLURM_RESTART_COUNT:-0}} of {max_requeues})"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "saved; queued again {max_requeues} times already: submit the job again to go on" >&2
    fi
    exit 85
fi
exit "$code"
"""


def render(job: LaunchJob) -> str:
    """The sbatch script of a job, as text."""
    cluster = job.config.cluster
    several = job.nodes > 1
    parts = [
        HEADER.format(
            about=_about(cluster), options=_options(job), run_dir=quote(job.run_dir), config=quote(job.yaml)
        ),
        _nodes(cluster),
        TRAINER.format(setup=_setup(cluster), torchrun=_wrap(_torchrun(job), 8)),
    ]
    if cluster.engine_nodes:
        parts += [
            ENGINES.format(setup=_setup(cluster)),
            "\n",
            START_ENGINES,
            _srun(cluster, "engines", cluster.engine_nodes, "serve"),
        ]
    else:
        parts.append("\n")
    parts.append(_srun(cluster, "trainer", cluster.actor_nodes, "train", label=several))
    parts.append(WAIT_WITH_ENGINES.format(seconds=cluster.signal_seconds) if cluster.engine_nodes else WAIT)
    parts.append(REQUEUE.format(max_requeues=cluster.max_requeues))
    return "".join(parts)


def _about(cluster: ClusterConfig) -> str:
    """The sentence at the head of the script."""
    actors = f"{cluster.actor_nodes} x {cluster.gpus_per_node} ranks train"
    if cluster.engine_nodes:
        return f"{actors}; {cluster.engine_nodes} more nodes serve engines."
    return f"{actors}; engines share their GPUs."


def _options(job: LaunchJob) -> str:
    """The #SBATCH lines."""
    cluster = job.config.cluster
    values = {
        "job-name": cluster.job_name,
        "account": cluster.account,
        "partition": cluster.partition,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node,
        "mem": 0,
        "time": cluster.time,
        "signal": f"B:USR1@{cluster.signal_seconds}",
        "open-mode": "append",
        "output": f"{job.folder}/%j.log",
        "export": ",".join(job.exported),
    }
    options = [f"--{name}={quote(str(value))}" for name, value in values.items() if value is not None]
    return "\n".join(
        f"#SBATCH {option}" for option in [*options, "--exclusive", "--requeue", *cluster.sbatch]
    )


def _nodes(cluster: ClusterConfig) -> str:
    """Shell lines that split the job's nodes into actor and engine nodes; "" for one node."""
    if cluster.actor_nodes + cluster.engine_nodes == 1:
        return ""
    lines = [
        'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "# The ranks meet at the first node; the port differs from job to job.",
        'export MEGASD_RENDEZVOUS="${nodes[0]}:$((29500 + SLURM_JOB_ID % 1000))"',
        f'actors=$(IFS=,; echo "${{nodes[*]:0:{cluster.actor_nodes}}}")',
    ]
    if cluster.engine_nodes:
        lines.append(f'served=$(IFS=,; echo "${{nodes[*]:{cluster.actor_nodes}}}")')
    return "\n".join(lines) + "\n"


def _torchrun(job: LaunchJob) -> list[str]:
    """The words of the command that runs on each actor node."""
    several = job.config.cluster.actor_nodes > 1
    options = job.torchrun(nodes=several)
    if several:
        options[1:1] = RENDEZVOUS
    return ["torchrun", *options, "-m megasd.cli train", '"$1"', "run.resume=auto"]


def _setup(cluster: ClusterConfig) -> str:
    """The lines of cluster.setup, indented for a shell function."""
    return "".join(f"    {line}\n" for line in cluster.setup)


def _srun(cluster: ClusterConfig, step: str, nodes: int, function: str, *, label: bool = False) -> str:
    """An srun in the background with one task on each of `nodes` nodes.

    The shell variable named `step` holds its process id.
    """
    where = {"trainer": "actors", "engines": "served"}[step]
    # Without --ntasks srun takes SLURM_NTASKS, the number of tasks of the whole job.
    options = [
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--kill-on-bad-exit=1",
        "--cpu-bind=none",
    ]
    if cluster.actor_nodes + cluster.engine_nodes > 1:
        options += ["--overlap", f'--nodelist="${where}"']
    if label:
        options.append("--label")
    if cluster.container_image is not None:
        mounts = ",".join(["$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR", *cluster.container_mounts])
        options += [f"--container-image={quote(cluster.container_image)}", f'--container-mounts="{mounts}"']
        options.append('--container-workdir="$SLURM_SUBMIT_DIR"')
    program = f'bash -c "$(declare -f {function}); {function} \\"\\$1\\"" {function} "$config"'
    return f"{_wrap(['srun', *options, program], 4)} &\n{step}=$!\n"


def _wrap(words: list[str], indent: int) -> str:
    """One command, wrapped into lines of about 100 characters."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > 100:
            lines.append(" " * indent + word)
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)
