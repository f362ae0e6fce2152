"""Which changes `compare` sees, and what it tells its caller."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner, Result

from pagestream.loadtest.cli import app
from pagestream.loadtest.compare import compare_runs
from pagestream.loadtest.record import Record


def write_run(folder: Path, *, slower: float = 1.0, requests: int = 60, seed: int = 1, noise: int = 0) -> Path:
    """A run whose first tokens take 10 to 1,000 ms, much the same for a request in every run, times `slower`."""
    folder.mkdir()
    plan = {"shape": "fixed", "faults": "", "seed": seed}
    (folder / "manifest.json").write_text(json.dumps({"plan": plan}))
    lines = []
    for session in range(requests):
        own, each = Random(f"{seed} {session}"), Random(f"{noise} {session}")
        first = 0.01 * 100 ** own.random() * slower * each.uniform(0.98, 1.02)
        record = Record(session, 0, "", 100, 3, scheduled=0.0, sent=0.0, outcome="ok", output_tokens=3)
        record.tokens = [first, first + 0.01, first + 0.02]
        record.ended = record.tokens[-1]
        lines.append(record.to_json())
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.mark.parametrize(("slower", "code"), [(1.0, 0), (0.5, 0), (1.05, 0), (1.5, 1)])
def test_the_exit_code_says_whether_it_got_worse(tmp_path: Path, slower: float, code: int) -> None:
    before = write_run(tmp_path / "before")
    after = write_run(tmp_path / "after", slower=slower, noise=1)
    result = compare(before, after, "--out", tmp_path / "out.json")
    assert result.exit_code == code, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    (median,) = [row for row in rows if (row["measure"], row["quantile"]) == ("ttft", "p50")]
    assert median["ratio"]["lower"] <= slower * 1.02
    assert median["ratio"]["upper"] >= slower * 0.98
    assert {row["measure"] for row in rows if row["regressed"]} <= {"ttft", "e2e"}


def test_pairs_show_what_independent_samples_hide(tmp_path: Path) -> None:
    """A fifth slower, among requests that differ a hundredfold."""
    before, after = write_run(tmp_path / "before"), write_run(tmp_path / "after", slower=1.2, noise=1)
    paired = compare_runs(before, after, 0.1)
    (after / "manifest.json").write_text(json.dumps({"plan": {"shape": "fixed", "faults": "", "seed": 2}}))
    unpaired = compare_runs(before, after, 0.1)
    assert (paired.paired, unpaired.paired) == (True, False)
    widths = [each.rows[0].ratio.upper - each.rows[0].ratio.lower for each in (paired, unpaired)]
    assert widths[0] < widths[1] / 5
    assert paired.regressions
    assert not unpaired.regressions


@pytest.mark.parametrize("broken", ["missing", "no manifest", "garbage", "too few"])
def test_bad_input_is_told_apart_from_a_regression(tmp_path: Path, broken: str) -> None:
    good = write_run(tmp_path / "good")
    other = tmp_path / "other"
    if broken != "missing":
        write_run(other, requests=3 if broken == "too few" else 60)
    if broken == "no manifest":
        (other / "manifest.json").unlink()
    if broken == "garbage":
        (other / "requests.jsonl").write_text("{}\n")
    assert compare(good, other).exit_code == 2
    assert compare(other, good).exit_code == 2
