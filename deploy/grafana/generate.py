"""Writes the dashboards: python3 deploy/grafana/generate.py [FOLDER]. They are checked in; a test compares them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attention
import degradation
import engine
import overview

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    for module in (overview, degradation, attention, engine):
        text = json.dumps(module.DASHBOARD, indent=1, ensure_ascii=False)
        (folder / f"{module.__name__}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
