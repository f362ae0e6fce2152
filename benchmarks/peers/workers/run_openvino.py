"""OpenVINO GenAI's continuous batching pipeline, driven as a server would drive it.

usage: run_openvino.py MODEL_FOLDER THREADS
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Jobs, Moments, serve

CACHE_GB = 2  # of keys and values: 16 requests of 2,112 tokens and more


class Pipeline:
    def __init__(self, folder: str, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._ids = itertools.count()

    def run(self, jobs: Jobs) -> Moments:
        begun = time.perf_counter()
        moments: Moments = [[] for _ in jobs]
        waiting = sorted(range(len(jobs)), key=lambda index: jobs[index]["at"])
        running: dict[int, Any] = {}
        while waiting or any(not jobs[index]["background"] for index in running):
            while waiting and jobs[waiting[0]]["at"] <= time.perf_counter() - begun:
                index = waiting.pop(0)
                running[index] = self._add(jobs[index])
            if running:
                self._step(begun, running, moments)
        for handle in running.values():
            handle.stop()
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return moments

    def _add(self, job: dict[str, Any]) -> Any:
        config = genai.GenerationConfig(max_new_tokens=job["new_tokens"], ignore_eos=True, do_sample=False)
        return self._pipeline.add_request(next(self._ids), ov.Tensor(np.array([job["prompt"]], dtype=np.int64)), config)

    def _step(self, begun: float, running: dict[int, Any], moments: Moments) -> None:
        self._pipeline.step()
        now = time.perf_counter() - begun
        for index, handle in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    moments[index].extend([now] * len(output.generated_ids))
            if str(handle.get_status()) != str(genai.GenerationStatus.RUNNING):
                del running[index]


if __name__ == "__main__":
    serve(Pipeline(sys.argv[1], int(sys.argv[2])).run)
