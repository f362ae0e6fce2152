"""What the decoder's observer says of a row is float64's, and would not be if one line of it were wrong: all mistakes
are compiled in at once, and one of them is chosen at run time."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pagestream.kernels.summary import BANDS, FIELDS
from tests.kernels.oracle import compare
from tests.model import attention_oracle as oracle

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
LAYERS, HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE, GROUPS = 4, 6, 2, 24, 16, 3
CHUNKS = [(1, 300), (5, 130), (3, 77)]  # new rows, context
OBSERVED = [(0, 0, 1), (3, 1, -1), (7, 2, 0)]  # row of the batch, sequence, place of its pages
SPANS = [(0, 0, 1), (0, 9, 70), (0, 40, 290), (2, 0, 30), (2, 9, 76)]  # place in OBSERVED, begin, end
CASES = {"float32": (0, False), "a window": (70, False), "int8": (0, True), "int8, a window": (70, True)}
MISTAKES = {  # file, what it says, what it is to say instead; statements end in a semicolon
    "tiles keep their own shifts": ("observe.h", "exp2(shifts[j / kTile] - m)", "1.0f"),
    "shares are of the largest weight": (
        "observe.h",
        "normalize(shares, shifts, begin / kTile * kTile, n, stats[2]);",
        "normalize(shares, shifts, begin / kTile * kTile, n, 1);",
    ),
    "a row takes another's weights": ("observe.h", "int64_t{o.observed}", "int64_t{0}"),
    "bands lose their first key": ("observe.h", "(key >= j)", "(key > j)"),
    "bands lose their last key": ("observe.h", "(key < end)", "(key < end - 1)"),
    "bands are counted from the far end": ("observe.h", "record.bands[band]", "record.bands[kBands - 1 - band]"),
    "position 0 counts in the distance": ("observe.h", "record.first * log2_counts[0]", "0.0f"),
    "pages lose their last key": ("observe.h", "(page + 1) * p.page_size", "(page + 1) * p.page_size - 1"),
    "the recent mass is the sink's": ("observe.h", "stats[4]", "stats[3]"),
    "codes of int8 values have no scale": ("observe.h", "shares[j] * *scale++", "shares[j]"),
    "heads of a group share its first one's weights": (
        "observe.h",
        "p.weights + head * p.weight_stride",
        "p.weights + head / group_size(p) * group_size(p) * p.weight_stride",
    ),
    "a span begins with the context": ("observe.h", "max(begin, span.begin)", "begin"),
    "a span's part is not relative": ("observe.h", "square > 0 ? product / square : 0", "product"),
    "a span's part is of another row's output": ("observe.h", "o.row.row * p.out_token_stride", "int64_t{0}"),
    "a span's part is of another KV head's output": (
        "observe.h",
        "o.head * p.out_head_stride",
        "o.head % group_size(p) * p.out_head_stride",
    ),
    "a chunk's row sees the rows after it": (
        "observer.cpp",
        "p.context_lengths[row.sequence] - p.query_starts[row.sequence + 1] + row.row + 1",
        "p.context_lengths[row.sequence]",
    ),
    "heads write over each other": ("observer.cpp", "unit % heads", "int64_t{0}"),
    "pages are of the last layer": (
        "observer.cpp",
        "row.pages * num_layers_ + layer",
        "(row.pages + 1) * num_layers_ - 1",
    ),
    "spans are of the first row": ("observer.cpp", "o_.spans + span", "o_.spans"),
    "layers write over each other's spans": ("observer.cpp", "span * num_layers_ + layer", "span * num_layers_"),
    "layer groups are cut unevenly": ("observer.cpp", "layer * o_.num_groups / num_layers_", "layer / 2"),
    "the least entropy is the largest": (
        "observer.cpp",
        "std::min(sums.entropy_min, r.entropy)",
        "std::max(sums.entropy_min, r.entropy)",
    ),
    "heads with nothing beside position 0 count": ("observer.cpp", "rest <= kLeastRest", "rest <= 0"),
    "the rest is not renormalised": ("observer.cpp", "rest * std::log(rest)", "0.0f"),
    "the rest keeps the entropy of position 0": (
        "observer.cpp",
        "r.first > 0 ? -r.first * std::log(r.first) : 0",
        "0.0f",
    ),
    "distances are not renormalised": ("observer.cpp", "r.log2_distance / rest", "r.log2_distance"),
    "the rest is divided by all heads": ("observer.cpp", "std::max(1.0f, sums.rest_heads)", "sums.heads"),
    "bands are sums": ("observer.cpp", "for (float& sum : sums.bands) sum /= sums.heads;", ";"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """Random queries [L, T, Hq, D] and a cache [L, P, Hkv, 2, B, D] with poison where nobody's slots are."""

    query: Tensor
    storage: Tensor
    scales: Tensor
    tables: Tensor
    window: int

    def context(self, sequence: int, part: int, layer: int) -> np.ndarray:
        """Keys (0) or values (1) as stored, float64 [Hkv, n, D]."""
        pages = self.tables[sequence, : -(-CHUNKS[sequence][1] // PAGE_SIZE)].long()
        rows = self.storage[layer, pages, :, part].double()
        if self.storage.dtype == torch.int8:
            rows = rows * self.scales[layer, pages, :, part, :, None].double()
        return rows.transpose(0, 1).flatten(1, 2).numpy()


def make_step(window: int, *, int8: bool) -> Step:
    chance = torch.Generator().manual_seed(5)
    counts = [-(-n // PAGE_SIZE) for _, n in CHUNKS]
    rows = torch.randn(LAYERS, sum(counts) + 2, KV_HEADS, 2, PAGE_SIZE, HEAD_SIZE, generator=chance)
    query = 2 * torch.randn(LAYERS, sum(t for t, _ in CHUNKS), HEADS, HEAD_SIZE, generator=chance)
    ids = torch.randperm(rows.shape[1], generator=chance).int()
    tables = torch.full((len(CHUNKS), max(counts) + 1), -1, dtype=torch.int32)
    for table, pages in zip(tables, ids.split([*counts, 2])[:-1], strict=True):
        table[: len(pages)] = pages
    for sequence, (row, head) in {0: (0, 4), 2: (7, 1)}.items():  # a head that sees the first token alone
        q = query[2, row, head]
        rows[2, tables[sequence, 0], head // (HEADS // KV_HEADS), 0, 0] = q * (16 * HEAD_SIZE**0.5 / (q @ q))
    scales = rows.abs().amax(-1) / 127
    storage = (rows / scales[..., None]).round().to(torch.int8) if int8 else rows
    for (_, n), table in zip(CHUNKS, tables, strict=True):
        if n % PAGE_SIZE:
            (rows if not int8 else scales)[:, table[n // PAGE_SIZE], :, :, n % PAGE_SIZE :] = torch.nan
    return Step(query, storage, scales, tables, window)


class Program:
    """observed_layers.cpp with the kernels' source, in which mistakes wait to be chosen."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++")
        csrc = shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cuda"))
        for number, (file, right, wrong) in enumerate(MISTAKES.values(), 1):
            source = (csrc / file).read_text()
            assert source.count(right) == 1, right
            (csrc / file).write_text(source.replace(right, planted(number, right, wrong)))
        sources = [csrc / f"{name}.cpp" for name in ("attention", "observer", "operators", "thread_pool")]
        flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-pthread", "-DPAGESTREAM_ISA=attention_kernel"]
        flags += ["-msse4.2"] if platform.machine() == "x86_64" else []
        (csrc / "planted.h").write_text('extern "C" int planted;\n')
        flags += ["-include", str(csrc / "planted.h"), f"-I{csrc}"]
        main = Path(__file__).with_name("observed_layers.cpp")
        subprocess.run([compiler, *flags, main, *sources, "-o", folder / "program.so"], check=True)
        self._library = ctypes.CDLL(str(folder / "program.so"))

    def observe(self, step: Step, mistake: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means, page masses and span shares as summary.Observation has them."""
        ctypes.c_int.in_dll(self._library, "planted").value = mistake
        max_pages, page_rows = step.tables.shape[1], 2
        sizes = [step.query.shape[1], len(CHUNKS), HEADS, KV_HEADS, HEAD_SIZE, step.storage.shape[1], PAGE_SIZE]
        sizes += [max_pages, LAYERS, len(OBSERVED), len(SPANS), GROUPS, page_rows, step.window]
        starts, lengths = np.cumsum([0, *(t for t, _ in CHUNKS)]), [n for _, n in CHUNKS]
        results = (
            torch.full((len(OBSERVED), GROUPS, len(FIELDS) + BANDS), torch.nan),
            torch.zeros(page_rows, LAYERS, HEADS, 1 + max_pages),
            torch.full((len(SPANS), LAYERS, HEADS, 2), torch.nan),
        )
        indices = [torch.tensor(x, dtype=torch.int32) for x in (starts, lengths, OBSERVED, SPANS)]
        tensors = (step.query, step.storage, step.scales, step.tables, *indices, *results)
        arguments = [torch.tensor([*sizes, step.storage.dtype == torch.int8]), *tensors]
        self._library.observe_layers(*(ctypes.c_void_p(t.data_ptr()) for t in arguments))
        return results


def planted(number: int, right: str, wrong: str) -> str:
    """C++ that is `right` unless this mistake is chosen."""
    if right.endswith(";"):
        return f"if (planted == {number}) {wrong} else {right}"
    return f"(planted == {number} ? {wrong} : ({right}))"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(tmp_path_factory.mktemp("observer"))


def check(program: Program, case: str, mistake: int = 0) -> None:
    """Raises AssertionError where anything differs from float64."""
    window, int8 = CASES[case]
    step = make_step(window, int8=int8)
    means, page_masses, span_shares = program.observe(step, mistake)
    for place, (row, sequence, pages) in enumerate(OBSERVED):
        (new, length), first_row = CHUNKS[sequence], sum(t for t, _ in CHUNKS[:sequence])
        n = length - new + row - first_row + 1
        keys, values = ([step.context(sequence, part, layer)[:, :n] for layer in range(LAYERS)] for part in (0, 1))
        queries = step.query[:, row].double().numpy()
        layers = [oracle.shares(q, k, window or None) for q, k in zip(queries, keys, strict=True)]
        for group, of_layers in enumerate((layers[:2], layers[2:3], layers[3:])):
            expected = [*named(oracle.group(of_layers)), *oracle.bands(of_layers)]
            compare(f"group {group} of row {place}", means[place, group], expected, 1e-4)
        if pages >= 0:
            expected = [np.add.reduceat(p, np.arange(0, n, PAGE_SIZE), axis=-1) for p in layers]
            found = page_masses[pages, :, :, 1 : 1 + -(-n // PAGE_SIZE)]
            compare(f"pages of row {place}", found, expected, 1e-5)
            compare(f"first position of row {place}", page_masses[pages, :, :, 0], [p[:, 0] for p in layers], 1e-5)
        for index, (of, begin, end) in enumerate(SPANS):
            if of == place:
                compare(f"span {index}", span_shares[index], shares_of(layers, values, begin, end), 1e-4)


def named(group: dict[str, float]) -> list[float]:
    return [group[{"sink": "sink_mass", "recent": "recent_mass"}.get(name, name)] for name in FIELDS]


def shares_of(layers: list[np.ndarray], values: list[np.ndarray], begin: int, end: int) -> np.ndarray:
    """[L, Hq, 2]: mass on a span, and its share of the head's output."""
    found = []
    for p, v in zip(layers, values, strict=True):
        of_head = np.repeat(v, HEADS // KV_HEADS, axis=0)  # [Hq, n, D]
        out, part = (np.einsum("hn,hnd->hd", p[:, at], of_head[:, at]) for at in (slice(None), slice(begin, end)))
        found.append(np.stack([p[:, begin:end].sum(-1), (part * out).sum(-1) / (out * out).sum(-1)], -1))
    return np.array(found)


@pytest.mark.parametrize("case", CASES)
def test_equals_float64(program: Program, case: str) -> None:
    check(program, case)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(program: Program, mistake: str) -> None:
    with pytest.raises(AssertionError):  # noqa: PT012  # one of the cases is enough
        for case in CASES:
            check(program, case, 1 + list(MISTAKES).index(mistake))
