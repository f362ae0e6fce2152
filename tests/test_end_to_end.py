"""Real servers in processes of their own, real models, real clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers
from google.protobuf.duration_pb2 import Duration

from pagestream.v1 import generation_pb2 as pb
from pagestream.v1 import model_pb2, tokenizer_pb2
from tests.support.client import SERVING, Client, gather, refusal_of, refused
from tests.support.process import ServerProcess
from tests.support.waiting import WAIT, wait_until

Serve = Callable[..., ServerProcess]
ONE_THREAD = ("--threads", "1")  # where other work runs beside it, threads that wait for each other are slow
SMALL_POOL = ("--page-size", "16", "--kv-memory", str(1024 * 2048))  # 1,024 tokens of 2 KiB
CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="The quick brown fox?")])


@pytest.fixture(scope="module")
def server(serve: Serve, tiny_model_path: Path) -> ServerProcess:
    """The tiny model with a pool of 1,024 tokens, a quarter of its context."""
    return serve(tiny_model_path, *ONE_THREAD, *SMALL_POOL, "--token-budget", "64")


@pytest.fixture
def client(server: ServerProcess) -> Any:
    client = server.connect()
    yield client
    client.close()
    server.wait_until_idle()  # whatever a test did, it leaves nothing behind


@pytest.fixture(scope="module")
def oracle(tiny_model_path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def oracle_tokenizer(tiny_model_path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_model_path)


def stop(max_tokens: int, **fields: Any) -> pb.StopConfig:
    return pb.StopConfig(max_tokens=max_tokens, **fields)


def test_answers_and_logprobs_are_those_of_transformers(client: Client, oracle: Any, oracle_tokenizer: Any) -> None:
    text = "The lazy café 🎉"
    fields: dict[str, Any] = {"text": text, "stop": stop(30, ignore_eos=True)}
    fields["output"] = pb.OutputConfig(token_ids=True, logprobs=5)
    answer = client.stream(**fields)
    prompt = oracle_tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = oracle(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    assert answer.token_ids == expected.argmax(dim=-1).tolist()
    for row, got in zip(expected, answer.logprobs, strict=True):
        assert got.logprob == pytest.approx(float(row[got.token_id]), abs=1e-4)
        top = row.topk(5)
        assert [entry.token_id for entry in got.top] == top.indices.tolist()
        assert [entry.logprob for entry in got.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert answer.text == oracle_tokenizer.decode(answer.token_ids, skip_special_tokens=True)

    whole = client.generate(**fields)
    assert (whole.text, list(whole.token_ids)) == (answer.text, answer.token_ids)
    got = [entry.logprob for entry in whole.logprobs]  # its prompt was in the cache: one row, other sums in fp32
    assert got == pytest.approx([entry.logprob for entry in answer.logprobs], abs=1e-4)


def test_each_of_several_answers_is_that_of_a_request_with_its_seed(client: Client) -> None:
    fields: dict[str, Any] = {"text": "The lazy café 🎉 " * 6, "stop": stop(20, ignore_eos=True)}
    fields["output"] = pb.OutputConfig(token_ids=True)
    seed = 2**64 - 2
    several = client.generate(**fields, n=4, sampling=pb.SamplingConfig(temperature=1.0, seed=seed))
    got = [list(several.token_ids), *(list(answer.token_ids) for answer in several.others)]
    alone = [
        list(client.generate(**fields, sampling=pb.SamplingConfig(temperature=1.0, seed=one % 2**64)).token_ids)
        for one in range(seed, seed + 4)
    ]
    assert got == alone
    assert len(set(map(tuple, got))) == 4
    greedy = client.generate(**fields, n=2)
    assert greedy.token_ids == greedy.others[0].token_ids


def test_sampling_settings_reach_the_model(client: Client) -> None:
    output = pb.OutputConfig(token_ids=True)

    def tokens(stop_: pb.StopConfig, **sampling: Any) -> list[int]:
        return client.stream(text="x", stop=stop_, output=output, sampling=pb.SamplingConfig(**sampling)).token_ids

    assert tokens(stop(4), logit_bias={77: 100}) == [77] * 4
    assert 77 in tokens(stop(4), logit_bias={77: 100}, frequency_penalty=2, repetition_penalty=2)
    seeded = [tokens(stop(20, ignore_eos=True), temperature=2, seed=seed) for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    end = client.models.GetModel(model_pb2.GetModelRequest(), timeout=WAIT).model.eos_token_ids[0]
    assert tokens(stop(20), logit_bias={end: 100}) == [end]
    assert tokens(stop(4, ignore_eos=True), logit_bias={end: 100}) == [end] * 4
    with_minimum = tokens(stop(20, min_tokens=5), logit_bias={end: 100})
    assert with_minimum.index(end) == len(with_minimum) - 1 >= 4
    assert tokens(stop(20, stop_token_ids=[77]), logit_bias={77: 100}) == [77]


def test_a_stop_string_cuts_the_real_models_text(client: Client) -> None:
    text = client.stream(text="dog", stop=stop(60, ignore_eos=True)).text
    for start in (3, 10, len(text) // 2):
        cut = text[start : start + 4]
        answer = client.stream(text="dog", stop=stop(60, ignore_eos=True, stop_strings=[cut]))
        assert answer.text == text[: text.index(cut)]
        assert answer.finished.matched_stop == cut


def test_a_chat_is_what_apply_template_says(client: Client, oracle_tokenizer: Any) -> None:
    rendered = client.tokenizer.ApplyTemplate(tokenizer_pb2.ApplyTemplateRequest(chat=CHAT), timeout=WAIT)
    messages = [{"role": message.role, "content": message.content} for message in CHAT.messages]
    assert rendered.text == oracle_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert list(rendered.token_ids) == oracle_tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    chat = client.stream(chat=CHAT, stop=stop(10))
    assert chat.text == client.stream(token_ids=pb.TokenIds(ids=rendered.token_ids), stop=stop(10)).text
    assert chat.accepted.prompt_tokens == len(rendered.token_ids)


def test_the_prompt_is_read_in_chunks_and_progress_says_so(client: Client) -> None:
    answer = client.stream(
        token_ids=pb.TokenIds(ids=[number % 300 for number in range(500)]),
        stop=stop(1),
        output=pb.OutputConfig(progress_interval=Duration()),
    )
    computed = [progress.computed_tokens for progress in answer.progress]
    assert computed == sorted(set(computed))
    assert computed
    assert set(computed) <= set(range(64, 500, 64))


def test_a_prompt_over_the_pool_fails_at_once_and_blocks_nobody(server: ServerProcess, client: Client) -> None:
    """At once: while an answer of hundreds of steps is still being made, as is the one behind it."""
    server.wait_for_log(r"longest request: 1024 tokens, not 4096")
    busy = client.open(text="busy", stop=stop(900, ignore_eos=True))
    next(busy)
    with ThreadPoolExecutor() as threads:
        rest = threads.submit(gather_rest, busy)
        behind = threads.submit(
            client.stream, token_ids=pb.TokenIds(ids=range(100, 116)), stop=stop(8, ignore_eos=True)
        )
        with refused("INVALID_ARGUMENT", "PROMPT_EXCEEDS_KV_CAPACITY"):
            client.stream(token_ids=pb.TokenIds(ids=[5] * 2048))
        assert behind.result(WAIT).finished.usage == pb.Usage(prompt_tokens=16, output_tokens=8)
        assert not rest.done()
        rest.result(WAIT)


def gather_rest(call: Any) -> None:
    assert [event.WhichOneof("event") for event in call][-1] == "finished"


def test_preempted_answers_are_those_given_alone(server: ServerProcess, client: Client) -> None:
    """Twelve answers of 150 tokens in a pool of 1,024."""
    prompts = [f"prompt {number}" for number in range(12)]

    def ask(number: int) -> str:
        settings = pb.SamplingConfig(temperature=0.8 * (number % 2), seed=number)
        return client.stream(text=prompts[number], stop=stop(150, ignore_eos=True), sampling=settings).text

    alone = [ask(number) for number in range(12)]
    before = server.metric("preemptions_total")
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == alone
    assert server.metric("preemptions_total") > before


def test_cancel_and_deadline_free_the_blocks(server: ServerProcess, client: Client) -> None:
    """Long before their answers would have ended, by the clock of an answer of 300 tokens on the same machine."""

    def released() -> tuple[float, float]:
        return server.metric("cancel_release_seconds_count"), server.metric("cancel_release_seconds_sum")

    started = time.monotonic()
    client.stream(text="x", stop=stop(300, ignore_eos=True))
    took = time.monotonic() - started
    (count, seconds), steps = released(), server.metric("step_seconds_count")
    leaving = client.open(text="x", stop=stop(1000, ignore_eos=True))
    next(leaving)
    leaving.cancel()
    with pytest.raises(grpc.RpcError) as error:
        gather(client.open(timeout=took, text="x", stop=stop(1000, ignore_eos=True)))
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: released()[0] == count + 2, "both are released")
    assert released()[1] - seconds < took
    server.wait_until_idle()
    assert server.metric("step_seconds_count") - steps < 1500


def test_health_answers_while_a_huge_text_is_tokenised(client: Client, server: ServerProcess) -> None:
    text = "The quick brown fox jumps over the lazy dog, doesn't it? " * 90_000  # 5 MB
    other, waits = server.connect(), []
    with ThreadPoolExecutor() as threads:
        huge = threads.submit(client.stream, text=text)
        while not huge.done():
            started = time.monotonic()
            assert other.health() == SERVING
            waits.append(time.monotonic() - started)
        with refused("INVALID_ARGUMENT", "PROMPT_EXCEEDS_MODEL_CONTEXT"):
            huge.result()
    other.close()
    p99, took = sorted(waits)[int(0.99 * len(waits))], server.metric("tokenize_seconds_sum")
    print(f"p99 {p99:.4f} s, worst {max(waits):.4f} s of {len(waits)} calls; tokenised in {took:.2f} s")  # noqa: T201
    assert len(waits) > 20
    assert p99 < 0.2 * took  # of the same machine: it is seconds


def test_a_full_queue_says_so_at_once_while_huge_texts_are_tokenised(serve: Serve, tiny_model_path: Path) -> None:
    """A text of 5 MB holds the one place in the queue; others hear so without being tokenised."""
    server = serve(tiny_model_path, *ONE_THREAD, "--max-queue-requests", "1")
    client, other, waits = server.connect(), server.connect(), []
    text = "The quick brown fox jumps over the lazy dog, doesn't it? " * 90_000

    def ask(client: Client) -> str | None:
        try:
            client.stream(text="x" * 1000, stop=stop(1))
        except grpc.RpcError as error:
            return refusal_of(error).reason
        return None

    said: Counter[str | None] = Counter()
    with ThreadPoolExecutor() as threads:
        huge = threads.submit(client.stream, text=text)
        wait_until(lambda: server.metric("grpc_active_streams") == 1, "it has its place")
        while not huge.done():
            started = time.monotonic()
            reason = ask(other)
            said[reason] += 1
            if reason == "QUEUE_FULL":
                waits.append(time.monotonic() - started)
        with refused("INVALID_ARGUMENT", "PROMPT_EXCEEDS_MODEL_CONTEXT"):
            huge.result()
    took = server.metric("tokenize_seconds_sum")
    print(f"fastest {min(waits) * 1e3:.2f} ms of {len(waits)} refusals; tokenised in {took:.2f} s")  # noqa: T201
    assert said["QUEUE_FULL"] > 20
    assert server.metric("tokenize_seconds_count") == 1 + said[None]  # those that came after the huge one
    assert min(waits) < 0.02  # 5 ms where nothing else runs
    client.close()
    other.close()
