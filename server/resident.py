"""What loading leaves in memory and serving does not need."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from pathlib import Path

_CODE = re.compile(r"(?m)^(\w+)-(\w+) r-xp .* /.*\n(?:[A-Z].*\n)*?Anonymous: +0 kB$")  # unchanged, so a file has it all


def release_code() -> None:
    """Takes the code of all libraries out of this process's resident set: loading runs through most of it once, of
    torch's alone 60 MB, in which hardly anything is run again. What is comes back from the page cache, 64 KiB at a
    time; the kernel may have the rest as soon as memory is short.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with contextlib.suppress(OSError):  # a sandbox without it serves all the same
        for begin, end in _CODE.findall(Path("/proc/self/smaps").read_text()):
            madvise(int(begin, 16), int(end, 16) - int(begin, 16), mmap.MADV_DONTNEED)
