"""Statistics of whole responses and of the whole batch, before the student's forward.

They are weights, discounts, returns and shifts of tokens.

N samples of this data-parallel rank, R response tokens of all N, one response after another. All
values are constants (no gradient). `group`: the data-parallel ranks WITHOUT context parallel. Every
rank must call, also a rank without tokens. With None or one rank there is no collective. Sums over
the batch are the exact sums of loss/exact_sum.py. So the value of a token does not depend on which
rank holds which sample, except for the last bit of an exp or a sigmoid, which depends on the
token's place in a vector unit. Tensors live on a device that `group` can reduce.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasd.loss.exact_sum import exact_value, exact_words

# EGRSD's discount is at least this factor: it takes at most nine tenths of an advantage.
_DISCOUNT_FLOOR = 0.1
# `median` reads this many of the 32 bits in a round, so it takes three rounds.
_RADIX_BITS = 11


def _all_reduce(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _global_sums(values: list[Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Sum all values of each tensor over the group. One all_reduce."""
    words = torch.stack([exact_words(one) for one in values])
    return [exact_value(one) for one in _all_reduce(words, group).cpu()]


def _by_response(values_R: Tensor, lens_N: Tensor) -> list[Tensor]:
    return list(values_R.split(lens_N.tolist())) if len(lens_N) else []


def _join(parts: list[Tensor], like_R: Tensor) -> Tensor:
    return torch.cat([like_R[:0], *parts])


@torch.no_grad()
def confidence(entropy_R: Tensor, mask_R: Tensor, *, scale: float, group: dist.ProcessGroup | None) -> Tensor:
    """Weight tokens by the teacher's confidence: weight_R, float64 (SRPO 2604.02288).

    weight = exp(-scale H) / (mean of exp(-scale H) over all tokens of the mask), H the teacher's
    entropy; 0 outside the mask. scale: per nat. One all_reduce of 6 int64.
    """
    weight_R = torch.where(mask_R, (-scale * entropy_R.double()).exp(), 0.0)
    total, count = _global_sums([weight_R, mask_R], group)
    return weight_R * (count / total) if total else weight_R


@torch.no_grad()
def entropy_discount(
    entropy_R: Tensor,
    mask_R: Tensor,
    lens_N: Tensor,
    *,
    scale: float,
    window: int,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Compute the discount om_R (float64) of tokens where the teacher is unsure (EGRSD 2605.13255).

    om = clip(1 - scale Hn, 0.1, 1), and 1 outside the mask. With window > 0 it is CL-EGRSD
    (2605.13255). Hn = (the teacher's lowest entropy over this token and the `window` next tokens of
    its response) / max(1 nat, the highest entropy of all tokens of the mask). Tokens outside the
    mask enter neither entropy. One all_reduce (max) of a float64.
    """
    entropy_R = torch.where(mask_R, entropy_R.double(), torch.inf)
    highest = torch.where(mask_R, entropy_R, 0.0).max() if len(mask_R) else entropy_R.new_zeros(())
    highest = _all_reduce(highest, group, dist.ReduceOp.MAX).clamp(min=1.0)
    lowest = []
    for values in _by_response(entropy_R, lens_N):
        padded = torch.cat([values, values.new_full((window,), torch.inf)])
        lowest.append(padded.unfold(0, window + 1, 1).amin(1))
    om_R = (1 - scale * _join(lowest, entropy_R) / highest).clamp(_DISCOUNT_FLOOR, 1.0)
    return torch.where(mask_R, om_R, 1.0)


@torch.no_grad()
def median(values_R: Tensor, mask_R: Tensor, *, group: dist.ProcessGroup | None) -> float:
    """Compute the lower median of the values of all tokens of the mask.

    It is the exact float32 value with at most half of the values below it, or NaN if the mask has
    no tokens. The median is found by counting float32 bit patterns, made ascending, in digits of
    11, 11 and 10 bits. Three all_reduces of at most 2049 int64.
    """
    bits = values_R[mask_R].float().contiguous().view(torch.int32).long()
    # The keys lie in [0, 2^32) and ascend with the value.
    keys = torch.where(bits < 0, -1 - bits - 2**31, bits) + 2**31
    rank, prefix, shift = None, 0, 32
    while shift > 0:
        width = min(_RADIX_BITS, shift)
        shift -= width
        digits = keys[keys >> (shift + width) == prefix] >> shift & (2**width - 1)
        counts = _all_reduce(torch.bincount(digits, minlength=2**width), group).cumsum(0)
        total = int(counts[-1])
        if total == 0:
            return math.nan
        rank = (total - 1) // 2 if rank is None else rank
        digit = int((counts <= rank).sum())
        rank -= int(counts[digit - 1]) if digit else 0
        prefix = prefix << width | digit
    signed = prefix - 2**31
    pattern = torch.tensor(signed if signed >= 0 else -1 - signed - 2**31, dtype=torch.int64)
    return pattern.to(torch.int32).view(torch.float32).item()


@dataclass
class EntropyGate:
    """A gate that is shut while the teacher is too sure (AntiSD 2605.11609).

    The gate is a Schmitt trigger on the teacher's median entropy. It is shut in the first `warmup`
    steps; the mean of their medians is the reference. UNSURE: the paper says neither mean nor last;
    the mean is chosen. After the warm-up the gate is open, until a median falls below ratio *
    reference. It is then shut, until a median is at or above the reference. With ratio 0 the gate
    never shuts after the warm-up.
    """

    warmup: int
    ratio: float
    # The medians of the warm-up steps (nats).
    seen: list[float] = field(default_factory=list)
    # Whether a low median has shut the gate. The warm-up does not set it.
    is_shut: bool = False

    def observe(self, median: float) -> bool:
        """Add a step's median entropy (nats); return whether the gate is open in that step.

        A median of NaN (no token has a teacher) changes nothing.
        """
        if len(self.seen) < self.warmup:
            if not math.isnan(median):
                self.seen.append(median)
            return False
        reference = math.fsum(self.seen) / len(self.seen)
        if median < self.ratio * reference:
            self.is_shut = True
        elif median >= reference:
            self.is_shut = False
        return not self.is_shut

    def state_dict(self) -> dict[str, Any]:
        """The state of the gate as a dict that JSON can hold."""
        return {"seen": list(self.seen), "is_shut": self.is_shut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the gate from a dict that state_dict made."""
        self.seen, self.is_shut = list(state["seen"]), bool(state["is_shut"])


@torch.no_grad()
def returns(
    log_ratio_R: Tensor, mask_R: Tensor, lens_N: Tensor, *, clip: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Compute the whitened returns to go of MiniLLM (2306.08543): advantages_R, float64.

    log_ratio_R: log T(y) - log S(y) (nats), brought into [-clip, clip]. The return of a token is
    the mean log-ratio of this token and the later tokens of its response; it is 0 outside the mask.
    The returns are whitened over all tokens of the mask (mean 0, population variance 1). The paper
    has a factor of 2 before the whitening. Whitening cancels the factor, but the paper's clip of
    100 is a clip of 50 here. Two all_reduces of 6 and 3 int64.
    """
    reward_R = torch.where(mask_R, log_ratio_R.double().clamp(-clip, clip), 0.0)
    to_go = [part.flip(0).cumsum(0).flip(0) for part in _by_response(reward_R, lens_N)]
    left = [part.flip(0).cumsum(0).flip(0) for part in _by_response(mask_R.double(), lens_N)]
    return_R = torch.where(mask_R, _join(to_go, reward_R) / _join(left, reward_R).clamp(min=1), 0.0)
    total, count = _global_sums([return_R, mask_R], group)
    centred_R = torch.where(mask_R, return_R - total / max(count, 1.0), 0.0)
    (squares,) = _global_sums([centred_R.square()], group)
    return centred_R * (squares / max(count, 1.0) + 1e-8) ** -0.5


@torch.no_grad()
def margin_shift(
    log_ratio_R: Tensor,
    mask_R: Tensor,
    lens_N: Tensor,
    right_N: Tensor,
    scored_N: Tensor,
    *,
    margin: float,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Shift log-ratios so that right and wrong responses keep a margin (Uni-OPD 2605.03677).

    Returns advantages_R (float64), global scope, mean mode: log T(y) - log S(y), shifted by
    response; 0 outside the mask. s is the mean log-ratio of a response's tokens in the mask. If
    (mean s of right responses) - (mean s of wrong responses) falls short of margin (nats), half of
    the missing amount is added to the tokens of right responses, and half is subtracted from the
    tokens of wrong responses. Responses without a verdict (scored_N False) or without a token in
    the mask do not count and are not shifted. If right or wrong responses are missing, no response
    is shifted. One all_reduce of 12 int64.
    """
    advantage_R = torch.where(mask_R, log_ratio_R.double(), 0.0)
    sums_N, counts_N = _sums(advantage_R, lens_N), _sums(mask_R.double(), lens_N)
    mean_N, counted_N = sums_N / counts_N.clamp(min=1), scored_N & (counts_N > 0)
    classes = [counted_N & right_N, counted_N & ~right_N]
    values = [
        part for members_N in classes for part in (torch.where(members_N, mean_N, 0.0), members_N.double())
    ]
    right, num_right, wrong, num_wrong = _global_sums(values, group)
    missing = margin - (right / num_right - wrong / num_wrong) if num_right and num_wrong else 0.0
    shift_N = (classes[0].double() - classes[1].double()) * max(missing, 0.0) / 2
    return torch.where(mask_R, advantage_R + shift_N.repeat_interleave(lens_N), 0.0)


@torch.no_grad()
def scan(divergence_R: Tensor, mask_R: Tensor, lens_N: Tensor, *, kappa: float) -> Tensor:
    """Compute the coefficients of DASH's scan (2608.06243): coefficient_R, float64.

    A coefficient is the derivative of the sum of the scan in a token's divergence r; it is 0
    outside the mask. Over the tokens of the mask of one response: A_last = r_last, A_t = r_t +
    lam_t A_{t+1}, lam_t = sigmoid(-kappa (r_t - mean r)), detached; so c_first = 1, c_t = 1 +
    lam_{t-1} c_{t-1}, and sum c r = sum A. kappa: per nat. No collective.
    """
    found = []
    for values, mask in zip(
        _by_response(divergence_R.double(), lens_N), _by_response(mask_R, lens_N), strict=True
    ):
        r = values[mask]
        carried, coefficients = 0.0, []
        for gate in torch.sigmoid(-kappa * (r - r.mean())).tolist():
            coefficients.append(1 + carried)
            carried = gate * coefficients[-1]
        found.append(torch.zeros_like(values).masked_scatter(mask, r.new_tensor(coefficients)))
    return _join(found, divergence_R.double())


@torch.no_grad()
def sequence_log_ratio(logp_R: Tensor, old_logp_R: Tensor, lens_N: Tensor) -> Tensor:
    """Compute the mean of log pi_theta - log pi_old over each response (GSPO 2507.18071).

    Returns [R] float64: every token has the mean of its response. No collective.
    """
    ratio_R = logp_R.double() - old_logp_R.double()
    return (_sums(ratio_R, lens_N) / lens_N.clamp(min=1)).repeat_interleave(lens_N)


def _sums(values_R: Tensor, lens_N: Tensor) -> Tensor:
    """The sum of each response, [N]; it does not depend on the other responses."""
    return torch.stack([values_R.new_zeros(()), *(part.sum() for part in _by_response(values_R, lens_N))])[1:]
