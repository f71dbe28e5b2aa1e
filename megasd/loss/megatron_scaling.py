"""How Megatron scales a loss, and how this package keeps Megatron from scaling it.

With TransformerConfig.calculate_per_token_loss = True, which the model must set, megatron-core
0.16.1 does the following (files and lines of that release):

    pipeline_parallel/schedules.py:257-263
        A loss function that returns (loss, num_tokens, log) is divided neither by num_tokens nor by
        the number of microbatches. A 2-tuple would be multiplied by CP and divided by microbatches.
    distributed/distributed_data_parallel.py:254-259
        gradient_scaling_factor = 1 for dense and expert parameters. average_in_collective must be
        off: gradients are summed over DP x CP.
    distributed/param_and_grad_buffer.py:391-397
        The gradient buffers are therefore not scaled, and the collective is SUM.
    pipeline_parallel/schedules.py:649,672,682 (no pipeline), 1210,1921, 2175,2219,2313
        num_tokens of the microbatches are added up and handed to config.finalize_model_grads_func.
    distributed/finalize_model_grads.py:484-497
        The function all-reduces num_tokens and divides every gradient by it if it is > 0. If
        num_tokens is None, the function skips the division and its collectives.

So the gradient of a step is the plain sum, over microbatches, DP and CP, of the gradient of the
returned loss. The loss of this package is sum_t weight_t loss_t, whose weights hold the global
normaliser already (loss/normalise.py). The loss function reports zero tokens, and
`without_division` wraps finalize_model_grads so that it gets None as num_tokens. Nothing depends on
the number of microbatches, on DP, CP, PP or on which rank holds which sample. Over TP the loss is
replicated, not summed.

Two things in Megatron expect the division that is skipped: auxiliary losses of mixture-of-experts
routers (transformer/moe/router.py, 456-467 and 488-495: multiplied by local tokens) and of
multi-token prediction (models/gpt/gpt_model.py:654). A model that trains with either must scale its
coefficient by 1 / (tokens that enter the layers in a step, over DP x CP and microbatches). A
coefficient of 0 needs no scaling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def megatron_loss(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Make the 3-tuple that Megatron's schedules take: (loss, zero tokens, empty log).

    loss: scalar with gradient, the sum of weight * loss over this microbatch's tokens with their
    `term_weights`. It must depend on the model's graph even when no token has a weight. The loss is
    returned as it is: neither Megatron nor this function scales it. ValueError if it is not a
    scalar. No collective.
    """
    if loss.dim() != 0:
        raise ValueError(f"the loss of a microbatch must be a scalar, got shape {tuple(loss.shape)}")
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), {}


def without_division(finalize_model_grads: Callable[..., None]) -> Callable[..., None]:
    """Wrap Megatron's finalize_model_grads so that it does not divide the gradients by tokens.

    config.finalize_model_grads_func must be the result: the gradients then stay the plain sums that
    the head of the file describes.
    """

    def finalize(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: object) -> None:
        finalize_model_grads(model, None, **kwargs)

    return finalize
