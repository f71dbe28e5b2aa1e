"""Which data-parallel rank computes which samples, and in which microbatches. Plain Python: every
rank works it out for itself.

`by_count`: a fixed number of samples a microbatch, dealt by length. `by_tokens`: a token budget;
pack first, distribute second:

1. Microbatches. A packed one takes the sum of its lengths, a padded one its longest length for each
   sample; neither exceeds the budget.
   Packed: the fewest are found by first-fit in falling length, their number is made a multiple of
   the ranks, and the samples are spread over that many so that the costs come out even (greedy,
   costliest first). Padded: neighbours in length share one, cut so that padding is the least; the
   costliest are cut in two until their number is a multiple of the ranks.
2. Ranks. The microbatches are put on ranks by the balanced largest-differencing method (Karmarkar
   and Karp; equal numbers: Michiels et al.
   2003): blocks of one microbatch a rank, the two widest spreads joined against each other until one is left.
3. Samples move or change places between the costliest and the cheapest rank while that evens them
   out and the budget holds (packed).
4. Is a rank still above the mean by more than `GOAL`, one more microbatch a rank is opened, and so
   on; the best is taken.

Equal inputs give equal parts: ties fall by index. No rank asks another.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

# largest cost of a rank over the mean at which no more microbatches are opened
GOAL = 1.02
# by which another microbatch a rank has to better that
STEP = 0.005
# of the budget, in tokens: what a padded microbatch must save in padding to be worth its launch
FEE = 1 / 32
# microbatches a rank that are tried beyond the fewest
MORE = 8
# samples moved at most
MOVES = 200


@dataclass
class Part:
    """What one data-parallel rank is given."""

    # samples that need a forward, as many microbatches on every rank; an empty one is filler
    microbatches: list[list[int]]
    # samples of weight zero: counted, not computed
    idle: list[int] = field(default_factory=list)

    @property
    def samples(self) -> list[int]:
        """All samples of the rank, those that are computed first."""
        return [i for one in self.microbatches for i in one] + self.idle


def by_count(lengths: Sequence[int], active: Sequence[bool], ranks: int, size: int) -> list[Part]:
    """`size` samples a microbatch. Long samples first, dealt there and back (0 1 2 2 1 0 0 ...),
    the inactive after the active.
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
    """`count` microbatches of `size` samples in order; empty ones where the samples have run out."""
    return [list(samples[first : first + size]) for first in range(0, count * size, size)]


def _dealt_to(k: int, ranks: int) -> int:
    """Boustrophedon: balances lengths sorted in falling order."""
    lap, place = divmod(k, ranks)
    return place if lap % 2 == 0 else ranks - 1 - place


@dataclass(frozen=True)
class Workload:
    """What is known of the samples before they are computed; sequences by sample."""

    # padded length of the student's sequence
    tokens: Sequence[int]
    # FLOPs of the passes over it
    cost: Sequence[float]
    # FLOPs of passes over other sequences of the sample (the teacher's), which get microbatches of
    # their own
    other: Sequence[float]
    # tokens of a microbatch
    budget: int
    packing: bool

    def total(self, i: int) -> float:
        """FLOPs of all forwards and backwards of a sample."""
        return self.cost[i] + self.other[i]

    def of(self, samples: Sequence[int]) -> float:
        """FLOPs of a microbatch."""
        return bin_cost(self.cost, samples, packing=self.packing) + sum(self.other[i] for i in samples)


def bin_cost(cost: Sequence[float], samples: Sequence[int], *, packing: bool) -> float:
    """Of a microbatch: packed, the sum; padded, each sample costs what the costliest does."""
    if packing:
        return sum(cost[i] for i in samples)
    return max((cost[i] for i in samples), default=0.0) * len(samples)


def pack(tokens: Sequence[int], samples: Sequence[int], budget: int, *, packing: bool) -> list[list[int]]:
    """The given samples in few microbatches within `budget`; a longer one is alone in its own.
    tokens: padded length of every sample.
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
    """Samples in falling length, cut where the tokens computed, with a fee of `FEE` of the budget
    for each microbatch, are the fewest.
    """
    # of the first n samples; where the last microbatch of them begins
    price, first = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, at = math.inf, end - 1
        for start in range(end - 1, -1, -1):
            taken = tokens[order[start]] * (end - start)
            # grows as the microbatch reaches back to longer samples
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
    """One part a rank, with equal numbers of microbatches, costs balanced.

    least: microbatches a rank at least, as long as there are samples for them (a pipeline of n
    stages idles with fewer than n). Every rank gets a sample when there are as many samples as
    ranks.
    """
    samples = [i for i in range(len(work.tokens)) if active[i]]
    tight = pack(work.tokens, samples, work.budget, packing=work.packing)
    fewest = max(-(-len(tight) // ranks), min(least, -(-len(samples) // ranks)), 1)
    # cost of the costliest rank over the mean, and microbatches by rank, of the best count so far
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
    """`count` microbatches of even cost: the costliest sample goes to the cheapest microbatch with
    room. None where one finds no room.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [work.budget] * count
    heap = [(0.0, k) for k in range(count)]
    for i in sorted(samples, key=lambda i: (-work.total(i), i)):
        full = []
        # an empty one takes any sample
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
    """`count` microbatches: the costliest of several samples is cut in two until there are enough,
    then empty ones are added.
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
    # neighbours in length stay together
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
    """Rank -> its microbatches, len(bins) / ranks each. Balanced largest differencing."""
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
    """Move samples, or let two change places, from the costliest rank to the cheapest, in place."""
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
    """The sample of `high` that goes to a microbatch of `low`, and the one that comes back (None:
    none), nearest to half the gap.
    """
    used = {id(one): sum(work.tokens[i] for i in one) for one in (*high, *low)}
    # cost of what comes back, sample, its microbatch; nothing comes back: each microbatch of `low` once
    back: list[tuple[float, int, list[int]]] = [(0.0, -1, one) for one in low]
    back += [(work.total(j), j, one) for one in low for j in one]
    back.sort(key=lambda entry: entry[:2])
    costs = [entry[0] for entry in back]
    # how far from half the gap; an exchange must lower the larger of the two
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
    """Inactive samples go one by one to the rank that has the fewest samples, so that none stays without."""
    parts = [Part(one) for one in dealt]
    heap = [(len(part.samples), rank) for rank, part in enumerate(parts)]
    heapq.heapify(heap)
    for i in idle:
        size, rank = heapq.heappop(heap)
        parts[rank].idle.append(i)
        heapq.heappush(heap, (size + 1, rank))
    return parts


def computed_tokens(tokens: Sequence[int], microbatches: Sequence[Sequence[int]], *, packing: bool) -> int:
    """Tokens that pass through the layers, padding included; filler, a token or two, is left out."""
    if packing:
        return sum(tokens[i] for one in microbatches for i in one)
    return sum(max(tokens[i] for i in one) * len(one) for one in microbatches if one)
