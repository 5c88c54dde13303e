"""The repaired interpreter's guards: bounds, poison, disagreeing lanes, order of programs, the listening point."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import executor

if not executor.interpreted():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

from bench.tools.interpreter import (
    ORDERS,
    Access,
    Disagreement,
    OutOfBounds,
    Overflow,
    Unsupported,
    listening,
    program_order,
)
from bench.tools.interpreter.memory import describe


@triton.jit
def _copy(x_ptr, out_ptr, start, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + start + i, mask=i < count, other=0)
    tl.store(out_ptr + i, x, mask=i < count)


def test_inside_is_allowed_to_the_last_element() -> None:
    x, out = torch.arange(10.0), torch.zeros(16)
    _copy[(1,)](x, out, 3, 7, BLOCK=16)
    assert out[:7].tolist() == x[3:].tolist()


@pytest.mark.parametrize(("start", "count", "what"), [(0, 11, "1 of 11"), (-2, 4, "2 of 4"), (2**27, 1, "1 of 1")])
def test_load_out_of_bounds(start: int, count: int, what: str) -> None:
    with pytest.raises(OutOfBounds, match=f"load: {what} active lanes leave argument 'x_ptr', float32 \\[10\\]"):
        _copy[(1,)](torch.arange(10.0), torch.zeros(16), start, count, BLOCK=16)


def test_store_out_of_bounds_writes_nothing() -> None:
    memory = torch.zeros(16)
    with pytest.raises(OutOfBounds, match="store: 1 of 6 active lanes leave argument 'out_ptr'.*element 5 of 5"):
        _copy[(1,)](torch.ones(10), memory[:5], 0, 6, BLOCK=8)
    assert not memory.any()


def test_another_tensor_is_out_of_bounds_too() -> None:
    """Rows of one allocation as two arguments: what runs over the first one's end lands in the second."""
    memory = torch.arange(20.0)
    x, out = memory[:10], memory[10:]
    with pytest.raises(OutOfBounds, match="'x_ptr'"):
        _copy[(1,)](x, out, 5, 6, BLOCK=8)


def test_gaps_of_a_view_are_out_of_bounds() -> None:
    columns = torch.zeros(4, 8)[:, 2:4]  # elements 0, 1, 8, 9, 16, ... of its extent
    _copy[(1,)](columns, torch.zeros(4), 8, 2, BLOCK=4)
    with pytest.raises(OutOfBounds, match=r"1 of 3 active lanes.*\[4, 2\] with strides \(8, 1\): element 10"):
        _copy[(1,)](columns, torch.zeros(4), 8, 3, BLOCK=4)


def test_empty_tensors_allow_no_access() -> None:
    _copy[(1,)](torch.zeros(0), torch.zeros(4), 0, 0, BLOCK=4)
    with pytest.raises(OutOfBounds):
        _copy[(1,)](torch.zeros(0), torch.zeros(4), 0, 1, BLOCK=4)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    order=st.permutations([0, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.int64]),
)
def test_elements_of_any_strided_view(sizes: list[int], steps: list[int], order: list[int], dtype: torch.dtype) -> None:
    """Exactly the offsets of the view's elements belong to it, whatever its strides and the order of its axes."""
    rank = len(sizes)
    shape = [size * step for size, step in zip(sizes, steps, strict=False)]
    whole = torch.arange(math.prod(shape))
    view = whole.view(shape)[tuple(slice(None, None, step) for step in steps[:rank])]
    view = view.permute([axis for axis in order if axis < rank])
    mine = set(view.flatten().tolist())
    tensor = torch.empty(whole.numel(), dtype=dtype).as_strided(view.shape, view.stride())
    argument = describe("x", tensor)
    offsets = torch.arange(-3, whole.numel() + 3)
    item = tensor.element_size()
    belongs = argument.belongs((offsets * item).numpy(), item)
    assert {int(o) for o, b in zip(offsets, belongs, strict=True) if b} == mine


@triton.jit
def _sum_without_other(x_ptr, out_ptr, count, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count)
    if GUARDED:
        x = tl.where(i < count, x, 0)
    tl.store(out_ptr, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.max(x, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_switched_off_lanes_hold_nan(dtype: torch.dtype) -> None:
    """Even `tl.max`, which skips NaN as a GPU does, does not skip this one."""
    x, out = torch.ones(5).to(dtype), torch.zeros(2, dtype=dtype)
    _sum_without_other[(1,)](x, out, 5, GUARDED=False, BLOCK=8)
    assert out.isnan().all()
    _sum_without_other[(1,)](x, out, 5, GUARDED=True, BLOCK=8)
    assert out.tolist() == [5, 1]


@triton.jit
def _max(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.max(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def test_max_skips_a_real_nan() -> None:
    out = torch.zeros(1)
    _max[(1,)](torch.tensor([1.0, torch.nan, 3.0, 2.0]), out, BLOCK=4)
    assert out.item() == 3


@triton.jit
def _gather(index_ptr, x_ptr, out_ptr, count, stride, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < count)
    place = (index * stride + 7) // 2
    if MASKED:
        x = tl.load(x_ptr + place, mask=i < count, other=0.0)
    else:
        x = tl.load(x_ptr + place)
    tl.store(out_ptr + i, x, mask=i < count)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_switched_off_integers_are_no_addresses(dtype: torch.dtype) -> None:
    """Arithmetic on them is no overflow as long as nothing uses the result; using it is out of bounds."""
    index, x, out = torch.zeros(3, dtype=dtype), torch.arange(100.0), torch.zeros(4)
    _gather[(1,)](index, x, out, 3, 1000, MASKED=True, BLOCK=4)
    assert out.tolist() == [3, 3, 3, 0]
    with pytest.raises(OutOfBounds, match="1 of 4 active lanes leave argument 'x_ptr'"):
        _gather[(1,)](index, x, out, 3, 1000, MASKED=False, BLOCK=4)


def test_overflow_in_live_lanes_is_still_seen() -> None:
    index = torch.full((3,), 2**30, dtype=torch.int32)
    with pytest.raises(Overflow):
        _gather[(1,)](index, torch.arange(100.0), torch.zeros(4), 3, 1000, MASKED=True, BLOCK=4)


@triton.jit
def _count_above(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count)
    tl.store(out_ptr, tl.sum((x > 0.5).to(tl.int32), 0))


def test_comparing_switched_off_lanes_gives_anything() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    _count_above[(1,)](torch.ones(1), out, 1, BLOCK=64)
    assert out.item() not in (1, 64), "a NaN would have compared false everywhere and hidden the mistake"


@triton.jit
def _same_place(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i // 2, tl.load(x_ptr + i))


def test_lanes_that_disagree_about_one_address() -> None:
    out = torch.zeros(2)
    _same_place[(1,)](torch.tensor([1.0, 1, 2, 2]), out, BLOCK=4)
    assert out.tolist() == [1, 2]
    with pytest.raises(Disagreement):
        _same_place[(1,)](torch.tensor([1.0, 2, 3, 3]), out, BLOCK=4)


@triton.jit
def _float_atomic(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def test_floating_point_atomics_are_refused() -> None:
    with pytest.raises(Unsupported, match="floating-point atomic"):
        _float_atomic[(1,)](torch.zeros(1))


@triton.jit
def _ticket(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@pytest.mark.parametrize("order", ORDERS)
def test_programs_run_in_the_chosen_order(order: str) -> None:
    tickets = torch.zeros(20, dtype=torch.int32)
    with program_order(order, seed=3):
        _ticket[(20,)](torch.zeros(1, dtype=torch.int32), tickets)
    assert sorted(tickets.tolist()) == list(range(20))
    assert (tickets.tolist() == list(range(20))) == (order == "forward")
    assert (tickets.tolist() == list(range(20))[::-1]) == (order == "reverse")


def test_orders_repeat_with_their_seed_and_are_shuffled_by_default() -> None:
    def tickets() -> list[int]:
        out = torch.zeros(20, dtype=torch.int32)
        _ticket[(20,)](torch.zeros(1, dtype=torch.int32), out)
        return out.tolist()

    runs = []
    for order, seed in (("shuffled", 1), ("shuffled", 1), ("shuffled", 2), ("interleaved", 1), ("interleaved", 1)):
        with program_order(order, seed):
            runs.append(tickets())
    assert runs[0] == runs[1] != runs[2] and runs[3] == runs[4]
    assert tickets() == tickets() != list(range(20))
    with pytest.raises(ValueError, match="sideways"), program_order("sideways"):
        pass


@triton.jit
def _last_arriver(x_ptr, partial_ptr, counter_ptr, out_ptr, EARLY: tl.constexpr, PARTS: tl.constexpr):
    part = tl.program_id(0)
    if EARLY:  # the mistake: it arrives before its part is there
        arrived = tl.atomic_add(counter_ptr, 1)
    tl.store(partial_ptr + part, tl.load(x_ptr + part) * 2)
    if not EARLY:
        arrived = tl.atomic_add(counter_ptr, 1)
    if arrived == PARTS - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, PARTS)), 0))
        tl.store(counter_ptr, 0)


def merged(early: bool) -> float:
    x, partial = torch.arange(8.0), torch.full((8,), torch.nan)
    counter, out = torch.zeros(1, dtype=torch.int32), torch.full((1,), torch.nan)
    _last_arriver[(8,)](x, partial, counter, out, EARLY=early, PARTS=8)
    return out.item()


def test_interleaving_exercises_the_last_arriver() -> None:
    """A counter that is raised too early passes in every order of whole programs, and fails when they interleave."""
    for order in ORDERS:
        with program_order(order):
            assert merged(early=False) == 56
    for order in ("forward", "reverse", "shuffled"):
        with program_order(order):
            assert merged(early=True) == 56
    results = []
    for seed in range(5):
        with program_order("interleaved", seed):
            results.append(merged(early=True))
    assert any(result != 56 for result in results)


def test_errors_of_interleaved_programs_come_out() -> None:
    with program_order("interleaved"), pytest.raises(OutOfBounds, match=r"_ticket, program \(\d, 0, 0\).*'out_ptr'"):
        _ticket[(9,)](torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))


def test_listeners_see_who_reads_and_writes_what() -> None:
    x, out = torch.arange(10.0).half(), torch.zeros(16).half()
    seen: list[Access] = []
    with listening(seen.append):
        _copy[(1,)](x, out, 3, 7, BLOCK=16)
    _copy[(1,)](x, out, 3, 7, BLOCK=16)
    load, store = seen
    assert (load.kind, load.kernel, load.argument, load.size) == ("load", "_copy", "x_ptr", 2)
    assert load.offsets.tolist() == list(range(6, 20, 2)) and load.tensor.data_ptr() == x.data_ptr()
    assert (store.kind, store.argument, store.program, store.offsets.size) == ("store", "out_ptr", (0, 0, 0), 7)
