"""The gRPC services beside generation: the model's tokeniser and its facts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc

from pagestream.server import status, validate
from pagestream.server.errors import InvalidFieldError, RequestError
from pagestream.server.prepare import render_chat
from pagestream.server.served import ModelSlot, ServedModel
from pagestream.v1 import model_pb2, tokenizer_pb2
from pagestream.v1.model_pb2_grpc import ModelServiceServicer
from pagestream.v1.tokenizer_pb2_grpc import TokenizerServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
Response = TypeVar("Response")


class TokenizerService(TokenizerServiceServicer):
    """The served model's tokeniser; all of its work runs off the event loop."""

    def __init__(self, slot: ModelSlot, tokenizing: Executor) -> None:
        self._slot = slot
        self._tokenizing = tokenizing

    async def Encode(  # noqa: N802 - the proto's name
        self, request: tokenizer_pb2.EncodeRequest, context: Context
    ) -> tokenizer_pb2.EncodeResponse:
        def encode(model: ServedModel) -> tokenizer_pb2.EncodeResponse:
            validate.check_text("text", request.text, model.max_context)
            special = request.special_tokens if request.HasField("special_tokens") else True
            ids = model.tokenizer.encode(request.text, add_special_tokens=special)
            return tokenizer_pb2.EncodeResponse(token_ids=ids)

        return await self._run(encode, request.model, context)

    async def Decode(  # noqa: N802 - the proto's name
        self, request: tokenizer_pb2.DecodeRequest, context: Context
    ) -> tokenizer_pb2.DecodeResponse:
        def decode(model: ServedModel) -> tokenizer_pb2.DecodeResponse:
            largest = max(request.token_ids, default=0)
            if largest >= model.vocab_size:
                raise InvalidFieldError("token_ids", f"token {largest} is outside the vocabulary of {model.vocab_size}")
            text = model.tokenizer.decode(list(request.token_ids), keep_special_tokens=request.special_tokens)
            return tokenizer_pb2.DecodeResponse(text=text)

        return await self._run(decode, request.model, context)

    async def ApplyTemplate(  # noqa: N802 - the proto's name
        self, request: tokenizer_pb2.ApplyTemplateRequest, context: Context
    ) -> tokenizer_pb2.ApplyTemplateResponse:
        def apply(model: ServedModel) -> tokenizer_pb2.ApplyTemplateResponse:
            validate.check_chat(request.chat)
            prompt = request.generation_prompt if request.HasField("generation_prompt") else True
            text = render_chat(request.chat, model, add_generation_prompt=prompt)
            validate.check_text("chat.messages", text, model.max_context)
            ids = model.tokenizer.encode(text, add_special_tokens=False)
            return tokenizer_pb2.ApplyTemplateResponse(text=text, token_ids=ids)

        return await self._run(apply, request.model, context)

    async def _run(self, work: Callable[[ServedModel], Response], model: str, context: Context) -> Response:
        try:
            served = self._slot.get(model)
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work, served)
        except RequestError as error:
            await status.abort(context, error)


class ModelService(ModelServiceServicer):
    """What is served and what it can take."""

    def __init__(self, slot: ModelSlot) -> None:
        self._slot = slot

    async def GetModel(  # noqa: N802 - the proto's name
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        try:
            return model_pb2.GetModelResponse(model=_info(self._slot.get(request.name)))
        except RequestError as error:
            await status.abort(context, error)

    async def ListModels(  # noqa: N802 - the proto's name
        self, _request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        try:
            return model_pb2.ListModelsResponse(models=[_info(self._slot.get())])
        except RequestError as error:
            await status.abort(context, error)


def _info(model: ServedModel) -> model_pb2.ModelInfo:
    tokenizer = model.tokenizer
    return model_pb2.ModelInfo(
        name=f"models/{model.name}",
        architecture=model.architecture,
        parameters=model.parameters,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_context,
        kv_capacity_tokens=model.kv_capacity_tokens,
        page_size=model.page_size,
        device=model.device,
        dtype=model.dtype,
        kv_dtype=model.kv_dtype,
        has_chat_template=tokenizer.chat_template is not None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=tokenizer.eos_token_ids,
    )
