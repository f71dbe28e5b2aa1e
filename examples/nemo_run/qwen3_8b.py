"""Qwen3-8B on one node through nemo-run: the executor and the script are megasd's, the experiment is yours.

python examples/nemo_run/qwen3_8b.py                          # submit, and leave
python examples/nemo_run/qwen3_8b.py run.steps=20 run.dir=runs/try cluster.partition=h100
"""

import sys

import nemo_run as run

from megasd.cluster.launch import nemo
from megasd.cluster.launch.job import read_job, write_job_config


def main() -> None:
    job = read_job(["configs/cluster/qwen3_8b_1node.yaml"], sys.argv[1:])
    # a nemo_run.SlurmExecutor: change what your cluster wants changed
    executor = nemo.actor_executor(job)
    write_job_config(job)
    with run.Experiment(job.config.cluster.job_name) as experiment:
        experiment.add(nemo.train_script(job), executor=executor, name="train")
        experiment.run(detach=True)


if __name__ == "__main__":
    main()
