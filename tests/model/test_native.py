"""The network in one call: against transformers, against PyTorch operations, and the bits it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pagestream import kernels
from pagestream.kernels import build, packing, reference
from pagestream.model import network as network_module
from pagestream.model.batch import Batch, build_batch
from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache
from pagestream.model.network import Network
from pagestream.model.packed import PackedMatrices
from pagestream.model.quantization import Bits, Groups, quantize
from pagestream.model.step import Chunk, SamplingParams, StepPlan
from pagestream.model.weights import Weights, build_weights, expected_tensors
from tests.model.test_network_matches_transformers import (
    CPU,
    OURS,
    PAGE_SIZE,
    SIZES,
    chunked_logits,
    poisoned_cache,
    randomised,
)

ISAS = ("amx", "vnni", "avx512", "avx2", "baseline")
LARGER = {**SIZES, "hidden_size": 64, "intermediate_size": 96}
BASE = replace(OURS, hidden_size=64, intermediate_size=96)
CASES: dict[str, tuple[Callable[[], PreTrainedModel], ModelConfig]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LARGER)), BASE),
    "llama, biases": (
        lambda: LlamaForCausalLM(LlamaConfig(**LARGER, attention_bias=True, mlp_bias=True)),
        replace(BASE, qkv_bias=True, output_bias=True, mlp_bias=True),
    ),
    "qwen2, window in the upper layers": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**LARGER, use_sliding_window=True, sliding_window=19, max_window_layers=1)
        ),
        replace(BASE, architecture="qwen2", qkv_bias=True, sliding_window=(None, 19, 19)),
    ),
    "qwen3, tied": (
        lambda: Qwen3ForCausalLM(Qwen3Config(**LARGER, tie_word_embeddings=True)),
        replace(BASE, architecture="qwen3", qk_norm=True, tie_word_embeddings=True),
    ),
    "mistral, window": (
        lambda: MistralForCausalLM(MistralConfig(**LARGER, sliding_window=7)),
        replace(BASE, architecture="mistral", sliding_window=(7,) * 3),
    ),
}


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if build.load().implementation != "cpp":
        pytest.skip(build.load().detail)


def bits_of(name: str) -> Bits:
    """Values beside 4-bit queries and keys in 8 bits, as llama.cpp's mixtures have them: a product in two parts."""
    return 4 if name.startswith("model.layers.") and "v_proj" not in name else 8


def bits_apart(name: str) -> Bits:
    """Gates in 4 bits beside what they multiply in 8, so that their product is in two parts as well."""
    return 8 if "up_proj" in name else bits_of(name)


def quantized(model: PreTrainedModel, config: ModelConfig, bits: Callable[[str], Bits] = bits_of) -> Weights:
    """The model's matrices in groups; the model itself gets the values that groups stand for."""
    state = model.state_dict()
    groups: dict[str, Groups] = {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2:
            packed = quantize(state[name], bits(name))
            state[name].copy_(values(packed))
            groups[name] = packed
    quantized = PackedMatrices(dict.fromkeys(groups, 8), groups.__getitem__, [], None)
    return build_weights(config, state.__getitem__, torch.float32, CPU, quantized=quantized)


def values(groups: Groups) -> torch.Tensor:
    scales = groups.scales.float().repeat_interleave(32, 1)
    if groups.mins is None:
        return scales * (groups.codes.float() - 128)
    return scales * groups.codes.float() + groups.mins.float().repeat_interleave(32, 1)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, ModelConfig, Weights]:
    make, config = CASES[request.param]
    model = randomised(make())
    return model, config, quantized(model, config)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    context = build.forced_isa(request.param)
    try:
        context.__enter__()
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    context.__exit__(None, None, None)


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Network]:
    """The network of PyTorch operations, with all kernels those of the reference; all but the head multiply the last
    `prefill_rows` rows in bfloat16."""

    def attention(
        *tensors: torch.Tensor, scale: float, window: int, out: torch.Tensor, **scales: torch.Tensor | None
    ) -> None:
        reference.paged_attention(*tensors, scale, window, out, None, None, **scales)

    def append(
        *tensors: torch.Tensor, norm_weight: torch.Tensor | None, epsilon: float, **scales: torch.Tensor | None
    ) -> None:
        reference.append_kv(*tensors[:3], norm_weight, epsilon, *tensors[3:], **scales)

    def linear(
        rows: torch.Tensor, *packed: torch.Tensor, out: torch.Tensor, prefill_rows: int = 0, vocabulary: int = 0
    ) -> None:
        reference.quantized_linear(rows, *packed, out)
        if prefill_rows and out.shape[1] != vocabulary:
            weight = packing.unpack_rows(*packed, torch.arange(out.shape[1])).bfloat16().double()
            out[-prefill_rows:] = (rows[-prefill_rows:].bfloat16().double() @ weight.T).float()

    def make(config: ModelConfig, weights: Weights, prefill_rows: int = 0) -> Network:
        with monkeypatch.context() as patch:
            patch.setattr(network_module, "native_decoder", lambda *_: None)
            network = Network(config, weights)
        monkeypatch.setattr(kernels, "paged_attention", attention)
        monkeypatch.setattr(kernels, "append_kv", append)
        kinds = {"prefill_rows": prefill_rows, "vocabulary": config.vocab_size}
        monkeypatch.setattr(kernels, "quantized_linear", partial(linear, **kinds))
        return network

    return make


def sequences_for(config: ModelConfig) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(config.vocab_size, size=size).tolist() for size in (1, 17, 45, 70)]


def all_logits(
    network: Network, config: ModelConfig, chunking: str = "whole", cache: KVCache | None = None
) -> list[torch.Tensor]:
    random = np.random.default_rng(1)

    def next_length(left: int) -> int:
        if chunking == "random":
            return int(random.integers(min(left, 20) + 1))
        return min(left, 1) if chunking == "token by token" else left

    sequences = sequences_for(config)
    return chunked_logits(network, cache or poisoned_cache(config), sequences, next_length, random)


def errors(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    """Of each row, relative."""
    difference = torch.cat(logits) - torch.cat(exact)
    return difference.norm(dim=1) / torch.cat(exact).norm(dim=1)


@pytest.mark.parametrize(("deterministic", "error"), [(True, 0.005), (False, 0.02)])  # 12 bits, 8 bits of bfloat16
def test_is_as_close_to_transformers_as_rounded_activations_are(
    case: tuple[PreTrainedModel, ModelConfig, Weights], deterministic: bool, error: float
) -> None:
    model, config, weights = case
    with torch.inference_mode():
        exact = [model(torch.tensor([tokens])).logits[0] for tokens in sequences_for(config)]
    network = Network(config, weights, deterministic=deterministic)
    assert errors(all_logits(network, config, "random"), exact).mean() < error


def test_equals_the_network_of_operations(
    case: tuple[PreTrainedModel, ModelConfig, Weights],
    isa: str,
    operations: Callable[[ModelConfig, Weights], Network],
) -> None:
    """To float32's precision, until sums in another order move an activation by one step of its 12 bits, which then
    reaches all rows that attend to it."""
    _, config, weights = case
    ours = all_logits(Network(config, weights, deterministic=True), config)
    apart = errors(ours, all_logits(operations(config, weights), config))
    assert apart[0] < 1e-5
    assert apart.lt(1e-5).float().mean() > 0.02
    assert apart.max() < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_narrow_caches(dtype: torch.dtype, operations: Callable[[ModelConfig, Weights], Network]) -> None:
    make, config = CASES["qwen3, tied"]
    weights = quantized(randomised(make()), config)
    ours = all_logits(Network(config, weights, deterministic=True), config, "random", poisoned_cache(config, dtype))
    theirs = all_logits(operations(config, weights), config, "random", poisoned_cache(config, dtype))
    one_code = 0.01  # a sum in another order may round an int8 value to its neighbour
    assert errors(ours, theirs)[0] < (1e-3 if dtype.is_floating_point else one_code)
    assert errors(ours, theirs).mean() < 0.006


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_prompts_over_narrow_caches(dtype: torch.dtype, operations: Callable[[ModelConfig, Weights], Network]) -> None:
    """AMX reads int8 for rows of prompts as bfloat16 and for others as integers."""
    make, config = CASES["llama"]
    weights = quantized(randomised(make()), config)
    network = Network(config, weights)
    whole, *others = (
        all_logits(network, config, chunking, poisoned_cache(config, dtype))
        for chunking in ("whole", "random", "token by token")
    )
    assert all(torch.equal(torch.cat(whole), torch.cat(other)) for other in others)
    theirs = all_logits(operations(config, weights), config, "whole", poisoned_cache(config, dtype))
    assert errors(whole, theirs).mean() < (0.02 if dtype.is_floating_point else 0.04)  # codes that go to a neighbour


def test_a_row_has_the_same_bits_in_any_chunks_batch_and_number_of_threads(
    case: tuple[PreTrainedModel, ModelConfig, Weights],
) -> None:
    _, config, weights = case
    network = Network(config, weights)
    before, results = torch.get_num_threads(), []
    try:
        for threads, chunking in [(1, "whole"), (2, "whole"), (3, "random"), (2, "random"), (2, "token by token")]:
            torch.set_num_threads(threads)
            results.append(torch.cat(all_logits(network, config, chunking)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.fixture(scope="module")
def llama() -> tuple[Network, ModelConfig]:
    make, config = CASES["llama"]
    return Network(config, quantized(randomised(make()), config)), config


def one_batch(config: ModelConfig) -> Batch:
    """Two decodes and a chunk after a context of 16."""
    tokens = [sequence * 40 for sequence in ([3], [5, 7], [11, 13])]
    steps = ((16, 1), (20, 1), (16, 20))
    chunks = tuple(
        Chunk(str(i), tokens[i], 1, start, length, range(4 * i, 4 * i + 4), SamplingParams())
        for i, (start, length) in enumerate(steps)
    )
    return replace(build_batch(StepPlan(chunks), PAGE_SIZE, CPU), sampled_rows=torch.arange(22))


def zeros(config: ModelConfig) -> KVCache:
    cache = poisoned_cache(config)
    cache.storage.zero_()
    return cache


@pytest.mark.parametrize(
    ("name", "bits"),
    [("qwen2, window in the upper layers", bits_of), ("llama, biases", bits_of), ("llama", bits_apart)],
)
def test_prompts_beside_answers_equal_the_network_of_operations(
    operations: Callable[..., Network], name: str, bits: Callable[[str], Bits]
) -> None:
    """Where gates are made on the way out of their product, and where a bias or a second part forbids it."""
    make, config = CASES[name]
    weights = quantized(randomised(make()), config, bits)
    batch = replace(one_batch(config), prefill_rows=20)
    try:
        with build.forced_isa("amx"):
            ours = Network(config, weights).outputs(batch, zeros(config)).logits
    except ValueError as error:
        pytest.skip(str(error))
    theirs = operations(config, weights, 20).outputs(batch, zeros(config)).logits
    apart = errors([ours], [theirs])
    assert apart[:2].max() < 0.005
    assert apart[2:].max() < 0.01
    assert apart[2:].lt(1e-5).float().mean() > 0.25  # the others attend to one that was rounded to its neighbour
    exact = operations(config, weights, 0).outputs(batch, zeros(config)).logits
    assert errors([exact], [theirs])[2:].min() > 1e-4


@pytest.mark.parametrize("rows", [[], [21], [0, 1], [1, 3, 20]])
def test_only_sampled_rows_have_logits_and_all_have_keys(llama: tuple[Network, ModelConfig], rows: list[int]) -> None:
    network, config = llama
    whole, some = zeros(config), zeros(config)
    batch = one_batch(config)
    exact = network.outputs(batch, whole).logits
    assert torch.equal(
        network.outputs(replace(batch, sampled_rows=torch.tensor(rows).long()), some).logits, exact[rows]
    )
    assert torch.equal(some.storage, whole.storage)


def test_wrong_steps_are_refused_by_name_before_anything_is_written(llama: tuple[Network, ModelConfig]) -> None:
    network, config = llama
    batch, cache = one_batch(config), poisoned_cache(config)

    def with_first(name: str, value: int) -> Batch:
        changed = getattr(batch, name).clone()
        changed.view(-1)[0] = value
        return replace(batch, **{name: changed})

    wrong = [
        (with_first("token_ids", config.vocab_size), "token_ids"),
        (with_first("token_ids", -1), "token_ids"),
        (with_first("slots", cache.num_pages * PAGE_SIZE), "slots"),
        (with_first("block_tables", cache.num_pages), "page id"),
        (with_first("context_lengths", 0), "sequence 0"),
        (with_first("query_starts", -1), "query_starts"),
        (with_first("sampled_rows", 5), "sampled_rows"),
        (replace(batch, sampled_rows=torch.tensor([22])), "sampled_rows"),
        (replace(batch, prefill_rows=23), "prefill_rows"),
        (replace(batch, positions=batch.positions[:-1]), "positions"),
        (replace(batch, token_ids=batch.token_ids.int()), "token_ids"),
        (replace(batch, context_lengths=batch.context_lengths.long()), "context_lengths"),
        (replace(batch, with_statistics=torch.ones(21, dtype=torch.bool)), "with_statistics"),
    ]
    for step, name in wrong:
        with pytest.raises(ValueError, match=name):
            network.outputs(step, cache)
    for other in (
        KVCache(replace(config, num_layers=2), 24, 16, torch.float32, CPU),
        KVCache(config, 9, 8, torch.float32, CPU),
    ):
        with pytest.raises(ValueError, match="caches"):
            network.outputs(batch, other)
    assert cache.rows.isnan().all()


def test_wrong_weights_are_refused_by_name() -> None:
    make, config = CASES["llama"]
    weights = quantized(randomised(make()), config)
    broken = replace(weights.layers[1], down=weights.layers[1].gate_up)
    with pytest.raises(ValueError, match="layer 1: down"):
        Network(config, replace(weights, layers=(weights.layers[0], broken, weights.layers[2])))
    with pytest.raises(ValueError, match="norm"):
        Network(config, replace(weights, norm=weights.norm.bfloat16()))


def test_dense_matrices_are_left_to_torch() -> None:
    make, config = CASES["llama"]
    state = randomised(make()).state_dict()
    assert Network(config, build_weights(config, state.__getitem__, torch.float32, CPU))._decoder is None
