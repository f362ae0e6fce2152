"""Opens GGUF files with the `gguf` package. Import it late: only these files need the package."""

from __future__ import annotations

import sys
from array import array
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGUFReader, GGUFValueType

from pagestream.model.errors import ModelError


def open_gguf(path: Path) -> GGUFReader:
    """Raises ModelError for a file that is damaged, in the other byte order or split."""
    try:
        reader = _Reader(path)
    except (OSError, ValueError, LookupError, OverflowError) as error:
        raise ModelError(f"{path} cannot be read as GGUF, is it complete? ({error})") from error
    if reader.byte_order == "S":
        raise ModelError(f"{path} is written for machines of the other byte order")
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise ModelError(f"{path} is one part of several; join them with llama.cpp's gguf-split --merge")
    return reader


class _Reader(GGUFReader):
    """GGUFReader reads past the end of the file as empty arrays, loops over what a damaged length says, and makes two
    arrays of every string: most of a second and 150 MB for a vocabulary of 49,152 tokens.
    """

    data: Any  # a memmap until the first read

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends too early")
        self.data = self.data.view(np.ndarray)  # slicing a memmap takes three times as long
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Its bytes, its parts, which of them are values, and its types."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, length = GGUFValueType(self._get(orig_offs, np.uint32)[0]), self._get(orig_offs + 4, np.uint64)[0]
        begin = orig_offs + 12
        if item_type == GGUFValueType.STRING:
            strings = self._strings(begin, int(length))
            return strings.end - orig_offs, [strings], [0], [GGUFValueType.ARRAY]  # contents() is then their tolist()
        if item_type in self.gguf_scalar_to_np:
            values = self._get(begin, self.gguf_scalar_to_np[item_type], length)
            return begin - orig_offs + values.nbytes, [values], [0], [GGUFValueType.ARRAY, item_type]
        return super()._get_field_parts(orig_offs, raw_type)

    def _strings(self, end: int, length: int) -> _Strings:
        """`length` strings from `end` on."""
        data, begin, ends = memoryview(self.data), end, array("Q")
        swapped = self.byte_order == "S"
        order: Literal["little", "big"] = "little" if (sys.byteorder == "big") == swapped else "big"
        for _ in range(length):
            start = end + 8
            end = start + int.from_bytes(data[start - 8 : start], order)
            if end > len(data):
                raise ValueError("it ends too early")
            ends.append(end)
        return _Strings(data, begin, ends)


class _Strings:
    """Strings of the file behind each other, each after its length. They become objects when they are asked for: those
    of a vocabulary would take 20 MB for as long as the file is open.
    """

    def __init__(self, data: memoryview, begin: int, ends: array[int]) -> None:
        self._data, self._begin, self._ends = data, begin, ends

    @property
    def end(self) -> int:
        return self._ends[-1] if self._ends else self._begin

    def tolist(self) -> list[str]:
        starts = (before + 8 for before in chain((self._begin,), self._ends))
        return [str(self._data[start:end], "utf-8") for start, end in zip(starts, self._ends, strict=False)]
