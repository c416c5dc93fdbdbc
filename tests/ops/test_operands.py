"""Every op on every backend with operands as they may come: views of any layout, at odd addresses, far apart, without
elements, sharing memory, of other kinds or on other devices. The result is right, or there is an error."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from poison import in_nan
from siva_operands import each, flat, in_double
from torch import Tensor

from fastpeft import FastpeftError, functional
from fastpeft.ops import aten, backends, define, reference
from fastpeft.ops.packing import quantise_rows
from fastpeft.ops.quantise import Format, QuantisedWeight
from fastpeft.ops.side_step import weights_of

Op = Callable[..., Any]
Sizes = dict[str, int]
SIZES: Sizes = {"b": 3, "t": 5, "k": 7, "n": 6, "r": 2, "h": 2, "d": 4, "slots": 3, "absent": 2}
TERMS = [3, 2**40 + 1], [0.1, -0.2]


# -- operands --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def layer(z: Sizes, more: int = 0) -> list[Tensor]:
    """weight, u, s, v of a layer; one of a group has more rows and ranks than another."""
    n, r = z["n"] + more, z["r"] + more
    return [draw(n, z["k"]), draw(n, r), draw(r), draw(r, z["k"])]


def siva_linear(z: Sizes) -> list[Any]:
    layers = [layer(z), layer(z, 1), layer(z)]
    weights, *factors = map(list, zip(*layers))
    codes, scales = quantised_weight(z, "int8")
    weights[2] = codes
    return [draw(z["b"], z["t"], z["k"]), weights, [None, None, scales], *factors, [draw(z["n"]), None, draw(z["n"])]]


def siva_linear_backward(z: Sizes) -> list[Any]:
    x, *layers, _ = siva_linear(z)
    dhs = [draw(*x.shape[:2], len(u)) for u in layers[2]]
    return [dhs, x, *layers, draw(3 * z["r"] + 1, math.prod(x.shape[:2])), True, [True] * 3, True, [True] * 3]


def siva_linear_mixed(z: Sizes) -> list[Any]:
    weight, *first = layer(z)
    second = [draw(z["n"], z["r"] + 1), draw(z["r"] + 1), draw(z["r"] + 1, z["k"])]
    sizes = [min(1, z["b"]), max(0, z["b"] - 1)]
    factors = map(list, zip(first, second))
    return [
        draw(z["b"], z["t"], z["k"]),
        [weight],
        [None],
        *factors,
        [draw(z["n"])],
        sizes,
        torch.arange(z["b"]).flip(0),
    ]


def siva_linear_backward_mixed(z: Sizes) -> list[Any]:
    x, *layers, _, sizes, order = siva_linear_mixed(z)
    p = draw(sum(len(s) * size * z["t"] for s, size in zip(layers[3], sizes)))
    return [[draw(z["b"], z["t"], z["n"])], x, *layers, p, True, [True] * 2, True, [True], sizes, order]


def window_attention(z: Sizes) -> list[Any]:
    real, window = z["slots"], z["slots"] + z["absent"]
    q, c = draw(z["b"], z["h"], z["t"], z["d"]), draw(z["b"], real, z["t"], z["d"])
    mask = torch.arange(z["b"] * z["t"]).view(z["b"], z["t"]) % 3 > 0
    return [q, c, draw(window, z["d"]), mask, list(range(window - real, window)), True, 0.3, torch.tensor(5), 2]


def window_attention_backward(z: Sizes) -> list[Any]:
    q, c, p, mask, *rest = window_attention(z)
    found = reference.window_attention(q, c, p, mask, *rest)
    return [draw(*q.shape), q, c, p, mask, *found, *rest, True, True, True]


def feature_dropout_(z: Sizes) -> list[Any]:
    return [draw(z["b"], z["slots"], z["t"], z["d"]), list(range(z["slots"])), 0.3, 5, 2]


def int8_linear(z: Sizes) -> list[Any]:
    return [draw(z["b"], z["t"], z["k"]), *quantise_rows(draw(z["n"], z["k"])), draw(z["n"])]


def quantised_weight(z: Sizes, kind: Format) -> list[Tensor]:
    held = QuantisedWeight(draw(z["n"], z["k"]), kind)
    return [held.codes.data, held.scales.data]


def quantised_linear(z: Sizes) -> list[Any]:
    return [draw(z["b"], z["t"], z["k"]), *quantised_weight(z, "nf4"), z["n"], draw(z["n"])]


def quantised_linear_backward(z: Sizes) -> list[Any]:
    return [draw(z["b"], z["t"], z["n"]), *quantised_weight(z, "nf4"), z["k"]]


def mezo_perturb(z: Sizes) -> list[Any]:
    return [draw(z["n"], z["k"]), 3, *TERMS, 0.1]


def mezo_perturb_(z: Sizes) -> list[Any]:
    return [[draw(z["n"], z["k"]), draw(z["b"])], [3, 100], *TERMS, 0.1]


def frozen_head_cross_entropy(z: Sizes) -> list[Any]:
    labels = torch.arange(z["b"] * z["t"]).view(z["b"], z["t"]) % z["n"]
    labels[1::2] = -100
    return [draw(z["b"], z["t"], z["k"]), draw(z["n"], z["k"]), labels, draw(z["n"]), -100, True]


def side_step_(z: Sizes) -> list[Any]:
    width, slots, hidden = z["d"], z["slots"], z["n"]
    linears = (3 * width, width), (width, width), (hidden, width), (width, hidden)
    encoder = [part for n, k in linears for part in (draw(n, k), draw(n))] + [draw(width) for _ in range(4)]
    block = weights_of([draw(2 * width, width), draw(width, 2 * width), draw(width)], encoder)
    window, keys = draw(z["b"], 1, z["t"], slots * width), draw(z["b"], 1, z["t"], 2 * width)
    visible = (torch.arange(z["b"] * z["t"]) % 3 != 1).view(z["b"], 1, 1, z["t"])
    projected = draw(2 * width, z["k"]), draw(2 * width), [1, slots + 2], 1e-6
    given = draw(z["b"], z["k"]), draw(z["b"], width), draw(z["b"], 2, slots, width)
    return [*given, *projected, 1, block, window, keys, visible, hidden, 2, 1, 0.3, 2, 1e-5, 1e-5, 1]


# what makes the operands of an op, and which sizes they have
OPS: dict[str, tuple[Callable[[Sizes], list[Any]], str]] = {
    "siva_linear": (siva_linear, "b t k n r"),
    "siva_linear_backward": (siva_linear_backward, "b t k n r"),
    "siva_linear of adapters": (siva_linear_mixed, "b t k n r"),
    "siva_linear_backward of adapters": (siva_linear_backward_mixed, "b t k n r"),
    "window_attention": (window_attention, "b h t d slots absent"),
    "window_attention_backward": (window_attention_backward, "b h t d slots absent"),
    "feature_dropout_": (feature_dropout_, "b t d slots"),
    "int8_linear": (int8_linear, "b t k n"),
    "quantised_linear": (quantised_linear, "b t k n"),
    "quantised_linear_backward": (quantised_linear_backward, "b t k n"),
    "frozen_head_cross_entropy": (frozen_head_cross_entropy, "b t k"),
    "side_step_": (side_step_, "b k"),
    "mezo_perturb": (mezo_perturb, "k n"),
    "mezo_perturb_": (mezo_perturb_, "b k n"),
}
IN_PLACE = [op for op in OPS if op.endswith("_")]


def test_every_op_is_here() -> None:
    assert {name_of(op) for op in OPS} == define.OPS.keys()


def name_of(op: str) -> str:
    return op.partition(" ")[0]


def registered(op: str) -> Op:
    found: Op = getattr(torch.ops.fastpeft, name_of(op))
    return found


# -- backends --------------------------------------------------------------------------------------------------------


def launcher(op: str) -> Op:
    """Triton's function for an op."""
    found: Op = getattr(
        importlib.import_module(f"fastpeft.kernels.{backends._TRITON_LAUNCHERS[name_of(op)]}"), name_of(op)
    )
    return found


def implementations() -> Iterator[Any]:
    """Op and backend: what is registered for a CPU, and what could be."""
    for op in OPS:
        yield pytest.param(op, "cpu", id=f"{op}-cpu")
        for name, forms in (("aten", aten), ("reference", reference)):
            if hasattr(forms, name_of(op)):
                yield pytest.param(op, name, id=f"{op}-{name}")
        if name_of(op) in backends._TRITON_LAUNCHERS:
            yield pytest.param(op, "triton", id=f"{op}-triton", marks=pytest.mark.interp_full)
        cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
        yield pytest.param(op, "cuda", id=f"{op}-cuda", marks=cuda)


@pytest.mark.parametrize("op", list(backends._TRITON_LAUNCHERS))
def test_launchers_take_what_the_op_passes(op: str) -> None:
    pytest.importorskip("triton")
    taken = inspect.signature(launcher(op)).parameters
    assert [*taken] == [argument.name for argument in getattr(torch.ops.fastpeft, op).default._schema.arguments]


everywhere = pytest.mark.parametrize(("op", "backend"), list(implementations()))


@pytest.fixture
def run(op: str, backend: str, request: pytest.FixtureRequest) -> Op:
    """The results of an op on a backend, of one in place what it left, all on the CPU."""
    place = "cpu"
    if backend in ("cpu", "cuda"):
        function, place = registered(op), backend
    elif backend == "triton":
        pytest.importorskip("triton")
        place = request.getfixturevalue("device")
        function = launcher(op)
    else:
        function = getattr({"aten": aten, "reference": reference}[backend], name_of(op))

    def call(args: Sequence[Any]) -> list[Tensor]:
        args = moved(args, place)
        found = function(*args)
        return [tensor.to("cpu") for tensor in results(op, args, found)]

    return call


def moved(args: Sequence[Any], place: str) -> list[Any]:
    """Operands on a device, each in a view of the layout it has."""
    if place == "cpu":
        return list(args)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
            room = value.as_strided((extent if value.numel() else 0,), (1,)).to(place)
            return room.as_strided(value.shape, value.stride())
        return [move(one) for one in value] if isinstance(value, list) else value

    return [move(value) for value in args]


def results(op: str, args: Sequence[Any], found: Any) -> list[Tensor]:
    if op == "side_step_":  # what it returns, and what it writes
        return [found, args[2], args[9], args[10]]
    if op in IN_PLACE:
        return list(args[0]) if isinstance(args[0], list) else [args[0]]
    return flat(found if isinstance(found, (list, tuple)) else [found])


def expected(op: str, args: Sequence[Any]) -> list[Tensor]:
    """What the reference makes of dense copies: in float64, but for bits that are the same everywhere."""
    dense = each(lambda t: t.clone(memory_format=torch.contiguous_format), args)
    if op.startswith(("mezo", "feature")):
        return results(op, dense, getattr(reference, name_of(op))(*dense))
    dense = in_double(dense)
    return [tensor.float() for tensor in results(op, dense, getattr(reference, name_of(op))(*dense))]


def check(op: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Equal bits where these are promised, else about a thousand roundings of the largest number."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        largest = theirs[theirs.isfinite()].abs().max().item() if theirs.isfinite().any() else 0.0
        allowed = 0.0 if op.startswith(("mezo", "feature")) else 1e-4 * max(largest, 1.0)
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=allowed)


# -- layouts ---------------------------------------------------------------------------------------------------------


def turned(t: Tensor) -> Tensor:
    """The last dimension varies slowest."""
    order = range(t.dim() - 1, -1, -1)
    return t.permute(*order).contiguous().permute(*order)


def every_other(t: Tensor) -> Tensor:
    room = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    return room[..., ::2].copy_(t)


def repeated(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def misaligned(t: Tensor) -> Tensor:
    """At an address that is no multiple of anything."""
    room = bytearray(t.numel() * t.element_size() + 1)
    return t if t.numel() == 0 else torch.frombuffer(room, dtype=t.dtype, offset=1).view(t.shape).copy_(t)


def at_an_odd_element(t: Tensor) -> Tensor:
    return t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "inside another": in_nan,
    "turned": turned,
    "every other element": every_other,
    "one row repeated": repeated,
    "misaligned": misaligned,
    "at an odd element": at_an_odd_element,
    "lazy clone": torch._lazy_clone,  # shares its memory until one is written to, which no thread may begin
}


def laid_out(op: str, layout: Callable[[Tensor], Tensor]) -> list[Any]:
    return each(layout, OPS[op][0](SIZES))


@everywhere
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(run: Op, op: str, backend: str, layout: str) -> None:
    if layout == "one row repeated" and op.startswith("mezo") and op in IN_PLACE:
        pytest.skip("refused by the checked function, see test_mezo_perturb.py")
    args = laid_out(op, LAYOUTS[layout])
    if op == "window_attention_backward" and layout == "one row repeated":
        args[5:7] = reference.window_attention(*args[1:5], *args[7:12])  # what that row gives under each mask
    dense = layout in ("dense", "misaligned", "at an odd element", "lazy clone")
    if op == "feature_dropout_" and not dense and (backend == "cpu" or layout == "one row repeated"):
        before = args[0].clone()
        with pytest.raises(RuntimeError, match=r"dense in its last two|reached twice|single memory location"):
            run(args)
        assert torch.equal(args[0], before)
        return
    if op == "side_step_" and layout == "one row repeated":
        with pytest.raises(RuntimeError, match="single memory location"):
            run(args)
        return
    wanted = expected(op, args)
    check(op, run(args), wanted)


@everywhere
def test_operands_that_share_their_memory(run: Op, op: str, backend: str) -> None:
    """Each is a view of the beginning of one tensor. What is written may be nobody else's, so not of those in place."""
    if op in IN_PLACE:
        pytest.skip("what they write is theirs alone; two that overlap are refused, see test_mezo_perturb.py")
    pool = draw(2000)
    args = laid_out(op, lambda t: pool[: t.numel()].view(t.shape))
    before = pool.clone()
    check(op, run(args), expected(op, args))
    assert torch.equal(pool, before)


@pytest.fixture(scope="module")
def vast(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """A file of more than 2^31 float32 numbers, 8 GiB, that takes no room where nothing is written."""
    file = tmp_path_factory.mktemp("vast") / "numbers"
    try:
        return torch.from_file(str(file), shared=True, size=2**31 + 2**20, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"this disk holds no such file ({error})")


@everywhere
def test_elements_that_lie_further_apart_than_32_bits_count(run: Op, op: str, backend: str, vast: Tensor) -> None:
    if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()):
        pytest.skip("would have to move it there")
    starts = iter(range(0, 2**20, 1000))

    def apart(t: Tensor) -> Tensor:
        """The first dimension, or where that has one row the second, spans it all; one element is where it is."""
        if t.numel() == 1:
            return t
        strides = list(t.contiguous().stride())
        at = next(i for i, size in enumerate(t.shape) if size > 1)
        strides[at] = -(-(2**31) // (t.shape[at] - 1))
        return vast[next(starts) :].as_strided(t.shape, strides).copy_(t)

    args = laid_out(op, apart)
    wanted = expected(op, args)
    check(op, run(args), wanted)


@pytest.mark.parametrize("whole", [False, True], ids=["windows", "whole"])
def test_a_parameter_of_more_than_2_31_elements(tmp_path: Path, request: pytest.FixtureRequest, whole: bool) -> None:
    """In a file of 4 GiB, whose numbers in the noise pass 2^32 on the way."""
    if whole and not request.config.getoption("--full"):
        pytest.skip("writes 4 GiB, with --full")
    if whole and shutil.disk_usage(tmp_path).free < 2**33:
        pytest.skip("needs 8 GiB of disk")
    param = torch.from_file(str(tmp_path / "numbers"), shared=True, size=2**31 + 5000, dtype=torch.bfloat16)
    offset = 2**31 + 1000
    starts = [0, 2**31 - 1150, 2**31 - 150, len(param) - 300]  # the second and the third meet 2^32 and 2^31
    parts = [param[start : start + 300] for start in starts]
    if whole:
        functional.mezo_perturb_([param], [offset], [3], [0.5], 0.0, "rademacher")
        assert (param[:: 2**15].abs() == 0.5).all()
    else:
        functional.mezo_perturb_(parts, [offset + start for start in starts], [3], [0.5], 0.0, "rademacher")
    for start, part in zip(starts, parts):
        expected = [torch.zeros(300, dtype=torch.bfloat16)]
        reference.mezo_perturb_(expected, [offset + start], [3], [0.5], 0.0, "rademacher")
        assert torch.equal(part, expected[0])


# -- no elements, no values ------------------------------------------------------------------------------------------


def empty(op: str) -> Iterator[Sizes]:
    names = OPS[op][1].split()
    yield from ({**SIZES, name: 0} for name in names)
    if "absent" in names:
        yield {**SIZES, "slots": 0, "absent": 0}


@everywhere
def test_any_size_may_be_0(run: Op, op: str, backend: str) -> None:
    for sizes in empty(op):
        args = OPS[op][0](sizes)
        wanted = expected(op, args)
        if op not in IN_PLACE:
            shapes = [tensor.shape for tensor in on_meta(op, args)]
            assert [tensor.shape for tensor in wanted] == shapes, sizes
        check(op, run(args), wanted)


def on_meta(op: str, args: Sequence[Any]) -> list[Tensor]:
    """The results on the device that has shapes and no values."""
    args = moved_to_meta(args)
    return results(op, args, registered(op)(*args))


def moved_to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [moved_to_meta(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("op", OPS)
def test_tensors_without_values_give_shapes(op: str) -> None:
    args = OPS[op][0](SIZES)
    found, wanted = on_meta(op, args), expected(op, args)
    assert all(tensor.is_meta for tensor in found)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in wanted]


# -- what the checked functions refuse -------------------------------------------------------------------------------


def of_function(op: str) -> list[Any]:
    """What a person gives it: SiVA's takes no quantised weight."""
    args = OPS[op][0](SIZES)
    return [args[0], *(each[:2] for i, each in enumerate(args[1:]) if i != 1)] if op == "siva_linear" else args


def by_function(op: str, args: list[Any]) -> Any:
    """The function that a person calls for an op."""
    if op == "siva_linear":
        return functional.siva_linear_group(*args)
    if op == "siva_linear of adapters":
        x, (weight,), _, us, ss, vs, (bias,), sizes, order = args
        return functional.siva_linear_mixed(x, weight, us, ss, vs, sizes, order, bias)
    if op == "frozen_head_cross_entropy":
        return functional.frozen_head_cross_entropy(*args[:4])
    if op == "window_attention":
        q, c, p, mask, slots, causal, dropout, seed, block = args
        options = {"slots": slots, "causal": causal, "dropout": dropout, "seed": seed, "block": block}
        return functional.window_attention(q, c, p, mask, **options)
    return getattr(functional, op)(*args)


NOT_CALLED = "feature_dropout_", "side_step_"
CALLED = [op for op in OPS if "backward" not in op and "quantised" not in op and op not in NOT_CALLED]


def places(args: Sequence[Any]) -> Iterator[tuple[int, int | None]]:
    """Where among the operands, and in lists among them, there are tensors."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            yield index, None
        elif isinstance(value, list):
            yield from ((index, number) for number, one in enumerate(value) if isinstance(one, Tensor))


def at(args: Sequence[Any], place: tuple[int, int | None]) -> Tensor:
    index, number = place
    found: Tensor = args[index] if number is None else args[index][number]
    return found


def changed(args: Sequence[Any], place: tuple[int, int | None], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The operands with one tensor changed."""
    index, number = place
    args = [list(value) if isinstance(value, list) else value for value in args]
    if number is None:
        args[index] = change(args[index])
    else:
        args[index][number] = change(args[index][number])
    return args


@pytest.mark.parametrize("op", CALLED)
def test_functions_take_tensors_without_values(op: str) -> None:
    """Autocast, which they ask for its dtype, does not know of the meta device."""
    args = of_function(op)
    found, wanted = by_function(op, moved_to_meta(args)), by_function(op, args)
    found, wanted = ([] if each is None else flat([each]) for each in (found, wanted))
    assert all(tensor.is_meta for tensor in found)
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in wanted]


@pytest.mark.parametrize("op", CALLED)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)
)
def test_other_kinds_of_numbers_are_refused(op: str, dtype: torch.dtype) -> None:
    args = of_function(op)
    for place in places(args):
        if at(args, place).dtype is not dtype:
            with pytest.raises(FastpeftError):
                by_function(op, changed(args, place, lambda t: t.to(dtype)))


@pytest.mark.parametrize("op", CALLED)
def test_an_operand_on_another_device_is_refused(op: str) -> None:
    """But for parameters of MeZO, each of which is perturbed where it is."""
    args = of_function(op)
    for place in list(places(args)):
        bad = changed(args, place, lambda t: t.to("meta"))
        if op in ("mezo_perturb", "mezo_perturb_"):
            by_function(op, bad)
            continue
        with pytest.raises(FastpeftError, match="device"):
            by_function(op, bad)


def test_parameters_on_several_kinds_of_devices() -> None:
    here, alone = torch.zeros(9), torch.zeros(9)
    functional.mezo_perturb_([torch.zeros(5, device="meta"), here], [0, 5], [1], [0.1])
    functional.mezo_perturb_([alone], [5], [1], [0.1])
    assert torch.equal(here, alone)
    assert (alone != 0).all()


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_order_that_is_no_permutation_is_refused(order: list[int], dtype: torch.dtype) -> None:
    args = each(lambda t: t.to(dtype), siva_linear_mixed(SIZES))
    args[8] = torch.tensor(order)
    with pytest.raises(FastpeftError, match=r"order is .* each of 0 to 2 once"):
        by_function("siva_linear of adapters", args)


@pytest.mark.parametrize("op", OPS)
def test_the_registered_op_refuses_or_casts_other_kinds(op: str) -> None:
    """Whatever comes past the checked functions: memory is read as what it is."""
    args = of_function(op)
    for place in places(args):
        for dtype in (torch.int32, torch.float64, torch.bfloat16, torch.complex64):
            found = []
            changed_one = changed(args, place, lambda t, dtype=dtype: t.to(dtype))  # type: ignore[misc]
            for function in (registered(op), getattr(reference, name_of(op))):
                bad = each(Tensor.clone, changed_one)
                try:
                    found.append(results(op, bad, function(*bad)))
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                    found.append([])
            ours, theirs = found
            if ours and theirs:
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
            elif ours:  # casts on the way
                assert [tensor.shape for tensor in ours] == [tensor.shape for tensor in expected(op, args)]
