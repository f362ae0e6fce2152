"""Any server with OpenAI's chat completions over HTTP, streamed as server-sent events.

Prompts are letters, about one token each; the server's own count, where it tells one, is what is recorded.
"""

from __future__ import annotations

import asyncio
import json
import string
from typing import Any

import httpx2 as httpx

from pagestream.loadtest.credentials import Credentials
from pagestream.loadtest.record import Record
from pagestream.loadtest.shapes import Vocabulary
from pagestream.loadtest.target import Call, Target, TargetError, TargetInfo

_WORDS = string.ascii_lowercase  # letters between spaces are a token each for most tokenizers


class HttpTarget(Target):
    """A connection for each call: closing it is how HTTP/1.1 cancels."""

    def __init__(self, url: str, credentials: Credentials) -> None:
        """Raises OSError for files of credentials that cannot be used."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            timeout=None,
            trust_env=False,
            headers=dict(credentials.headers),
            verify=credentials.for_https(),
        )
        self._model = ""

    async def describe(self) -> TargetInfo:
        try:
            response = await self._http.get(f"{self._url}/v1/models", timeout=10.0)
            response.raise_for_status()
            model = response.json()["data"][0]
            self._model = model["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            cause = str(error) or type(error).__name__
            raise TargetError(f"no OpenAI-compatible server answers at {self._url} ({cause})") from error
        return TargetInfo(self._model, Vocabulary(len(_WORDS)), model.get("max_model_len"))

    async def send(self, call: Call, record: Record) -> list[int]:
        answer: list[int] = []
        deadline = call.fault.seconds if call.fault and call.fault.kind == "deadline" else call.timeout
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": " ".join(_WORDS[token] for token in call.prompt)}],
            "max_tokens": call.new_tokens,
            "temperature": 0,
            "ignore_eos": True,  # of vLLM, SGLang and llama.cpp; others leave it aside
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with (
                asyncio.timeout(deadline),
                self._http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    text = (await response.aread()).decode(errors="replace")
                    record.fail(str(response.status_code), "", text[:300])
                    return answer
                await self._read(response, call, record, answer)
        except TimeoutError:
            record.fail("DEADLINE_EXCEEDED", "", "the client's deadline passed")
        except httpx.HTTPError as error:
            record.fail("UNAVAILABLE", type(error).__name__, str(error))
        return answer

    async def _read(self, response: httpx.Response, call: Call, record: Record, answer: list[int]) -> None:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                record.outcome = "ok"
                return
            if problem := self._take(data, record, answer):
                record.fail("INTERNAL", "", problem[:300])
                return
            if call.fault and call.leaves_now(len(answer)):
                record.outcome = "killed" if call.fault.kind == "kill" else "cancelled"
                return
            if call.pause:
                await asyncio.sleep(call.pause)
        record.fail("UNAVAILABLE", "", "the stream ended without [DONE]")

    def _take(self, data: str, record: Record, answer: list[int]) -> str | None:
        """What is wrong, if anything is: with 200 already said, servers tell of their failures in the stream."""
        try:
            event = json.loads(data)
            self._note(event, record, answer)
            return json.dumps(event["error"]) if event.get("error") else None
        except (ValueError, TypeError, AttributeError):
            return f"not an event: {data}"

    def _note(self, event: dict[str, Any], record: Record, answer: list[int]) -> None:
        now = self.clock()
        record.accepted = record.accepted or now
        if any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()):
            record.tokens.append(now)  # a message is taken for a token: its text does not tell how many it holds
            answer.append(len(answer) % len(_WORDS))
            record.output_tokens = len(answer)
        if usage := event.get("usage"):
            record.prompt_tokens = usage.get("prompt_tokens", record.prompt_tokens)
            record.output_tokens = usage.get("completion_tokens", record.output_tokens)
            record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    async def close(self) -> None:
        await self._http.aclose()
