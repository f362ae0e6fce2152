"""From a checked message to its Jobs: tokenises off the event loop and decides whether the prompt can ever fit."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import Executor
from functools import partial

from pagestream.model.chat_template import TemplateError
from pagestream.model.text_stream import TextStream
from pagestream.server import validate
from pagestream.server.call import current_call
from pagestream.server.errors import (
    InvalidFieldError,
    NoChatTemplateError,
    PromptExceedsKvCapacityError,
    PromptExceedsModelContextError,
)
from pagestream.server.job import Job, with_others
from pagestream.server.metrics import Metrics
from pagestream.server.request import Request
from pagestream.server.served import ServedModel
from pagestream.v1 import generation_pb2 as pb


async def prepare(
    message: validate.GenerateMessage,
    num_answers: int,
    model: ServedModel,
    tenant: str,
    received: float,
    deadline: float | None,
    tokenizing: Executor,
    metrics: Metrics,
) -> list[Job]:
    """A job for each answer. Raises the refusals that need no queue: a bad field, a prompt too long for the model,
    for the pool or for the caller's key."""
    tokenizer = model.tokenizer
    validate.check_prompt(message, model.vocab_size)
    stop = validate.stop_rules(message.stop, tokenizer.eos_token_ids, model.vocab_size)
    sampling = validate.sampling_params(
        message.sampling, message.output, message.stop.min_tokens, stop, model.vocab_size
    )
    interval = validate.progress_interval(message.output)
    queue_timeout = validate.queue_timeout(message)
    priority = validate.priority(message)
    stats = validate.stats_request(message.stats, model.page_size)
    prompt = await read_prompt(message, model, tokenizing, metrics)
    check_fits(len(prompt), model)
    validate.check_spans("stats.spans", stats.spans, len(prompt))
    room = min(model.max_context, model.kv_capacity_tokens) - len(prompt)
    longest = current_call().key.answer_tokens(stop.max_tokens)
    wanted = longest if longest is not None else room + 1
    text = partial(
        TextStream,
        tokenizer,
        stop_strings=stop.stop_strings,
        keep_special_tokens=message.output.special_tokens,
        min_tokens=sampling.min_tokens,
        continues_text=message.WhichOneof("prompt") != "chat",
    )
    first = Job(
        request=Request(
            request_id=message.request_id or uuid.uuid4().hex,
            prompt=prompt,
            sampling=sampling,
            max_new_tokens=min(wanted, room),
            max_tokens_is_capacity=wanted > room,
            eos_token_ids=stop.eos_token_ids,
            stop_token_ids=stop.stop_token_ids,
            tenant=tenant,
            priority=priority,
        ),
        text=text(),
        received=received,
        deadline=deadline,
        queue_deadline=None if queue_timeout is None else received + queue_timeout,
        progress_interval=interval,
        stats=stats,
    )
    return with_others(first, [text() for _ in range(1, num_answers)])


async def read_prompt(
    message: validate.PromptMessage, model: ServedModel, tokenizing: Executor, metrics: Metrics
) -> list[int]:
    """The tokens of a checked message's prompt. Raises InvalidFieldError and NoChatTemplateError."""
    kind = message.WhichOneof("prompt")
    if kind == "token_ids":
        return list(message.token_ids.ids)
    started = time.monotonic()
    loop = asyncio.get_running_loop()
    prompt = await loop.run_in_executor(tokenizing, _tokenize, message, model)
    metrics.observe_tokenize(time.monotonic() - started)
    if not prompt:
        raise InvalidFieldError(kind or "prompt", "has no tokens")
    if max(prompt) >= model.vocab_size:  # a tokenizer may hold tokens that the network was never given
        raise InvalidFieldError("prompt", f"has token {max(prompt)}; the model knows {model.vocab_size}")
    return prompt


def check_fits(num_tokens: int, model: ServedModel) -> None:
    """Whether so many can be read and one more be chosen. Raises PromptExceedsModelContextError,
    PromptExceedsKvCapacityError or KeyLimitError."""
    if num_tokens >= model.max_context:
        raise PromptExceedsModelContextError(num_tokens, model.max_context)
    if num_tokens >= model.kv_capacity_tokens:
        raise PromptExceedsKvCapacityError(num_tokens, model.kv_capacity_tokens)
    current_call().key.check_prompt(num_tokens)


def _tokenize(message: validate.PromptMessage, model: ServedModel) -> list[int]:
    if message.WhichOneof("prompt") == "text":
        validate.check_text("text", message.text, model.max_context)
        return model.tokenizer.encode(message.text, add_special_tokens=True)
    text = render_chat(message.chat, model, add_generation_prompt=True)
    validate.check_text("chat.messages", text, model.max_context)
    return model.tokenizer.encode(text, add_special_tokens=False)  # the template writes the special tokens itself


def render_chat(chat: pb.Chat, model: ServedModel, *, add_generation_prompt: bool) -> str:
    """Raises NoChatTemplateError, and InvalidFieldError with the template's own words if it refuses the messages."""
    template = model.tokenizer.chat_template
    if template is None:
        raise NoChatTemplateError(f"models/{model.name} has no chat template: send text or token_ids")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InvalidFieldError("chat.messages", str(error)) from error
