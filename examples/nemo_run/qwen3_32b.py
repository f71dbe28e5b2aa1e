"""Qwen3-32B on four nodes through nemo-run: two train, two serve engines, as the two parts of a
heterogeneous job.

python examples/nemo_run/qwen3_32b.py                         # submit, and leave
python examples/nemo_run/qwen3_32b.py cluster.account=research cluster.time=48:00:00
"""

import sys

import nemo_run as run

from megasd.cluster.launch import nemo
from megasd.cluster.launch.job import read_job, write_job_config


def main() -> None:
    job = read_job(["configs/cluster/qwen3_32b_4nodes.yaml"], sys.argv[1:])
    write_job_config(job)
    with run.Experiment(job.config.cluster.job_name) as experiment:
        tasks = [nemo.train_script(job), nemo.serve_script(job)]
        experiment.add(tasks, executor=[nemo.actor_executor(job), nemo.engine_executor(job)], name="train")
        experiment.run(detach=True)


if __name__ == "__main__":
    main()
