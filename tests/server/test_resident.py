"""What the start touched of libraries' code is not kept resident, and is there when it is run again."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pagestream.server.resident import release_code


def test_code_leaves_the_resident_set_and_comes_back() -> None:
    before = resident_code()
    release_code()
    assert resident_code() < before / 2
    assert torch.arange(100).double().square().sum().item() == 328350


def resident_code() -> int:
    """Kilobytes of files' code in this process's resident set."""
    smaps = Path("/proc/self/smaps").read_text()
    return sum(map(int, re.findall(r"(?m)^\S+ r-xp .*(?:\n[A-Z].*)*?\nRss: +(\d+) kB", smaps)))
