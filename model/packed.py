"""The matrices that stay quantised, packed for the kernels: packed once, and mapped from a file by later starts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from pagestream.kernels import packing
from pagestream.kernels.decoder import Part
from pagestream.kernels.packing import Packed
from pagestream.model.linear import pack_matrices
from pagestream.model.quantization import Bits, Groups

_CODE: Final = (Path(packing.__file__), *sorted(Path(__file__).parent.glob("*.py")))  # decides what is in a file
_ALIGNMENT: Final = 64  # bytes; a cache line, and the widest load of the kernels
_TYPES: Final = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}

_log = logging.getLogger(__name__)


class PackedMatrices:
    """Matrices of a checkpoint by name, in memory or mapped.

    A file is used if it was made from the same model files (path, size, time of change) for the same `bits` by the
    same code, and is complete; else it is made anew. It appears under its name when it is whole, so any number of
    servers may start at once. Where it cannot be written there is none.
    """

    def __init__(
        self,
        bits: Mapping[str, Bits],
        read: Callable[[str], Groups],
        sources: Sequence[Path],
        folder: Path | None,
    ) -> None:
        """`bits` names the matrices, `read` reads one of `sources`; without `folder` nothing is kept."""
        self.bits = bits
        self._read = read
        self._path, self._origin = None if folder is None else folder / _file_name(sources, bits), _origin(sources)
        self._mapped = {} if self._path is None else _map_file(self._path, self._origin)
        self._packed: dict[str, list[Part]] = {}

    def load(self, names: Sequence[str]) -> list[Part]:
        """The named matrices one under the other. Always the same names together."""
        parts = self._mapped.get(names[0])
        if parts is None:
            parts = self._packed[names[0]] = pack_matrices([self._read(name) for name in names])
        return parts

    def keep(self) -> None:
        """Writes what had to be packed for the next start."""
        if self._path is None or not self._packed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as aside:
                whole = Path(aside) / self._path.name
                _write_file(whole, self._origin, self._packed)
                whole.replace(self._path)
        except OSError as error:
            _log.info("packed weights are not kept for the next start: %s", error)
        else:
            _log.info("packed weights are kept in %s for the next start", self._path)


def _file_name(sources: Sequence[Path], bits: Mapping[str, Bits]) -> str:
    """One file for a model and choice of bits: made anew, it takes the place of the old one."""
    paths = [str(path.resolve()) for path in sources]
    digest = hashlib.sha256(repr((paths, sorted(bits.items()))).encode()).hexdigest()
    return f"{sources[0].stem}-{digest[:12]}.safetensors"


def _origin(sources: Sequence[Path]) -> str:
    states = [path.stat() for path in sources]
    digest = hashlib.sha256(repr([(state.st_size, state.st_mtime_ns) for state in states]).encode())
    for path in _CODE:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _map_file(path: Path, origin: str) -> dict[str, list[Part]]:
    """Empty if there is no such file, or one that is incomplete or of another origin."""
    matrices: dict[str, list[Part]] = {}
    try:
        file: Any = safe_open(path, framework="pt")
        header = json.loads(file.metadata()["pagestream"])
        if header["origin"] == origin:
            for name, outputs in header["matrices"].items():
                matrices[name] = [_map_matrix(file, f"{name}/{i}/", rows) for i, rows in enumerate(outputs)]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):  # absent, damaged, or somebody else's
        return {}
    return matrices


def _map_matrix(file: Any, prefix: str, outputs: int) -> Part:
    held = set(file.keys())
    tensors: Any = (file.get_tensor(prefix + field) if prefix + field in held else None for field in Packed._fields)
    return Part(Packed(*tensors), outputs)


def _write_file(path: Path, origin: str, matrices: Mapping[str, Sequence[Part]]) -> None:
    """A safetensors file. The library's own writer copies all tensors in memory and aligns none."""
    tensors = {
        f"{name}/{index}/{field}": tensor
        for name, parts in matrices.items()
        for index, part in enumerate(parts)
        for field, tensor in part.packed._asdict().items()
        if tensor is not None
    }
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].nbytes % _ALIGNMENT))  # the even sizes first
    outputs = {name: [part.outputs for part in parts] for name, parts in matrices.items()}
    header: dict[str, Any] = {"__metadata__": {"pagestream": json.dumps({"origin": origin, "matrices": outputs})}}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())  # before it gets its name: a file of the right size must not hold zeros after a crash
