"""Exactly k: the home of the rules for ties, NaN and too few candidates.

The k-th largest score is found by counting, not by sorting. An integer with the order of the float32 scores is counted
by its upper 16 bits, then by its lower 16 bits inside the one bin that holds the k-th largest. Both counts, and the
collection of what lies above, go through the scores in chunks, so nothing of the size of the scores is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from ..core.backends.native import kernels
from ..core.indices import index_dtype
from ..errors import SelectionError

# Small enough that a chunk and its integer image stay in a CPU's cache, and large enough to hide the cost of a call.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24
_BINS = 2**16
# Devices on which torch selects in one tensor.
_SELECTED_BY_TORCH = ("cuda",)
# Up to so many scores in all, sorting them is faster than counting them by their keys (measured on one busy core: 0.2
# ms for 1,000 and 1.1 ms for 8,000, where counting takes 0.9 ms whatever their number).
_SORTED = 2**12
# From so many scores on, a sample of them says first about where the k-th largest lies.
_SAMPLED_FROM = 2**18
_SAMPLE = 2**16
# The largest int32: the image of a NaN, which no admitted score has.
_ABOVE_ALL = 2**31 - 1


def top_k(scores: Tensor, k: int, *, name: str, min_score: float | None = None) -> Tensor:
    """Select the k largest scores: exactly k, whatever the ties.

    Args:
        scores: any shape, any floating dtype, compared as float32; any sign, infinities included, larger is better.
        k: how many, 0 <= k <= number of scores.
        name: what errors call the tensor.
        min_score: scores must exceed this to be eligible (0.0: only weights that moved); by default all are eligible.

    Returns:
        [k] flat row-major positions, ascending, on the device of `scores`, in the dtype of `index_dtype`. Of equal
        scores, those at the lowest positions are taken.

    Raises:
        SelectionError: NaN in `scores`, `k` out of range, or fewer than `k` eligible scores.

    Cost: three passes over the scores, and memory for a chunk of them besides the result; on CUDA 12 bytes for each of
        the k.
    """
    return joint_top_k({name: scores}, k, min_score=min_score)[name]


def joint_top_k(scores: Mapping[str, Tensor], k: int, *, min_score: float | None = None) -> dict[str, Tensor]:
    """Select the k largest scores of several tensors together: one threshold for all, exactly k in sum.

    Args:
        scores: name -> scores, as in `top_k`. Each tensor is asked for three times, one at a time, so a mapping that
            computes its tensors when asked never has two of them in memory.
        k: how many in all tensors together, 0 <= k <= number of scores.
        min_score: scores must exceed this to be eligible; by default all are.

    Returns:
        name -> [k_i] positions as in `top_k`, for every tensor (perhaps empty). Of equal scores, those of the tensors
        that come first in the mapping are taken, and inside a tensor those at the lowest positions.

    Raises:
        SelectionError: NaN in a tensor (it is named), `k` out of range, or fewer than `k` eligible scores.

    Cost: three passes over the scores, and memory for a chunk of them besides the result.
    """
    if type(scores) is dict and sum(tensor.numel() for tensor in scores.values()) <= _SORTED:
        return _sorted_top_k(scores, k, min_score)
    if type(scores) is dict and len(scores) == 1:
        ((name, tensor),) = scores.items()
        if tensor.device.type in _SELECTED_BY_TORCH and tensor.is_floating_point() and 0 < k <= tensor.numel():
            return {name: _selected_by_torch(tensor, k, name=name, min_score=min_score)}
    if (found := _above_sampled_threshold(scores, k, min_score)) is not None:
        return found
    threshold = _find_threshold(scores, k)
    if min_score is not None and k > 0 and threshold.key <= _key_of(min_score):
        raise _too_few(scores, k, min_score, *_count_eligible(scores, min_score))
    return _collect_all(scores, k, threshold)


def _above_sampled_threshold(scores: Mapping[str, Tensor], k: int, min_score: float | None) -> dict[str, Tensor] | None:
    """`joint_top_k` by collecting what lies above a threshold that a sample gives, and selecting among that.

    None where a sample does not pay or misleads: then too few scores lie above, or far too many. Selecting among the
    collected, in the order of their positions, gives what selecting among all does, ties included.
    """
    if type(scores) is not dict or any(t.device.type != "cpu" or not t.is_floating_point() for t in scores.values()):
        return None  # elsewhere, or made when asked for
    total = sum(tensor.numel() for tensor in scores.values())
    if total < _SAMPLED_FROM or not 0 < 4 * k <= total:
        return None
    step = total // _SAMPLE | 1
    sample = torch.cat([tensor.detach().reshape(-1)[::step].to(torch.float32) for tensor in scores.values()])
    # The sample's share of the k, and as many more as chance may miss.
    expected = k * sample.numel() / total
    rank = int(expected + 4 * expected**0.5) + 8
    if rank >= sample.numel():
        return None
    # To torch NaN is the largest of all; the pass over all scores finds it.
    threshold = float(sample.topk(rank, sorted=False).values.amin())
    if isnan(threshold) or (min_score is not None and threshold <= min_score):
        return None
    positions: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    left = 4 * k + _SAMPLE
    for name, tensor in scores.items():
        found = _above(tensor, threshold, name, left)
        if found is None:
            return None
        positions[name], values[name] = found
        left -= found[0].numel()
    if sum(value.numel() for value in values.values()) < k:
        return None
    chosen = _collect_all(values, k, _find_threshold(values, k))
    return {name: positions[name].index_select(0, chosen[name]) for name in scores}


def _above(scores: Tensor, threshold: float, name: str, at_most: int) -> tuple[Tensor, Tensor] | None:
    """Positions and values of the scores that reach a threshold; None if they are more than `at_most`."""
    dtype, found = index_dtype(scores.numel()), 0
    native = kernels(scores, dtypes=(torch.float32,)) if scores.is_contiguous() else None
    if native is not None:
        try:
            return native.above(scores.detach(), threshold, at_most=at_most, dtype=dtype)
        except ValueError:
            _check_nan(scores.detach(), name)
            raise
    positions, values = [torch.empty(0, dtype=dtype)], [torch.empty(0)]
    for start, chunk in _chunks(scores):
        _check_nan(chunk, name)
        above = (chunk >= threshold).nonzero().squeeze(1)
        found += above.numel()
        if found > at_most:
            return None
        values.append(chunk[above])
        positions.append(above.add_(start).to(dtype))
    return torch.cat(positions), torch.cat(values)


def streamed_top_k(
    scores: Iterable[tuple[str, Tensor]], k: int, *, min_score: float | None = None
) -> dict[str, Tensor]:
    """`joint_top_k` of tensors that come one after the other and are seen once: for scores that are costly to compute.

    What is among the k largest so far is remembered with its score; everything else of a tensor can go.

    Args:
        scores: name and scores of each tensor, no name twice; otherwise as in `joint_top_k`, whose answer it gives.
        k, min_score: as there.

    Returns, Raises: as `joint_top_k`; `k` above the number of scores is only noticed at the end.

    Cost: three passes over each tensor, and at most 40 bytes for each of the k weights besides one tensor.
    """
    best = Best(k, min_score)
    devices: dict[str, torch.device] = {}
    total = 0
    for name, tensor in scores:
        devices[name] = tensor.device
        total += tensor.numel()
        best.add(name, tensor)
        del tensor  # or it would still be there while the next one is made
    _check_count(best.scores, k, total)
    best.drop_all_but_k()
    found = sum(positions.numel() for positions in best.positions.values())
    if min_score is not None and found < k:
        raise _too_few(best.scores, k, min_score, found, total)
    return {name: positions.to(devices[name]) for name, positions in best.positions.items()}


class Best:
    """The k largest of the scores so far, and up to as many more.

    Attributes:
        positions: name -> [c] where they lie in their tensors.
        scores: name -> [c] what they are, on the CPU.
    """

    def __init__(self, k: int, min_score: float | None) -> None:
        self.positions: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        self._k = k
        # Only what exceeds it can still be among the k.
        self._bar = min_score
        self._held = 0

    def add(self, name: str, scores: Tensor) -> None:
        """Take the scores of one more tensor."""
        positions = top_k(scores, min(self._k, scores.numel()), name=name)
        values = scores.detach().reshape(-1).index_select(0, positions).to("cpu", torch.float32)
        positions = positions.cpu()
        if self._bar is not None:
            above = values > self._bar
            positions, values = positions[above], values[above]
        self.positions[name], self.scores[name] = positions, values
        self._held += values.numel()
        if self._held > 2 * self._k:
            self.drop_all_but_k()

    def drop_all_but_k(self) -> None:
        """Keep no more than the k largest."""
        if self._held <= self._k:
            return
        for name, chosen in joint_top_k(self.scores, self._k).items():
            self.positions[name] = self.positions[name].index_select(0, chosen)
            self.scores[name] = self.scores[name].index_select(0, chosen)
        self._held = self._k
        # Of equal scores the first count, so a later one has to be larger.
        self._bar = min((float(values.min()) for values in self.scores.values() if values.numel()), default=self._bar)


def _sorted_top_k(scores: dict[str, Tensor], k: int, min_score: float | None) -> dict[str, Tensor]:
    """`joint_top_k` of a few scores, by sorting them."""
    sizes = [tensor.numel() for tensor in scores.values()]
    keys = [chunk for name, tensor in scores.items() for chunk in _checked_keys(tensor, name)]
    together = torch.cat(keys) if keys else torch.empty(0, dtype=torch.int32)
    _check_count(scores, k, together.numel())
    order = together.argsort(descending=True, stable=True)[:k]
    if min_score is not None and k > 0 and int(together[order[-1]]) <= _key_of(min_score):
        raise _too_few(scores, k, min_score, *_count_eligible(scores, min_score))
    chosen = torch.zeros_like(together, dtype=torch.bool)
    chosen[order] = True
    return {
        name: part.nonzero().squeeze(1).to(index_dtype(part.numel()))
        for name, part in zip(scores, chosen.split(sizes), strict=True)
    }


def _selected_by_torch(scores: Tensor, k: int, *, name: str, min_score: float | None) -> Tensor:
    """`top_k` by torch's own selection: an accelerator is slow at counting, for it adds to each bin in turn."""
    flat = scores.detach().reshape(-1).to(torch.float32)
    best = flat.topk(k, sorted=False).values
    # To torch NaN is the largest of all.
    _check_nan(best, name)
    kth = best.amin()
    if min_score is not None and not bool(kth > min_score):
        raise _too_few({name: scores}, k, min_score, *_count_eligible({name: scores}, min_score))
    chosen = (flat >= kth).nonzero().squeeze(1)
    if chosen.numel() > k:
        tied = flat[chosen] == kth
        chosen = chosen[~tied | (tied.cumsum(0) <= k - (~tied).sum())]
    return chosen.to(index_dtype(flat.numel()))


@dataclass(frozen=True)
class _Threshold:
    """Select every score whose key is above `key`, and the first `num_ties` of those that equal it."""

    key: int
    num_ties: int


def _find_threshold(scores: Mapping[str, Tensor], k: int) -> _Threshold:
    """The key of the k-th largest score, by two counts of 16 bits each."""
    upper_counts = torch.zeros(_BINS, dtype=torch.int64)
    for name in scores:
        upper_counts += _count_upper(scores[name], name)
    _check_count(scores, k, int(upper_counts.sum()))
    if k == 0:
        return _Threshold(key=_ABOVE_ALL, num_ties=0)
    upper, wanted = _bin_of_kth(upper_counts, k)
    lower_counts = torch.zeros(_BINS, dtype=torch.int64)
    for name in scores:
        lower_counts += _count_lower(scores[name], upper - _BINS // 2)
    lower, num_ties = _bin_of_kth(lower_counts, wanted)
    return _Threshold(key=(upper - _BINS // 2) * _BINS + lower, num_ties=num_ties)


def _bin_of_kth(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin with the k-th largest entry, and which one of that bin's entries it is, counted from 1."""
    from_top = counts.flip(0).cumsum(0)
    where = int(torch.searchsorted(from_top, k))
    above = int(from_top[where - 1]) if where > 0 else 0
    return counts.numel() - 1 - where, k - above


def _count_upper(scores: Tensor, name: str) -> Tensor:
    """[65536] how many scores have each upper half of the key. The one pass that checks them."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=scores.device)
    for keys in _checked_keys(scores, name):
        counts += torch.bincount((keys >> 16) + _BINS // 2, minlength=_BINS)
    return counts.cpu()


def _checked_keys(scores: Tensor, name: str) -> Iterator[Tensor]:
    """The keys, chunk by chunk, of scores that can be ordered."""
    if not scores.is_floating_point():
        raise SelectionError(f"scores of {name} must be floating point, got {scores.dtype}")
    for _, chunk in _chunks(scores):
        _check_nan(chunk, name)
        yield _keys(chunk)


def _check_nan(scores: Tensor, name: str) -> None:
    if bool(scores.isnan().any()):
        raise SelectionError(
            f"scores of {name} contain NaN, so no order is defined; look for a run that diverged "
            "(lower the learning rate, or clip gradients)"
        )


def _check_count(scores: Mapping[str, Tensor], k: int, total: int) -> None:
    if not 0 <= k <= total:
        raise SelectionError(f"{k} weights are asked from {_label(scores)}: ask for 0 to {total}, the number of scores")


def _count_lower(scores: Tensor, upper: int) -> Tensor:
    """[65536] how many of the scores with this upper half of the key have each lower half."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=scores.device)
    for _, chunk in _chunks(scores):
        keys = _keys(chunk)
        counts += torch.bincount(keys[keys >> 16 == upper] & (_BINS - 1), minlength=_BINS)
    return counts.cpu()


def _collect_all(scores: Mapping[str, Tensor], k: int, threshold: _Threshold) -> dict[str, Tensor]:
    """name -> positions of the k scores that a threshold selects."""
    selected: dict[str, Tensor] = {}
    num_left, ties_left = k, threshold.num_ties
    for name in scores:
        selected[name], ties_left = _collect(scores[name], _Threshold(threshold.key, ties_left), num_left)
        num_left -= selected[name].numel()
    return selected


def _collect(scores: Tensor, threshold: _Threshold, at_most: int) -> tuple[Tensor, int]:
    """Positions of the scores that the threshold selects; how many of its ties are left for the next tensor."""
    # Filled in place: pieces kept until the end would lie between the chunks on the heap and keep it from shrinking.
    selected = torch.empty(min(at_most, scores.numel()), dtype=index_dtype(scores.numel()), device=scores.device)
    end, ties_left = 0, threshold.num_ties
    for start, chunk in _chunks(scores):
        keys = _keys(chunk)
        chosen = (keys >= threshold.key).nonzero().squeeze(1)
        tied = keys[chosen] == threshold.key
        found = int(tied.sum())
        if found > ties_left:
            chosen = chosen[~tied | (tied.cumsum(0) <= ties_left)]
        ties_left -= min(found, ties_left)
        selected[end : end + chosen.numel()] = chosen.add_(start)
        end += chosen.numel()
    return (selected if end == selected.numel() else selected[:end].clone()), ties_left


def _chunks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Start and float32 content of consecutive pieces of the flat scores."""
    flat = scores.detach().reshape(-1)
    size = _CHUNK.get(scores.device.type, _CHUNK_ELSEWHERE)
    for start in range(0, flat.numel(), size):
        yield start, flat[start : start + size].to(torch.float32)


def _keys(chunk: Tensor) -> Tensor:
    """An int32 image of float32 numbers that has their order; both zeros have the same image."""
    # Adding +0 turns -0 into +0 and changes no other number.
    bits = (chunk + 0.0).view(torch.int32)
    # Negative numbers grow in magnitude with their bits, so all bits but the sign are inverted there.
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _key_of(score: float) -> int:
    """The image of one number, rounded to float32 first."""
    return int(_keys(torch.tensor([score], dtype=torch.float32))[0])


def _count_eligible(scores: Mapping[str, Tensor], min_score: float) -> tuple[int, int]:
    """How many scores exceed `min_score`, and how many there are."""
    limit = _key_of(min_score)
    eligible = total = 0
    for name in scores:
        for _, chunk in _chunks(scores[name]):
            eligible += int((_keys(chunk) > limit).sum())
            total += chunk.numel()
    return eligible, total


def _too_few(scores: Mapping[str, Tensor], k: int, min_score: float, eligible: int, total: int) -> SelectionError:
    """The error that says how many scores are eligible."""
    moved = "moved" if min_score == 0.0 else f"scored above {min_score}"
    return SelectionError(
        f"{k} weights are asked from {_label(scores)}, but only {eligible} of {total} {moved}. Train longer, "
        "use a larger learning rate, or ask for a lower density"
    )


def _label(scores: Mapping[str, Tensor]) -> str:
    """How an error calls the tensors: the one, or the first of many."""
    first = next(iter(scores), "no tensor")
    return first if len(scores) <= 1 else f"{first} and {len(scores) - 1} more"
