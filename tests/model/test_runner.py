"""The runner as the engine uses it: greedy and seeded requests over shared pages, in any batch, chunking and order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache, bytes_per_token
from pagestream.model.runner import Runner
from pagestream.model.sampling import NonFiniteLogitsError
from pagestream.model.step import Chunk, SamplingParams, StepPlan, StepResult
from pagestream.model.weights import build_weights, expected_tensors

CPU = torch.device("cpu")
PAGE_SIZE = 16
NUM_PAGES = 40
NUM_NEW = 12
CURSED_TOKEN = 96  # its embedding is NaN
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position=512,
    rope_theta=10_000.0,
)
NEVER_CURSED = {CURSED_TOKEN: -100.0}
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=1.0, logit_bias=NEVER_CURSED, seed=1),
    SamplingParams(temperature=0.8, top_k=10, top_p=0.9, repetition_penalty=1.2, logit_bias=NEVER_CURSED, seed=2),
    SamplingParams(temperature=1.3, min_p=0.05, frequency_penalty=0.5, logit_bias=NEVER_CURSED, logprobs=2, seed=3),
)


def make_runner() -> Runner:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in expected_tensors(CONFIG).items()}
    tensors["model.embed_tokens.weight"][CURSED_TOKEN] = torch.nan
    tensors["lm_head.weight"][CURSED_TOKEN] = 0.0
    cache = KVCache(CONFIG, NUM_PAGES, PAGE_SIZE, torch.float32, CPU)
    for layer in cache.layers:
        for part in layer:
            part.fill_(torch.nan)
    return Runner(CONFIG, build_weights(CONFIG, tensors.__getitem__, torch.float32, CPU), cache)


@pytest.fixture
def runner() -> Runner:
    return make_runner()


@dataclass
class Stream:
    """A request as the scheduler keeps it."""

    name: str
    tokens: list[int]
    sampling: SamplingParams
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) - self.num_prompt >= NUM_NEW

    @property
    def is_prefill(self) -> bool:
        return self.computed < self.num_prompt

    @property
    def left(self) -> int:
        """What one chunk may compute."""
        return (self.num_prompt if self.is_prefill else len(self.tokens)) - self.computed

    def chunk(self, length: int, free: list[int]) -> Chunk:
        while len(self.blocks) * PAGE_SIZE < self.computed + length:
            self.blocks.append(free.pop())
        return Chunk(self.name, self.tokens, self.num_prompt, self.computed, length, self.blocks, self.sampling)


def streams() -> list[Stream]:
    random = np.random.default_rng(0)
    sizes = (1, 16, 33, 50)
    return [
        Stream(f"request {i}", random.integers(CURSED_TOKEN, size=size).tolist(), sampling)
        for i, (size, sampling) in enumerate(zip(sizes, SAMPLINGS, strict=True))
    ]


def advance(runner: Runner, running: list[Stream], lengths: list[int], free: list[int]) -> StepResult:
    chunks = tuple(stream.chunk(length, free) for stream, length in zip(running, lengths, strict=True))
    result = runner.step(StepPlan(chunks))
    for stream, length, tokens in zip(running, lengths, result.sampled, strict=True):
        stream.computed += length
        assert len(tokens) == (stream.computed == len(stream.tokens))
        stream.tokens += [token.token_id for token in tokens]
    return result


def answers_alone(runner: Runner) -> list[list[int]]:
    answers = []
    for stream in streams():
        free = list(range(NUM_PAGES))
        while not stream.is_done:
            advance(runner, [stream], [stream.left], free)
        answers.append(stream.tokens)
    return answers


@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_batch_chunks_pages_or_preemption(runner: Runner, seed: int) -> None:
    random = np.random.default_rng(seed)
    free = random.permutation(NUM_PAGES).tolist()
    all_streams, preemptions = streams(), 0
    while running := [stream for stream in all_streams if not stream.is_done]:
        chosen = [stream for stream in running if random.random() < 0.8]
        if not chosen:
            continue
        if random.random() < 0.3:
            victim = chosen.pop()
            free += victim.blocks
            victim.blocks, victim.computed, preemptions = [], 0, preemptions + 1
        chosen.sort(key=lambda stream: stream.is_prefill)
        lengths = [int(random.integers(1, min(stream.left, 20) + 1)) for stream in chosen]
        if chosen:
            advance(runner, chosen, lengths, free)
    assert preemptions > 0
    assert [stream.tokens for stream in all_streams] == answers_alone(make_runner())


def test_a_step_can_be_repeated(runner: Runner) -> None:
    """The engine runs each chunk of a failed step again, alone."""
    free = list(range(NUM_PAGES))
    chunks = tuple(stream.chunk(len(stream.tokens), free) for stream in streams())
    first = runner.step(StepPlan(chunks))
    alone = [runner.step(StepPlan((chunk,))).sampled[0] for chunk in chunks]
    for (token,), (again,) in zip(first.sampled, alone, strict=True):
        assert token.token_id == again.token_id


def test_a_step_in_which_nothing_samples(runner: Runner) -> None:
    stream = streams()[3]
    assert runner.step(StepPlan((stream.chunk(20, [1, 2]),))) == StepResult(((),))


def test_a_poisoned_request_is_named_and_harms_no_other(runner: Runner) -> None:
    free = list(range(NUM_PAGES))
    good, bad = streams()[2], replace(streams()[1], name="poisoned", tokens=[1, CURSED_TOKEN, 2])
    plan = StepPlan((good.chunk(33, free), bad.chunk(3, free)))
    with pytest.raises(NonFiniteLogitsError) as caught:
        runner.step(plan)
    assert caught.value.request_id == "poisoned"
    free.append(good.blocks.pop())  # the last page is written anew
    while not good.is_done:
        advance(runner, [good], [len(good.tokens) - good.computed], free)
    assert good.tokens == answers_alone(make_runner())[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_bytes_per_token_is_what_the_cache_takes(dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, NUM_PAGES, PAGE_SIZE, dtype, CPU)
    parts = (*cache.layers, *cache.layer_scales)
    taken = sum(part.nbytes for layer in parts for part in layer if part is not None)
    assert taken == cache.storage.nbytes == NUM_PAGES * PAGE_SIZE * bytes_per_token(CONFIG, dtype)


def test_copied_pages_bring_their_scales() -> None:
    cache = KVCache(CONFIG, NUM_PAGES, PAGE_SIZE, torch.int8, CPU)
    cache.storage.random_(0, 127)
    cache.copy_pages([1, 2], [5, 0])
    for layer in (*cache.layers, *cache.layer_scales):
        for part in layer:
            assert part is not None
            assert torch.equal(part[[1, 2]], part[[5, 0]])


def test_keys_and_values_of_a_page_and_head_are_adjacent() -> None:
    (keys, values), _ = KVCache(CONFIG, NUM_PAGES, PAGE_SIZE, torch.float32, CPU).layers
    assert keys.shape == values.shape == (NUM_PAGES, CONFIG.num_kv_heads, PAGE_SIZE, CONFIG.head_dim)
    assert keys[3, 1].is_contiguous()
    assert values[3, 1].data_ptr() - keys[3, 1].data_ptr() == keys[3, 1].nbytes
