"""megasd: post-training by self-distillation on Megatron-core actors and SGLang rollouts."""

__version__ = "0.1.0"
