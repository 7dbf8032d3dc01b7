"""Which: random supports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.indices import index_dtype
from ..errors import SelectionError

# Above this density a mask of one byte per element is smaller and faster than sorting the drawn positions.
_MASK_DENSITY = 1 / 32


def random_indices(numel: int, k: int, *, seed: int, name: str) -> Tensor:
    """Draw k of `numel` positions uniformly without replacement.

    Args:
        numel: number of elements of the tensor.
        k: how many, 0 <= k <= numel.
        seed: >= 0. The result is a function of `seed`, `name`, `numel` and `k` alone: not of the order of calls, of any
            global random state, of the machine, or of the version of numpy or torch.
        name: of the tensor; tensors of different names get independent draws.

    Returns:
        [k] flat positions on the CPU, ascending, in the dtype of `index_dtype`.

    Raises:
        SelectionError: `k` outside [0, numel], or `seed` negative.

    Cost: O(k) memory; no dense scores.
    """
    if not 0 <= k <= numel:
        raise SelectionError(f"{k} random weights are asked from {name}: ask for 0 to {numel}, its number of weights")
    dtype = np.int32 if index_dtype(numel) == torch.int32 else np.int64
    chosen: NDArray[Any] = _distinct(_bits(seed, f"indices of {name}"), numel, k).astype(dtype, copy=False)
    return torch.from_numpy(chosen)


def random_counts(sizes: Sequence[int], k: int, *, seed: int, name: str) -> list[int]:
    """How many of k positions, drawn uniformly without replacement from several tensors together, fall into each.

    An exact draw from the multivariate hypergeometric distribution. Independent binomial counts with the same density
    are the counts of a uniformly random set of random size; uniformly removing its surplus, or adding what it lacks,
    leaves a uniformly random set of size k.

    Args:
        sizes: number of elements of each tensor.
        k: how many in all, 0 <= k <= sum of the sizes.
        seed: >= 0. The result is a function of `seed`, `name`, `sizes` and `k` (for one version of numpy).
        name: of the group of tensors.

    Returns:
        A count for each tensor, at most its size, summing to `k`.

    Raises:
        SelectionError: `k` outside [0, sum of the sizes], or `seed` negative.

    Cost: O(tensors + sqrt(k)) time and memory.
    """
    total = sum(sizes)
    if not 0 <= k <= total:
        raise SelectionError(f"{k} random weights are asked from {name}: ask for 0 to {total}, its number of weights")
    if len(sizes) <= 1 or k in (0, total):
        return list(sizes) if k == total else [k] * len(sizes)
    bits = _bits(seed, f"counts of {name}")
    numels = np.array(sizes, dtype=np.int64)
    counts = np.random.Generator(bits).binomial(numels, k / total)
    surplus = int(counts.sum()) - k
    # Each drawn position is one of the chosen weights (to remove), or one of the others (to add).
    pool = counts if surplus > 0 else numels - counts
    ends = np.cumsum(pool)
    changed = _distinct(bits, int(ends[-1]), abs(surplus))
    per_tensor = np.bincount(np.searchsorted(ends, changed, side="right"), minlength=numels.size)
    return [int(count) for count in counts - np.sign(surplus) * per_tensor]


def bernoulli_count(numel: int, probability: float, *, seed: int, name: str) -> int:
    """How many of a tensor's weights are drawn if each is drawn independently: an exact draw from the binomial.

    A uniformly random set of so many positions (`random_indices`) is then an independent draw of each weight.

    Args:
        numel: number of elements of the tensor.
        probability: p in [0, 1].
        seed: >= 0. The result is a function of the four arguments (for one version of numpy).
        name: of the tensor; tensors of different names get independent draws.

    Returns:
        a count in [0, numel]; numel * p in the mean.

    Raises:
        SelectionError: `probability` outside [0, 1], or `seed` negative.
    """
    if not 0 <= probability <= 1:
        raise SelectionError(f"the weights of {name} must be drawn with a probability in [0, 1], got {probability}")
    return int(np.random.Generator(_bits(seed, f"number of {name}")).binomial(numel, probability))


def _bits(seed: int, purpose: str) -> np.random.PCG64:
    """A stream of bits of its own for each seed and purpose; numpy guarantees it across versions."""
    if seed < 0:
        raise SelectionError(f"seed must be >= 0, got {seed}")
    digest = hashlib.sha256(purpose.encode()).digest()
    return np.random.PCG64(np.random.SeedSequence([seed, int.from_bytes(digest[:16], "little")]))


def _distinct(bits: np.random.PCG64, numel: int, k: int) -> NDArray[Any]:
    """A uniformly random set of k positions, sorted.

    Draws with replacement, and again for as many as are still missing. No position is treated differently from another
    on the way, so all sets of size k are equally likely in the end.
    """
    if k == 0:
        return np.empty(0, dtype=np.int64)
    if k > numel // 2:
        kept = np.ones(numel, dtype=np.bool_)
        kept[_distinct(bits, numel, numel - k)] = False
        return np.flatnonzero(kept)
    if k > numel * _MASK_DENSITY:
        mask = np.zeros(numel, dtype=np.bool_)
        missing = k
        while missing:
            mask[_uniform(bits, numel, missing)] = True
            missing = k - int(np.count_nonzero(mask))
        return np.flatnonzero(mask)
    drawn = _sorted_set(_uniform(bits, numel, k))
    while drawn.size < k:
        drawn = _sorted_set(np.concatenate((drawn, _uniform(bits, numel, k - drawn.size))))
    return drawn


def _sorted_set(positions: NDArray[Any]) -> NDArray[Any]:
    """Sorted without duplicates; overwrites its input."""
    # Not np.unique: its newer versions hash, which takes twenty times as long.
    positions.sort()
    return positions[np.concatenate(([True], positions[1:] != positions[:-1]))]


def _uniform(bits: np.random.PCG64, numel: int, count: int) -> NDArray[Any]:
    """`count` independent positions below `numel`, each exactly equally likely."""
    words = np.empty(0, dtype=np.uint64)
    # The last, incomplete run of `numel` words would favour low positions.
    limit = np.uint64(2**64 - 1 - 2**64 % numel)
    while words.size < count:
        raw = bits.random_raw(count - words.size)
        words = np.concatenate((words, raw[raw <= limit]))
    words %= np.uint64(numel)
    return words.astype(np.int32 if numel < 2**31 else np.int64)
