"""Drop and grow: which weights change places, and what is carried along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_sparse.errors import SelectionError
from peft_sparse.selection.replacement import Candidates, Replacement, drop_and_grow, redistribute


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def candidates(scores: dict[int, float]) -> Candidates:
    return Candidates(ints(*sorted(scores)), torch.tensor([scores[i] for i in sorted(scores)], dtype=torch.float32))


SUPPORT = ints(3, 5, 8, 13)


def replace(drop_scores: list[float], scores: dict[int, float], num: int) -> Replacement:
    return drop_and_grow(SUPPORT, torch.tensor(drop_scores, dtype=torch.float32), candidates(scores), num_replaced=num)


def test_the_weakest_make_room_for_the_strongest() -> None:
    result = replace([0.4, 0.1, 0.9, 0.2], {1: 2.0, 6: 5.0, 20: 3.0}, 2)
    assert result.indices.tolist() == [3, 6, 8, 20]
    assert result.indices.dtype == torch.int32
    assert result.dropped.tolist() == [1, 3]
    assert result.grown.tolist() == [1, 3]
    assert result.new_indices.tolist() == [6, 20]
    assert result.candidates.tolist() == [1, 2]
    assert (result.num_dropped, result.num_grown, result.count, result.old_count) == (2, 2, 4, 4)


def test_carry_keeps_what_stays_and_fills_what_is_grown() -> None:
    result = replace([0.4, 0.1, 0.9, 0.2], {1: 2.0, 6: 5.0, 20: 3.0}, 2)
    values = torch.tensor([10.0, 11.0, 12.0, 13.0], requires_grad=True)
    assert result.carry(values).tolist() == [10.0, 0.0, 12.0, 0.0]
    assert not result.carry(values).requires_grad
    assert result.carry(values, 7).tolist() == [10.0, 7.0, 12.0, 7.0]
    assert result.carry(values, torch.tensor([1.5, 2.5])).tolist() == [10.0, 1.5, 12.0, 2.5]
    ages = result.carry(ints(4, 5, 6, 7), 1)
    assert ages.tolist() == [4, 1, 6, 1]
    assert ages.dtype == torch.int32


def test_positions_change_when_grown_weights_lie_in_between() -> None:
    result = replace([1, 1, 1, 0], {0: 9.0}, 1)
    assert result.indices.tolist() == [0, 3, 5, 8]
    assert result.carry(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist() == [0.0, 10.0, 11.0, 12.0]


def test_ties_go_to_the_lowest_index() -> None:
    result = replace([1, 1, 1, 1], {0: 2.0, 7: 2.0, 9: 2.0}, 2)
    assert result.indices.tolist() == [0, 7, 8, 13]


def test_what_is_tuned_and_stays_is_no_candidate() -> None:
    result = replace([0.0, 1.0, 2.0, 3.0], {5: 9.0, 8: 8.0, 21: 0.5}, 1)
    assert result.indices.tolist() == [5, 8, 13, 21]


def test_what_is_dropped_and_grown_at_once_stays_with_its_value() -> None:
    result = replace([0.0, 1.0, 2.0, 3.0], {3: 9.0, 21: 0.5}, 2)
    assert result.indices.tolist() == [3, 8, 13, 21]
    assert result.carry(torch.tensor([10.0, 11.0, 12.0, 13.0])).tolist() == [10.0, 12.0, 13.0, 0.0]
    assert result.num_dropped == 1


def test_with_few_candidates_only_the_weakest_are_dropped() -> None:
    result = replace([0.4, 0.1, 0.9, 0.2], {20: 3.0}, 3)
    assert result.indices.tolist() == [3, 8, 13, 20]
    assert result.dropped.tolist() == [1]


def test_all_may_be_replaced_and_none() -> None:
    assert replace([1, 2, 3, 4], {0: 1, 1: 1, 2: 1, 4: 1, 6: 1}, 4).indices.tolist() == [0, 1, 2, 4]
    none = replace([1, 2, 3, 4], {0: 1.0}, 0)
    assert torch.equal(none.indices, SUPPORT)
    assert none.order.tolist() == [0, 1, 2, 3]
    assert replace([1, 2, 3, 4], {}, 4).num_grown == 0


def test_indices_above_int32() -> None:
    far = 2**31 + 5
    result = drop_and_grow(
        torch.tensor([1, far]),
        torch.tensor([0.0, 1.0]),
        Candidates(torch.tensor([far + 1]), torch.ones(1)),
        num_replaced=1,
    )
    assert result.indices.tolist() == [far, far + 1]
    assert result.indices.dtype == torch.int64


def test_weights_move_between_tensors() -> None:
    result = redistribute(
        {"a": ints(0, 1, 2), "b": ints(4, 5)},
        {"a": torch.tensor([0.1, 0.2, 5.0]), "b": torch.tensor([3.0, 0.3])},
        {"a": candidates({7: 0.5}), "b": candidates({6: 2.0, 8: 1.0, 9: 0.1})},
        num_replaced=2,
    )
    assert result["a"].indices.tolist() == [2]
    assert result["b"].indices.tolist() == [4, 5, 6, 8]
    assert (result["a"].num_dropped, result["a"].num_grown) == (2, 0)
    assert (result["b"].num_dropped, result["b"].num_grown) == (0, 2)
    assert result["a"].carry(torch.tensor([1.0, 2.0, 3.0])).tolist() == [3.0]
    assert result["b"].carry(torch.tensor([1.0, 2.0]), torch.tensor([8.0, 9.0])).tolist() == [1.0, 2.0, 8.0, 9.0]


def test_with_few_candidates_in_all_the_weakest_of_all_are_dropped() -> None:
    result = redistribute(
        {"a": ints(0, 1), "b": ints(4, 5)},
        {"a": torch.tensor([0.3, 0.2]), "b": torch.tensor([0.1, 0.4])},
        {"a": candidates({}), "b": candidates({9: 1.0, 4: 3.0})},
        num_replaced=3,
    )
    # 4 is dropped and grown; of 1 and 0, the other two weakest, only 1 makes room for 9.
    assert result["a"].indices.tolist() == [0]
    assert result["b"].indices.tolist() == [4, 5, 9]


@pytest.mark.parametrize("num", [-1, 5])
def test_a_number_out_of_range_is_refused(num: int) -> None:
    with pytest.raises(SelectionError, match=f"num_replaced must be between 0 and the 4 tuned weights, got {num}"):
        replace([1, 2, 3, 4], {0: 1.0}, num)


def test_nan_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"scores of the tensor \(drop scores\) contain NaN"):
        replace([1, float("nan"), 3, 4], {0: 1.0}, 1)
    with pytest.raises(SelectionError, match=r"scores of the tensor \(candidates\) contain NaN"):
        replace([1, 2, 3, 4], {0: float("nan")}, 1)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"drop_scores of the tensor must have one entry per tuned weight \(4,\)"):
        replace([1, 2], {0: 1.0}, 1)
    with pytest.raises(SelectionError, match=r"candidates of the tensor must have one entry per index \(1,\)"):
        drop_and_grow(SUPPORT, torch.ones(4), Candidates(ints(1), torch.ones(2)), num_replaced=1)
    with pytest.raises(SelectionError, match="must have the same names"):
        redistribute({"a": SUPPORT}, {}, {}, num_replaced=1)
    result = replace([1, 2, 3, 4], {0: 1.0}, 1)
    with pytest.raises(ValueError, match=r"one entry per old weight \(4\), got \(3,\)"):
        result.carry(torch.zeros(3))
    with pytest.raises(ValueError, match=r"one entry per grown weight \(1\), got \(2,\)"):
        result.carry(torch.zeros(4), torch.zeros(2))
