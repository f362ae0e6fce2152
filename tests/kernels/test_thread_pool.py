"""The pool under ThreadSanitizer: every range once; several callers, more threads than cores, a fork."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pagestream.kernels import build

PROGRAM = r"""
#include <sys/wait.h>
#include <unistd.h>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>
#include "thread_pool.h"

// Plain memory, so that a range run twice, or not published to the caller, is a data race or a wrong sum.
bool covers_once(int64_t count, int64_t grain, int64_t threads) {
  std::vector<int> times(count);
  pagestream::parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
    if (begin % grain != 0) times[begin] += 100;
    for (int64_t i = begin; i < end; ++i) ++times[i];
  });
  for (int n : times) if (n != 1) return false;
  return true;
}

bool try_many(int seed, int calls) {
  std::mt19937 random(seed);
  for (int i = 0; i < calls; ++i) {
    if (!covers_once(random() % 200, 1 + random() % 20, 1 + random() % 6)) return false;
    if (i % 64 == 0) usleep(random() % 400);  // long enough for workers to fall asleep, or nearly
  }
  return true;
}

int main() {
  bool good = try_many(0, 3000);
  std::vector<std::thread> callers;
  std::vector<char> results(3);
  for (int i = 0; i < 3; ++i) callers.emplace_back([&results, i] { results[i] = try_many(i + 1, 1000); });
  for (auto& caller : callers) caller.join();
  for (char result : results) good = good && result;
  std::vector<char> inner(4);
  pagestream::parallel_for(4, 1, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inner[i] = covers_once(50, 3, 2);
  });
  for (char result : inner) good = good && result;
  const pid_t child = fork();
  if (child == 0) _exit(try_many(9, 300) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  puts(good && status == 0 ? "good" : "bad");
}
"""


def test_every_range_runs_once_and_is_published(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = Path(build.__file__).parent / "csrc"
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{sources}"]
    files = [str(tmp_path / "main.cpp"), str(sources / "thread_pool.cpp"), "-o", str(tmp_path / "main")]
    made = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    if "cannot find" in made.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert made.returncode == 0, made.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run(
        [tmp_path / "main"], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.stdout == "good\n", done.stderr
    assert "WARNING" not in done.stderr
