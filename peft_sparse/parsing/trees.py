"""The best dependency tree of a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError

Scores = NDArray[np.float64]
Nodes = NDArray[np.int64]


def maximum_spanning_tree(scores: ArrayLike, *, single_root: bool = True) -> list[int]:
    """The tree over a sentence whose arcs have the largest sum of scores.

    Args:
        scores: [n, n + 1] finite numbers; row i: of word i + 1 for each head, 0 the root, j word j. A word's score for
            itself is not looked at.
        single_root: exactly one word hangs on the root, as Universal Dependencies has it; False allows several.

    Returns:
        the head of each word, in 0..n.

    Raises:
        ConfigError: scores of another shape, or not finite ones.

    Cost: O(n^2) for each cycle that is broken, at most n - 1 of them.
    Source: Chu and Liu 1965; Edmonds 1967.
    """
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] != given.shape[0] + 1:
        raise ConfigError(f"scores must be [n, n + 1], a row for each word, got the shape {list(given.shape)}.")
    n = given.shape[0]
    words = np.arange(n)
    own = given.copy()
    own[words, words + 1] = 0.0
    if not np.isfinite(own).all():
        raise ConfigError("scores must be finite, but for those of a word for itself.")
    if n == 0:
        return []
    if single_root and n > 1:
        # A root arc costs more than any tree can gain by it, so the best tree has as few of them as can be: one.
        span = own.max() - own.min()
        own[:, 0] -= n * span + 1.0
    square = np.zeros((n + 1, n + 1))
    square[1:] = own
    return [int(head) for head in _arborescence(square)[1:]]


@dataclass(frozen=True)
class _Contraction:
    """A cycle made into one node, the last of the smaller graph.

    Attributes:
        heads: [n] the best head of each node before.
        cycle: [c] the nodes of the cycle.
        rest: [m] the others, the root first.
        entry: [m] which node of the cycle each of the others would enter it at, as an index into `cycle`.
        leaving: [m] which node of the cycle each of the others would hang on, likewise.
    """

    heads: Nodes
    cycle: Nodes
    rest: Nodes
    entry: Nodes
    leaving: Nodes

    def expand(self, heads: Nodes) -> Nodes:
        """From the tree of the smaller graph to that of the larger one."""
        merged = len(self.rest)
        found = self.heads.copy()
        for node, head in enumerate(heads[1:merged], start=1):
            found[self.rest[node]] = self.cycle[self.leaving[node]] if head == merged else self.rest[head]
        above = heads[merged]
        found[self.cycle[self.entry[above]]] = self.rest[above]
        return found


def _arborescence(scores: Scores) -> Nodes:
    """Heads of all nodes, [n], node 0 the root and its own head; scores [n, n], a row for each dependent."""
    contractions: list[_Contraction] = []
    while True:
        heads = _best_heads(scores)
        cycle = _cycle(heads)
        if cycle is None:
            break
        contraction, scores = _contract(scores, heads, cycle)
        contractions.append(contraction)
    for contraction in reversed(contractions):
        heads = contraction.expand(heads)
    return heads


def _best_heads(scores: Scores) -> Nodes:
    masked = scores.copy()
    np.fill_diagonal(masked, -np.inf)
    heads = masked.argmax(1)
    heads[0] = 0
    return heads


def _cycle(heads: Nodes) -> Nodes | None:
    """The nodes of a cycle, if there is one."""
    # For each node the walk that it was first reached on.
    walk = np.zeros(len(heads), dtype=np.int64)
    walk[0] = -1
    for start in range(1, len(heads)):
        node = start
        while walk[node] == 0:
            walk[node] = start
            node = int(heads[node])
        if walk[node] == start:
            found = [node]
            while heads[found[-1]] != node:
                found.append(int(heads[found[-1]]))
            return np.array(found)
    return None


def _contract(scores: Scores, heads: Nodes, cycle: Nodes) -> tuple[_Contraction, Scores]:
    rest = np.setdiff1d(np.arange(len(heads)), cycle)
    merged = len(rest)
    # What entering the cycle at a node gains, when that node's arc in it falls away.
    gains = scores[np.ix_(cycle, rest)] - scores[cycle, heads[cycle]][:, None]
    leaving = scores[np.ix_(rest, cycle)]
    smaller = np.zeros((merged + 1, merged + 1))
    smaller[:merged, :merged] = scores[np.ix_(rest, rest)]
    smaller[merged, :merged] = gains.max(0)
    smaller[:merged, merged] = leaving.max(1)
    return _Contraction(heads, cycle, rest, gains.argmax(0), leaving.argmax(1)), smaller
