"""The words that `megasd plan` prints for the keys of its tables.

The keys themselves (`"signal"`, `"HBM"` ...) are what `megasd plan --json` writes. Programs read
them, so they stay as they are. Every key that memory.py or time.py can produce has a row here
(tests/unit/cluster/test_planner_labels.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Label:
    """What a key is called in a table, and one sentence that explains it."""

    text: str
    about: str


# Memory: phases, the columns of the table.
MEMORY_PHASES = {
    "training": Label("training", "The student's forward, backward and optimizer step."),
    "teacher": Label("teacher forward", "The teacher's forward over the samples, without gradients."),
    "sampling": Label("sampling", "Engines that share the GPU generate responses."),
}
# Memory: causes, the rows of the table.
MEMORY_CAUSES = {
    "weights": Label("student weights", "The rank's part of the trained model, in actor.dtype."),
    "gradients": Label("gradients", "The sum of the gradients of all microbatches, in fp32."),
    "optimizer": Label("optimizer state", "Adam's two moments and the fp32 copy of the weights."),
    "teacher": Label(
        "teacher weights", "The teacher's own weights: an fp32 copy of the student's, or another model."
    ),
    "sync": Label("weight sync buffers", "Buffers through which a weight push goes to the engines."),
    "fp8 copies": Label("FP8 weight copies", "TransformerEngine's FP8 copies of the linear layers' weights."),
    "signal": Label(
        "teacher outputs kept for the loss",
        "Hidden states or top-k log-probs of the teacher, kept from its forward until the student's loss.",
    ),
    "batch": Label("batch", "Token ids, masks and per-token numbers of the step's samples."),
    "activations": Label(
        "activations", "Tensors of the layers: kept for the backward, or alive during a forward."
    ),
    "backward": Label("activation gradients", "Gradients of activations while one layer goes backward."),
    "loss": Label(
        "loss workspace", "Hidden states and logits of the chunk of tokens that the loss works on."
    ),
    "teacher cast": Label(
        "teacher weights in actor.dtype", "A copy of the fp32 teacher in the dtype that its forward uses."
    ),
    "fragmentation": Label(
        "allocator fragmentation",
        "Free blocks of torch's allocator that are too small for a tensor (assumed).",
    ),
    "NCCL": Label("NCCL buffers", "Communication buffers of the process groups (assumed)."),
    "context": Label("CUDA context", "What CUDA, cuBLAS, cuDNN and loaded kernels take (assumed)."),
    "engine weights": Label("engine weights", "The engine's own copy of the model on this GPU."),
    "KV cache": Label("engine KV cache", "Keys and values of the tokens that the engine holds."),
    "engine overhead": Label(
        "engine overhead", "CUDA context, CUDA graphs and temporary tensors of the engine (assumed)."
    ),
}
# Time: phases, the rows of the table.
TIME_PHASES = {
    "sampling": Label("sampling", "Engines read the prompts and generate the responses."),
    "teacher": Label("teacher forward", "The teacher's forwards over the samples."),
    "student": Label("student forward and backward", "Forwards and backwards of the student with the loss."),
    "gradients": Label("gradient reduction", "Ranks add up their gradients and gather the updated weights."),
    "optimizer": Label("optimizer step", "Adam's update, and the update of an averaged (EMA) teacher."),
    "push": Label("weight push", "The new weights go to the engines."),
}
# Time: what a phase waits for.
TIME_CAUSES = {
    "compute": Label("compute", "The GPU's matrix products."),
    "HBM": Label("GPU memory bandwidth", "Reading and writing the GPU's memory (HBM)."),
    "CPU": Label("fixed CPU costs", "Launching kernels, scheduling, pausing and waking engines."),
    "NVLink": Label("NVLink", "Communication between the GPUs of a node."),
    "IB": Label("network between nodes", "Communication between nodes (InfiniBand or the like)."),
    "disk": Label("disk", "Writing and reading the file of a weight push."),
    "bubble": Label("pipeline bubble", "Pipeline stages that have no microbatch to work on."),
}
