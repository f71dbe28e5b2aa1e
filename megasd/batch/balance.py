"""Assign the samples of a step to data-parallel ranks and to microbatches.

Plain Python. Every rank computes the same assignment; the ranks exchange no messages.

`by_count` puts a fixed number of samples into a microbatch and assigns them to ranks by length.
`by_tokens` keeps every microbatch within a token budget. It works in four steps:

1. Make microbatches. A packed microbatch takes the sum of its samples' lengths. A padded
   microbatch takes the longest length once for each sample. Neither exceeds the budget.
   Packed: first-fit in falling length finds the smallest number of microbatches. That number is
   rounded up to a multiple of the ranks, and the samples are spread over so many microbatches that
   the costs come out even (greedy, costliest first). Padded: samples of similar length form a
   microbatch, cut so that padding is the least. The costliest microbatches are then cut in two
   until their number is a multiple of the ranks.
2. Put microbatches on ranks by the balanced largest-differencing method (Karmarkar and Karp; equal
   numbers: Michiels et al. 2003). Each block has one microbatch for each rank. The two blocks with
   the widest spread are joined, costliest with cheapest, until one block is left.
3. Even out (packed only). Samples move, or two samples change places, between the costliest and the
   cheapest rank while that brings the two costs closer and the budget holds.
4. Try more microbatches. If the costliest rank is still above `GOAL` times the mean, all steps
   run again with one more microbatch a rank, at most `MORE` times. The best result is taken.

Equal inputs give equal parts: the lower index wins a tie.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

# If the cost of the costliest rank over the mean is at most this, no more microbatches are opened.
GOAL = 1.02
# One more microbatch a rank is accepted only if it lowers that ratio by more than this.
STEP = 0.005
# A further padded microbatch must save this share of the token budget in padding. If it saves
# less, its launch costs more than the padding.
FEE = 1 / 32
# So many microbatches a rank are tried beyond the smallest number that fits.
MORE = 8
# `_even_out` moves at most so many samples.
MOVES = 200


@dataclass
class Part:
    """The samples of one data-parallel rank."""

    # The samples that need a forward. Every rank has the same number of microbatches; an empty
    # microbatch is filler.
    microbatches: list[list[int]]
    # Samples of weight zero. They are counted and not computed.
    idle: list[int] = field(default_factory=list)

    @property
    def samples(self) -> list[int]:
        """All samples of the rank: first the computed samples, then the idle samples."""
        return [i for one in self.microbatches for i in one] + self.idle


def by_count(lengths: Sequence[int], active: Sequence[bool], ranks: int, size: int) -> list[Part]:
    """Make one part a rank with `size` samples in each microbatch.

    The samples go to the ranks in falling length and in the order 0 1 2 2 1 0 0 ... Inactive
    samples come after active samples.
    """
    order = sorted(range(len(lengths)), key=lambda i: (not active[i], -lengths[i], i))
    mine = [[i for k, i in enumerate(order) if _dealt_to(k, ranks) == rank] for rank in range(ranks)]
    computed = [[i for i in one if active[i]] for one in mine]
    count = max(1, -(-max(map(len, computed)) // size))
    return [
        Part(chunks(one, size, count), [i for i in whole if not active[i]])
        for one, whole in zip(computed, mine, strict=True)
    ]


def chunks(samples: Sequence[int], size: int, count: int) -> list[list[int]]:
    """Cut the samples in order into `count` microbatches of `size`; the last may be empty."""
    return [list(samples[first : first + size]) for first in range(0, count * size, size)]


def _dealt_to(k: int, ranks: int) -> int:
    """The rank of the k-th sample, back and forth, which balances lengths in falling order."""
    lap, place = divmod(k, ranks)
    return place if lap % 2 == 0 else ranks - 1 - place


@dataclass(frozen=True)
class Workload:
    """Lengths and costs of the samples, known before they are computed; one entry a sample."""

    # The padded length of the student's sequence.
    tokens: Sequence[int]
    # FLOPs of forward, backward and recomputation over the student's sequence.
    cost: Sequence[float]
    # FLOPs of the forwards over the sample's teacher sequences. They get their own microbatches.
    other: Sequence[float]
    # The largest number of tokens in a microbatch.
    budget: int
    packing: bool

    def total(self, i: int) -> float:
        """FLOPs of all forwards and backwards of a sample."""
        return self.cost[i] + self.other[i]

    def of(self, samples: Sequence[int]) -> float:
        """FLOPs of a microbatch."""
        return bin_cost(self.cost, samples, packing=self.packing) + sum(self.other[i] for i in samples)


def bin_cost(cost: Sequence[float], samples: Sequence[int], *, packing: bool) -> float:
    """The cost of a microbatch.

    Packed: the sum of its samples' costs. Padded: every sample costs as much as the costliest.
    """
    if packing:
        return sum(cost[i] for i in samples)
    return max((cost[i] for i in samples), default=0.0) * len(samples)


def pack(tokens: Sequence[int], samples: Sequence[int], budget: int, *, packing: bool) -> list[list[int]]:
    """Put the given samples into few microbatches within `budget`.

    A sample longer than the budget gets a microbatch alone. tokens: padded length of every sample.
    """
    order = sorted(samples, key=lambda i: (-tokens[i], i))
    if not packing:
        return _neighbours(tokens, order, budget)
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        place = next((k for k, left in enumerate(room) if left >= tokens[i]), None)
        if place is None:
            bins.append([i])
            room.append(budget - tokens[i])
        else:
            bins[place].append(i)
            room[place] -= tokens[i]
    return bins


def _neighbours(tokens: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    """Cut samples in falling length into padded microbatches at the lowest price.

    The price is the computed tokens, and `FEE` of the budget for each microbatch.
    """
    # For the first n samples: the lowest price, and the start of their last microbatch.
    price, first = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, at = math.inf, end - 1
        for start in range(end - 1, -1, -1):
            taken = tokens[order[start]] * (end - start)
            # `taken` only grows as the microbatch reaches back to longer samples.
            if taken > budget and start < end - 1:
                break
            if price[start] + taken < best:
                best, at = price[start] + taken, start
        price.append(best + FEE * budget)
        first.append(at)
    bins: list[list[int]] = []
    end = len(order)
    while end:
        bins.append(list(order[first[end] : end]))
        end = first[end]
    return bins[::-1]


def by_tokens(work: Workload, active: Sequence[bool], ranks: int, *, least: int = 1) -> list[Part]:
    """Make one part a rank with equal numbers of microbatches and balanced costs.

    least: every rank gets at least so many microbatches if there are enough samples (a pipeline of
    n stages idles with fewer than n). Every rank gets a sample if there are as many samples as
    ranks.
    """
    samples = [i for i in range(len(work.tokens)) if active[i]]
    tight = pack(work.tokens, samples, work.budget, packing=work.packing)
    fewest = max(-(-len(tight) // ranks), min(least, -(-len(samples) // ranks)), 1)
    # The best result so far: the cost of the costliest rank over the mean, and the microbatches by
    # rank.
    best_worst, best = math.inf, [tight]
    for count in range(fewest, fewest + MORE + 1):
        bins = _spread(work, samples, count * ranks) if work.packing else None
        bins = _split(work, bins or tight, count * ranks)
        dealt = _difference(bins, [work.of(one) for one in bins], ranks)
        if work.packing:
            _even_out(work, dealt)
        loads = [sum(work.of(one) for one in rank) for rank in dealt]
        worst = max(loads) * ranks / sum(loads) if sum(loads) else 1.0
        if worst < best_worst - STEP:
            best_worst, best = worst, dealt
        if worst <= GOAL or count * ranks >= len(samples):
            break
    return _with_idle(best, [i for i in range(len(work.tokens)) if not active[i]])


def _spread(work: Workload, samples: Sequence[int], count: int) -> list[list[int]] | None:
    """Spread the samples over `count` microbatches of even cost; None if a sample finds no room.

    In falling cost, each sample goes to the cheapest microbatch that has room for it.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [work.budget] * count
    heap = [(0.0, k) for k in range(count)]
    for i in sorted(samples, key=lambda i: (-work.total(i), i)):
        full = []
        # An empty microbatch takes any sample, even one longer than the budget.
        while heap and bins[heap[0][1]] and room[heap[0][1]] < work.tokens[i]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, k = heapq.heappop(heap)
        bins[k].append(i)
        room[k] -= work.tokens[i]
        for one in [*full, (load + work.total(i), k)]:
            heapq.heappush(heap, one)
    return bins


def _split(work: Workload, bins: list[list[int]], count: int) -> list[list[int]]:
    """Bring the number of microbatches up to `count`.

    The costliest microbatch with several samples is cut in two again and again. If no microbatch
    can be cut, empty microbatches are added.
    """
    bins = [list(one) for one in bins if one]
    while len(bins) < count:
        several = [k for k, one in enumerate(bins) if len(one) > 1]
        if not several:
            return bins + [[] for _ in range(count - len(bins))]
        k = max(several, key=lambda k: (work.of(bins[k]), -k))
        bins[k : k + 1] = _halves(work, bins[k])
    return bins


def _halves(work: Workload, one: list[int]) -> list[list[int]]:
    # In a padded microbatch, samples of similar length stay together.
    if not work.packing:
        order = sorted(one, key=lambda i: (-work.tokens[i], i))
        return [order[: len(order) // 2], order[len(order) // 2 :]]
    halves: list[list[int]] = [[], []]
    loads = [0.0, 0.0]
    for i in sorted(one, key=lambda i: (-work.total(i), i)):
        k = int(loads[1] < loads[0])
        halves[k].append(i)
        loads[k] += work.total(i)
    return halves


def _difference(bins: list[list[int]], costs: list[float], ranks: int) -> list[list[list[int]]]:
    """Rank -> len(bins) / ranks microbatches, by balanced largest differencing."""
    order = sorted(range(len(bins)), key=lambda k: (-costs[k], k))
    heap = []
    for first in range(0, len(order), ranks):
        block = order[first : first + ranks]
        loads = [costs[k] for k in block]
        heap.append(
            (-(max(loads) - min(loads)), first, [(load, [k]) for load, k in zip(loads, block, strict=True)])
        )
    heapq.heapify(heap)
    while len(heap) > 1:
        _, first, one = heapq.heappop(heap)
        _, second, other = heapq.heappop(heap)
        rising = sorted(other, key=lambda part: (part[0], part[1]))
        falling = sorted(one, key=lambda part: (-part[0], part[1]))
        joined = [(a + b, [*left, *right]) for (a, left), (b, right) in zip(falling, rising, strict=True)]
        loads = [load for load, _ in joined]
        heapq.heappush(heap, (-(max(loads) - min(loads)), min(first, second), joined))
    return [[bins[k] for k in part] for _, part in heap[0][2]]


def _even_out(work: Workload, dealt: list[list[list[int]]]) -> None:
    """Even out the costliest and the cheapest rank, again and again; changes `dealt` in place.

    A sample moves from the costliest rank to the cheapest, or two samples change places.
    """
    loads = [sum(work.of(one) for one in rank) for rank in dealt]
    mean = sum(loads) / len(loads)
    for _ in range(MOVES):
        high, low = (
            max(range(len(loads)), key=lambda k: (loads[k], -k)),
            min(range(len(loads)), key=lambda k: (loads[k], k)),
        )
        if loads[high] <= mean * (1 + (GOAL - 1) / 2):
            return
        found = _exchange(work, dealt[high], dealt[low], loads[high] - loads[low])
        if found is None:
            return
        (source, i), (target, j) = found
        source.remove(i)
        target.append(i)
        if j is not None:
            target.remove(j)
            source.append(j)
        gain = work.total(i) - (work.total(j) if j is not None else 0.0)
        loads[high] -= gain
        loads[low] += gain


def _exchange(
    work: Workload, high: list[list[int]], low: list[list[int]], gap: float
) -> tuple[tuple[list[int], int], tuple[list[int], int | None]] | None:
    """Choose the sample that moves from `high` to `low`, and the sample that comes back.

    Their difference in cost is the nearest to half the gap. Returns ((source microbatch, sample),
    (target microbatch, sample or None if no sample comes back)), or None if no exchange helps.
    """
    used = {id(one): sum(work.tokens[i] for i in one) for one in (*high, *low)}
    # (cost of the sample that comes back, sample, microbatch of `low`). The cost 0 and the sample
    # -1 mean that no sample comes back.
    back: list[tuple[float, int, list[int]]] = [(0.0, -1, one) for one in low]
    back += [(work.total(j), j, one) for one in low for j in one]
    back.sort(key=lambda entry: entry[:2])
    costs = [entry[0] for entry in back]
    # The distance from half the gap. An exchange must lower the larger of the two ranks' costs.
    best, chosen = gap * 0.499, None
    for source in high:
        for i in source:
            at = bisect_left(costs, work.total(i) - gap / 2)
            for place in range(max(0, at - 8), min(len(back), at + 8)):
                returned, j, target = back[place]
                away = abs(work.total(i) - returned - gap / 2)
                if away >= best or (j < 0 and len(source) == 1):
                    continue
                grown = work.tokens[i] - (work.tokens[j] if j >= 0 else 0)
                if used[id(target)] + grown <= work.budget and used[id(source)] - grown <= work.budget:
                    best, chosen = away, ((source, i), (target, j if j >= 0 else None))
    return chosen


def _with_idle(dealt: list[list[list[int]]], idle: list[int]) -> list[Part]:
    """Give each inactive sample to the rank with the fewest samples, so that no rank is empty."""
    parts = [Part(one) for one in dealt]
    heap = [(len(part.samples), rank) for rank, part in enumerate(parts)]
    heapq.heapify(heap)
    for i in idle:
        size, rank = heapq.heappop(heap)
        parts[rank].idle.append(i)
        heapq.heappush(heap, (size + 1, rank))
    return parts


def computed_tokens(tokens: Sequence[int], microbatches: Sequence[Sequence[int]], *, packing: bool) -> int:
    """The number of tokens that pass through the layers, with padding and without filler."""
    if packing:
        return sum(tokens[i] for one in microbatches for i in one)
    return sum(max(tokens[i] for i in one) * len(one) for one in microbatches if one)
