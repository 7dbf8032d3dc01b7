"""Training steps on the meta device: what they would allocate, without weights, data or arithmetic."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.backends.products import meta_stands_for

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


@dataclass
class _Block:
    """A piece of memory: when it was taken and given back, in operations since the start."""

    nbytes: int
    born: int
    during: str
    died: int | None = None


class Results:
    """What torch's functions make of tensors without data, from the shapes that they made of the same before.

    torch works it out in Python, a function at a time; layers, steps and plans ask for the same few hundred.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)`."""
        looks = _looks(args)
        question = (func, looks, _looks(tuple(sorted(kwargs.items()))), torch.get_default_dtype())
        if _UNKNOWN in question or not _is_plain(func):
            return func(*args, **kwargs)
        form = self._known.get(question)
        if form is not None and form is not _UNKNOWN:
            return args[0] if form is _FIRST else _made(form)
        result = func(*args, **kwargs)
        if form is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if func._schema.is_mutable:
                is_first = result is args[0] and looks == _looks(args)
                self._known[question] = _FIRST if is_first else _UNKNOWN
            else:
                self._known[question] = _form(result)
        return result


# A result that cannot be made of shapes alone; a result that is the first argument, with other numbers in it.
_UNKNOWN, _FIRST = object(), object()
_MOST_KNOWN = 20_000
_VALUES = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@functools.cache
def _is_plain(func: Any) -> bool:
    """Whether a function of torch's makes new tensors, or changes the first that it is given, and does nothing else."""
    schema = func._schema
    written = [argument for argument in schema.arguments if argument.alias_info is not None]
    if func.namespace != "aten":
        return False
    if schema.is_mutable:
        return len(written) == len(schema.returns) == 1 and written[0].name == schema.arguments[0].name
    return not written and all(one.alias_info is None for one in schema.returns)


def _looks(value: Any) -> Any:
    """Of what a function is given all that the shape of its result may depend on."""
    if isinstance(value, Tensor):
        is_plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        return (value.shape, value.stride(), value.dtype, value.device) if is_plain else _UNKNOWN
    if isinstance(value, tuple | list):
        parts = tuple(map(_looks, value))
        return _UNKNOWN if _UNKNOWN in parts else parts
    # 1, 1.0 and True are equal, and give other dtypes.
    return (type(value), value) if isinstance(value, _VALUES) else _UNKNOWN


class _Form(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _form(result: Any) -> Any:
    """The shapes of new tensors of which each fills a memory of its own, or `_UNKNOWN`."""
    if isinstance(result, tuple):
        forms = tuple(None if part is None else _form(part) for part in result)
        memories = [id(part.untyped_storage()) for part in result if isinstance(part, Tensor)]
        return _UNKNOWN if _UNKNOWN in forms or len(set(memories)) < len(memories) else forms
    if type(result) is not Tensor or not result.is_meta or result.layout != torch.strided:
        return _UNKNOWN
    form = _Form(result.shape, result.stride(), result.dtype)
    return form if _made(form).untyped_storage().nbytes() == result.untyped_storage().nbytes() else _UNKNOWN


def _made(form: Any) -> Any:
    if isinstance(form, _Form):
        return torch.empty_strided(form.size, form.stride, dtype=form.dtype, device="meta")
    return form if form is None else tuple(map(_made, form))


RESULTS = Results()


class Ledger(TorchDispatchMode):
    """Keeps book of all memory that tensors take and give back while it is entered, an operation at a time.

    Attributes:
        during: the part of a step that is under way; what is taken is booked under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.during = FORWARD
        aten = torch.ops.aten
        self._stand_ins: dict[Any, Callable[..., Any]] = {
            # What a model asks of its data: whether a mask is full, whether positions are consecutive. They are.
            aten._local_scalar_dense.default: lambda tensor: tensor.dtype == torch.bool or 1,
            aten.sparse_sampled_addmm.out: lambda *args, out, **kwargs: out,
            # Which labels are given: all of them.
            aten.nonzero.default: lambda tensor: tensor.new_empty((tensor.numel(), tensor.dim()), dtype=torch.long),
            # torch's own for tensors without data knows it in bfloat16 alone.
            aten._grouped_mm.default: _grouped_product,
        }
        self._clock = 0
        self._blocks: list[_Block] = []
        self._open: dict[int, tuple[weakref.ref[Any], _Block | None]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the memory of these."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._open[id(storage)] = weakref.ref(storage, self._closer(storage)), None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._clock += 1
        stand_in = self._stand_ins.get(func)
        result = RESULTS.of(func, args, kwargs or {}) if stand_in is None else stand_in(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Counters that optimizers keep on the processor are no memory of the device's.
            if isinstance(tensor, Tensor) and tensor.is_meta and tensor.layout == torch.strided:
                self._take(tensor.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        if id(storage) not in self._open:
            block = _Block(storage.nbytes(), self._clock, self.during)
            self._blocks.append(block)
            self._open[id(storage)] = weakref.ref(storage, self._closer(storage, block)), block

    def _closer(self, storage: Any, block: _Block | None = None) -> Callable[[object], None]:
        key = id(storage)

        def close(_: object) -> None:
            self._open.pop(key, None)
            if block is not None:
                block.died = self._clock

        return close

    def settle(self) -> int:
        """Forget what was booked, and count from here on only what is taken anew; the bytes that are still there."""
        left = sum(block.nbytes for _, block in self._open.values() if block is not None)
        self._open = {key: (reference, None) for key, (reference, _) in self._open.items()}
        self._blocks = []
        return left

    def block_of(self, tensor: Tensor) -> _Block | None:
        """What was booked for a tensor that is still there."""
        return self._open.get(id(tensor.untyped_storage()), (None, None))[1]

    def at_peak(self) -> list[_Block]:
        """What was there when most was."""
        changes: dict[int, int] = {}
        for block in self._blocks:
            changes[block.born] = changes.get(block.born, 0) + block.nbytes
            if block.died is not None:
                changes[block.died + 1] = changes.get(block.died + 1, 0) - block.nbytes
        level = peak = when = 0
        for moment in sorted(changes):
            level += changes[moment]
            if level > peak:
                peak, when = level, moment
        return [b for b in self._blocks if b.born <= when and (b.died is None or b.died >= when)]


def _grouped_product(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What the experts of a mixture take for their products: of groups of rows or columns, where offsets say so."""
    groups = [] if offsets is None or a.dim() != b.dim() else [offsets.numel()]
    if a.dim() == b.dim() == 3:
        groups = [a.shape[0]]
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the moment of a training step when most memory is taken, beyond weights and adapters.

    Attributes:
        kept: what stays from step to step: optimizer states, what resident mode keeps.
        activations: taken in the forward pass, logits and loss included.
        gradients: of what is trained.
        temporaries: taken in the backward pass or the optimizer's step, and given back in it.
    """

    kept: int
    activations: int
    gradients: int
    temporaries: int


class _FusedAttention(torch.autograd.Function):
    """What attention takes that never holds its scores (flash, memory-efficient): the output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _attention_of(device_type: str) -> Iterator[None]:
    """Let tensors on the meta device attend as on a real one: torch has no fused kernel there.

    By exchanging torch's function: a mode would not reach what gradient checkpointing computes again in a backward.
    """
    own = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        # The fused kernel for processors takes no dropout. Those of accelerators need the same memory, all of them.
        if query.is_meta and (device_type != "cpu" or not dropout_p):
            return _FusedAttention.apply(query, key, value)
        return own(query, key, value, *args, dropout_p=dropout_p, **kwargs)

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def measure_step(
    model: nn.Module,
    make_loss: Callable[[], Tensor],
    *,
    first_update: Callable[[], object],
    update: Callable[[], object] | None = None,
    watch: Callable[[], object] | None = None,
    keep_gradients: bool = False,
    around: AbstractContextManager[object] | None = None,
    device_type: str = "cuda",
) -> StepMemory:
    """Take two training steps on the meta device, and say what the second needs at most.

    Args:
        model: on the meta device, in training mode.
        make_loss: the forward pass.
        first_update: the optimizer's first step, which makes its states.
        update: its second one; None for one that takes no memory (a fused optimizer).
        watch: called before the second step.
        keep_gradients: gradients of the step before are there when the second begins (gradient accumulation).
        around: entered for both.
        device_type: "cpu" or "cuda", whose kernels are assumed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ledger = Ledger()
    ledger.ignore([*model.parameters(), *model.buffers()])
    with ExitStack() as stack:
        for context in (meta_stands_for(device_type), _attention_of(device_type), around or nullcontext(), ledger):
            stack.enter_context(context)
        make_loss().backward()
        first_update()
        old_gradients = sum(p.grad.nbytes for p in trained if p.grad is not None) if keep_gradients else 0
        for parameter in trained:
            parameter.grad = parameter.grad if keep_gradients else None
        kept = ledger.settle() - old_gradients
        if watch is not None:
            watch()
        loss = make_loss()
        ledger.during = BACKWARD
        loss.backward()
        del loss
        ledger.during = STEP
        if update is not None:
            update()
        new = {id(b) for p in trained if p.grad is not None and (b := ledger.block_of(p.grad)) is not None}
        peak = ledger.at_peak()
    return StepMemory(
        kept=kept,
        activations=sum(b.nbytes for b in peak if b.during == FORWARD),
        gradients=old_gradients + sum(b.nbytes for b in peak if id(b) in new),
        temporaries=sum(b.nbytes for b in peak if b.during != FORWARD and id(b) not in new),
    )
