"""What loading leaves in memory and serving does not need."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path


def release_code() -> None:
    """Takes the code of all libraries out of this process's resident set: loading runs through most of it once, of
    torch's alone 60 MB, in which hardly anything is run again. What is comes back from the page cache, 64 KiB at a
    time; the kernel may have the rest as soon as memory is short. Code is never written to, so nothing is lost.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _offset, _device, inode = line.split()[:5]
        if permissions == "r-xp" and inode != "0":  # of a file
            begin, end = (int(address, 16) for address in addresses.split("-"))
            madvise(begin, end - begin, mmap.MADV_DONTNEED)
