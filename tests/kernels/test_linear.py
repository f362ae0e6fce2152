"""Linear layers in 4 and 8 bits against the definition in integers and float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pagestream.kernels import build, packing, quantized_linear, reference

ISAS = ("amx", "vnni", "avx2", "baseline")  # the builds of linear.cpp
Weight = tuple[Tensor, Tensor, Tensor | None]  # codes [N, K], scales and mins [N, K / 32]


def random_weight(outputs: int, inputs: int, bits: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, generator=generator)
    scales = (torch.randn(outputs, inputs // 32, generator=generator) * 0.01).half()
    mins = (torch.randn(outputs, inputs // 32, generator=generator) * 0.05).half() if bits == 4 else None
    return codes, scales, mins


def random_rows(rows: int, inputs: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.randn(rows, inputs // 32, 1, generator=generator).exp()
    return (magnitudes * torch.randn(rows, inputs // 32, 32, generator=generator)).flatten(1)


def values(weight: Weight) -> Tensor:
    """float64 [N, K] from the definition."""
    codes, scales, mins = (None if t is None else t.double() for t in weight)
    assert codes is not None
    assert scales is not None
    if mins is None:
        return scales.repeat_interleave(32, 1) * (codes - 128)
    return scales.repeat_interleave(32, 1) * codes + mins.repeat_interleave(32, 1)


def rounded(rows: Tensor) -> Tensor:
    """float64 [M, K]: each span of 256 as float32 scale times integer."""
    spans = []
    for span in rows.float().split(256, dim=1):
        largest = span.abs().amax(-1, keepdim=True)
        steps = torch.where(largest > 0, torch.full_like(largest, 2039) / largest, 0)
        spans.append(torch.round(span * steps).double() * (largest / 2039).double())
    return torch.cat(spans, 1)


def multiply(rows: Tensor, weight: Weight, prefill_rows: int = 0) -> Tensor:
    out = torch.full((len(rows), len(weight[0]) + 3), float("nan"), dtype=rows.dtype)[:, :-3]  # rows are not adjacent
    quantized_linear(rows, *packing.pack(*weight), out=out, prefill_rows=prefill_rows)
    return out


def prefill(rows: Tensor, weight: Weight) -> Tensor:
    return multiply(rows, weight, len(rows))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    context = build.forced_isa(request.param)
    try:
        context.__enter__()
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    context.__exit__(None, None, None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 16, 32), (1, 1, 64), (3, 40, 96), (8, 33, 576), (31, 100, 160), (600, 17, 64)]
)
def test_equals_the_definition(isa: str, bits: int, rows: int, outputs: int, inputs: int) -> None:
    x, weight = random_rows(rows, inputs), random_weight(outputs, inputs, bits)
    exact = rounded(x) @ values(weight).T
    size = rounded(x).abs() @ values(weight).abs().T  # what float32 rounding scales with
    assert ((multiply(x, weight) - exact).abs() <= 4e-7 * inputs**0.5 * size + 1e-30).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_do_not_saturate(isa: str, bits: int) -> None:
    """All codes at an end and all inputs at full scale: the largest sums that can occur."""
    x = torch.tensor([2039.0, -2039.0]).repeat(5)[:, None].repeat(1, 64)
    for code in (0, 2**bits - 1):
        codes = torch.full((16, 64), code, dtype=torch.uint8)
        scales, mins = torch.ones(16, 2).half(), torch.full((16, 2), -3.0).half()
        weight = (codes, scales, mins if bits == 4 else None)
        assert torch.equal(multiply(x, weight).double(), x.double() @ values(weight).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_are_read_and_written_rounded(isa: str, dtype: torch.dtype) -> None:
    x, weight = random_rows(5, 96).to(dtype), random_weight(20, 96, 4)
    assert torch.equal(multiply(x, weight, 3), multiply(x.float(), weight, 3).to(dtype))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), threads=st.integers(1, 4), bits=st.sampled_from([4, 8]), data=st.data())
def test_a_row_depends_on_its_kind_and_not_on_its_batch(
    rows: int, threads: int, bits: int, data: st.DataObject
) -> None:
    row, prefill_rows = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, rows))
    x, weight = random_rows(rows, 640), random_weight(48, 640, bits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = multiply(x, weight, prefill_rows)
    finally:
        torch.set_num_threads(before)
    alone = x[row : row + 1]
    assert torch.equal(together[row], (multiply if row < rows - prefill_rows else prefill)(alone, weight)[0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 33, 200, 600])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (100, 576), (33, 608), (1, 1536)])
def test_rows_of_a_prompt_equal_the_definition_in_bfloat16(bits: int, rows: int, outputs: int, inputs: int) -> None:
    x, weight = random_rows(rows, inputs), random_weight(outputs, inputs, bits)
    narrow, weights = x.bfloat16().double(), values(weight).float().bfloat16().double()
    try:
        with build.forced_isa("amx"):
            result = prefill(x, weight)
    except ValueError as error:
        pytest.skip(str(error))
    size = narrow.abs() @ weights.abs().T
    assert ((result - narrow @ weights.T).abs() <= 4e-7 * inputs**0.5 * size + 1e-30).all()


@pytest.mark.parametrize("name", ["vnni", "avx2", "baseline"])
def test_without_tiles_rows_of_a_prompt_are_rows_like_others(name: str) -> None:
    x, weight = random_rows(20, 96), random_weight(40, 96, 4)
    try:
        with build.forced_isa(name):
            assert torch.equal(multiply(x, weight), prefill(x, weight))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("inputs", [32, 320, 544])  # 1, 2 and 3 spans, the last of 1, 2 and 1 groups
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["amx", "vnni", "avx2"])
def test_instruction_sets_with_fused_multiply_add_agree(name: str, bits: int, inputs: int) -> None:
    """Any number of rows has the bits that AVX2 gives each of them alone."""
    x, weight = random_rows(70, inputs), random_weight(40, inputs, bits)
    try:
        with build.forced_isa("avx2"):
            alone = torch.cat([multiply(row[None], weight) for row in x])
        with build.forced_isa(name):
            different = [rows for rows in range(1, 71) if not torch.equal(multiply(x[:rows], weight), alone[:rows])]
    except ValueError as error:
        pytest.skip(str(error))
    assert different == []


@pytest.mark.parametrize("prefill_rows", [0, 3])
def test_zeros_stay_zero_and_a_nan_stays_in_its_row(isa: str, prefill_rows: int) -> None:
    x = random_rows(3, 64)
    x[0], x[1, 40] = 0.0, torch.nan
    result = multiply(x, random_weight(16, 64, 4), prefill_rows)
    assert result[0].eq(0).all()
    assert result[1].isnan().all()
    assert result[2].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_lookup_gives_the_weights(isa: str, bits: int) -> None:
    weight = random_weight(37, 96, bits)
    packed, exact = packing.pack(*weight), values(weight)
    picked = torch.tensor([36, 0, 5, 5])
    assert torch.equal(packing.unpack_rows(*packed, picked), exact[picked].float())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_bytes_counts_what_is_packed(bits: int) -> None:
    packed = packing.pack(*random_weight(37, 96, bits))
    assert sum(t.nbytes for t in packed if t is not None) == packing.packed_bytes(37, 96, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_reference_is_the_same_operator(bits: int) -> None:
    x, weight = random_rows(4, 96), random_weight(20, 96, bits)
    out = torch.empty(4, 20)
    reference.quantized_linear(x, *packing.pack(*weight), out)
    torch.testing.assert_close(multiply(x, weight), out, rtol=1e-5, atol=1e-5)


def test_wrong_tensors_are_refused_by_name() -> None:
    x, (codes, scales, mins) = torch.ones(2, 64), packing.pack(*random_weight(16, 64, 4))
    out = torch.empty(2, 16)
    for arguments, name in [
        ((x[:, :32], codes, scales, mins, out), "input"),
        ((x.double(), codes, scales, mins, out.double()), "input"),
        ((x, codes.int(), scales, mins, out), "codes"),
        ((x, codes, scales, None, out), "codes"),
        ((x, codes, scales[:, :1], mins, out), "scales"),
        ((x, codes, scales, scales.float(), out), "mins"),
        ((x, codes, scales, mins, torch.empty(2, 17)), "out"),
        ((x, codes, scales, mins, out.bfloat16()), "out"),
    ]:
        with pytest.raises(ValueError, match=name):
            quantized_linear(*arguments[:4], out=arguments[4])
    for prefill_rows in (-1, 3):
        with pytest.raises(ValueError, match="prefill_rows"):
            quantized_linear(x, codes, scales, mins, out=out, prefill_rows=prefill_rows)
    with pytest.raises(ValueError, match="multiple of 32"):
        packing.pack(torch.zeros(16, 40, dtype=torch.uint8), torch.zeros(16, 1).half(), None)
