"""Packed weights: what a start leaves behind is what the next one maps, or it is made again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pagestream.kernels.decoder import Part
from pagestream.kernels.packing import pack, unpack_rows
from pagestream.model.packed import PackedMatrices
from pagestream.model.quantization import Bits, Groups, quantize

BITS: dict[str, Bits] = {"query": 4, "key": 4, "value": 8, "head": 8}
TOGETHER = (("query", "key", "value"), ("head",))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def matrices(seed: int = 0) -> dict[str, Groups]:
    generator = torch.Generator().manual_seed(seed)
    return {name: quantize(torch.randn(40, 64, generator=generator), bits) for name, bits in BITS.items()}


def start(source: Path, folder: Path | None, read: Callable[[str], Groups]) -> list[list[Part]]:
    """What a start of the server does."""
    packed = PackedMatrices(BITS, read, [source], folder)
    loaded = [packed.load(names) for names in TOGETHER]
    packed.keep()
    return loaded


def refuse(name: str) -> Groups:
    raise AssertionError(f"{name} was read again")


def is_same(ones: list[list[Part]], others: list[list[Part]]) -> bool:
    def flat(all_parts: list[list[Part]]) -> list[Any]:
        return [value for parts in all_parts for part in parts for value in (part.outputs, *part.packed)]

    pairs = list(zip(flat(ones), flat(others), strict=True))
    return all(torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def kept_file(folder: Path) -> Path:
    (path,) = folder.iterdir()  # nothing is left beside it either
    return path


def test_the_second_start_maps_the_same_bits_and_reads_nothing(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "packed"
    first = start(source, folder, matrices().__getitem__)
    second = start(source, folder, refuse)
    assert is_same(first, second)
    assert [part.outputs for part in second[0]] == [80, 40]  # equal bits are one matrix
    for _, part in ((parts, part) for parts in second for part in parts):
        assert part.packed.codes.data_ptr() % 64 == 0
    head = matrices()["head"]
    exact = unpack_rows(*pack(head.codes, head.scales, head.mins), torch.arange(40))
    assert torch.equal(unpack_rows(*second[1][0].packed, torch.arange(40)), exact)


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign", "header", "other safetensors"])
def test_a_damaged_or_foreign_file_is_made_anew(source: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "packed"
    first = start(source, folder, matrices().__getitem__)
    path = kept_file(folder)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes(
        {
            "empty": b"",
            "truncated": whole[:-1],
            "foreign": b"not a tensor in sight " * 100,
            "header": whole[:8] + bytes(length) + whole[8 + length :],
            "other safetensors": (2).to_bytes(8, "little") + b"{}",
        }[damage]
    )
    assert is_same(first, start(source, folder, matrices().__getitem__))
    assert kept_file(folder).read_bytes() == whole


def test_a_changed_model_takes_the_place_of_the_old(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    first = start(source, folder, matrices().__getitem__)
    source.write_bytes(b"weights of another")
    second = start(source, folder, matrices(seed=1).__getitem__)
    assert not is_same(first, second)
    assert is_same(second, start(source, folder, refuse))
    kept_file(folder)


def test_a_folder_that_cannot_be_written_means_no_file_and_no_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file, so that not even root makes folders in it")
    for _ in range(2):
        assert start(source, tmp_path / "occupied" / "packed", matrices().__getitem__)


def test_starts_at_the_same_time_do_not_disturb_each_other(source: Path, tmp_path: Path) -> None:
    folder, barrier = tmp_path / "packed", threading.Barrier(4)
    results: list[list[list[Part]]] = []

    def run() -> None:
        barrier.wait()
        results.append(start(source, folder, matrices().__getitem__))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = start(source, folder, refuse)
    assert len(results) == 4
    assert all(is_same(expected, result) for result in results)
    kept_file(folder)
