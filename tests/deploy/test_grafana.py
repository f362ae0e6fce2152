"""The dashboards as files; what their queries return is tested in test_watching.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = sorted(path.stem for path in (GRAFANA / "dashboards").glob("*.json"))
NODE = ROOT / "build" / "node" / "node_modules"


def test_dashboards_are_those_that_the_code_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "generate.py", tmp_path], check=True, timeout=300)
    for name in DASHBOARDS:
        assert (tmp_path / f"{name}.json").read_bytes() == (GRAFANA / "dashboards" / f"{name}.json").read_bytes()
    assert len(DASHBOARDS) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_has_a_caveat_and_its_own_place(name: str) -> None:
    dashboard = json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["type"] in {"row", "text"} or len(panel["description"]) > 20, panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_dashboards_have_the_types_that_grafana_publishes(tmp_path: Path) -> None:
    if not (NODE / "@grafana" / "schema").exists():
        pytest.skip("no build/node (npm install --prefix build/node @grafana/schema@13.2.3 typescript@5.9.3)")
    (tmp_path / "node_modules").symlink_to(NODE)
    for name in DASHBOARDS:
        text = (GRAFANA / "dashboards" / f"{name}.json").read_text()
        text = text.replace(
            '"mode": "absolute"', '"mode": ThresholdsMode.Absolute'
        )  # the one enum that JSON cannot name
        head = 'import { ThresholdsMode, type Dashboard } from "@grafana/schema";\nexport const dashboard: Dashboard = '
        (tmp_path / f"{name}.ts").write_text(head + text)
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    files = [f"{name}.ts" for name in DASHBOARDS]
    tsc = subprocess.run(
        ["node", NODE / "typescript" / "bin" / "tsc", *options, *files],
        check=False, cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert tsc.returncode == 0, tsc.stdout
