"""What the start touched of libraries' code is not kept resident, and is there when it is run again."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import torch

from pagestream.server.resident import release_code


def test_code_leaves_the_resident_set_and_comes_back() -> None:
    before = resident_code()
    release_code()
    assert resident_code() < before / 2
    assert torch.arange(100).double().square().sum().item() == 328350


def test_code_that_was_changed_stays(tmp_path: Path) -> None:
    """As by a debugger or a probe, which put an instruction of theirs into a page: no file has it."""
    path = tmp_path / "code"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file:
        code = mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    code[0] = 0xCC
    address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC) == 0
    release_code()
    assert code[0] == 0xCC


def resident_code() -> int:
    """Kilobytes of files' code in this process's resident set."""
    smaps = Path("/proc/self/smaps").read_text()
    return sum(map(int, re.findall(r"(?m)^\S+ r-xp .*(?:\n[A-Z].*)*?\nRss: +(\d+) kB", smaps)))
