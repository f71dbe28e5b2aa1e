"""The quickstart's job on this machine through nemo-run: LocalExecutor starts torchrun with two ranks.

make quickstart                                               # once: makes the start model and the rows
python examples/nemo_run/local.py run.steps=10
"""

import sys

import nemo_run as run

from megasd.cluster.launch import nemo
from megasd.cluster.launch.job import read_job, write_job_config


def main() -> None:
    job = read_job(
        ["configs/quickstart.yaml"], ["cluster.gpus_per_node=2", "run.dir=runs/nemo-local", *sys.argv[1:]]
    )
    write_job_config(job)
    with run.Experiment("quickstart") as experiment:
        experiment.add(
            nemo.local_script(job), executor=nemo.local_executor(job), name="train", tail_logs=True
        )
        experiment.run()


if __name__ == "__main__":
    main()
