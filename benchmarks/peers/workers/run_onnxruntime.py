"""ONNX Runtime GenAI.

usage: run_onnxruntime.py MODEL_FOLDER THREADS
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime_genai as genai
from protocol import Jobs, Moments, must_be_one_static_batch, serve


class Model:
    def __init__(self, folder: str, threads: int) -> None:
        config = genai.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = genai.Model(config)

    def run(self, jobs: Jobs) -> Moments:
        must_be_one_static_batch(jobs)
        begun = time.perf_counter()
        tokens = jobs[0]["new_tokens"]
        length = len(jobs[0]["prompt"]) + tokens
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(jobs))
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([job["prompt"] for job in jobs], dtype=np.int32))
        moments = []
        for _ in range(tokens):
            generator.generate_next_token()
            moments.append(time.perf_counter() - begun)
        return [moments] * len(jobs)


if __name__ == "__main__":
    serve(Model(sys.argv[1], int(sys.argv[2])).run)
