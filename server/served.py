"""The model that is being served, as the gRPC services see it: filled in once it is loaded and warm."""

from __future__ import annotations

from dataclasses import dataclass

from pagestream.model.tokenizer import Tokenizer
from pagestream.server.engine import Engine
from pagestream.server.errors import LoadingError, UnknownModelError

_LOADING_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts that do not change while the process lives."""

    name: str
    tokenizer: Tokenizer
    engine: Engine
    architecture: str
    parameters: int
    vocab_size: int  # rows of the embedding; the tokenizer may know fewer
    max_context: int
    kv_capacity_tokens: int
    page_size: int
    device: str
    dtype: str
    kv_dtype: str


class ModelSlot:
    """Where the model will be: one process serves one model, and the port is open before it is loaded."""

    def __init__(self) -> None:
        self._model: ServedModel | None = None

    def fill(self, model: ServedModel) -> None:
        self._model = model

    def get(self, name: str = "") -> ServedModel:
        """The served model. Raises LoadingError until there is one and UnknownModelError for another name; the empty
        name is any."""
        if self._model is None:
            raise LoadingError("the model is still loading", _LOADING_RETRY_SECONDS)
        if name.removeprefix("models/") not in ("", self._model.name):
            raise UnknownModelError(f"model {name!r} is not served here; models/{self._model.name} is")
        return self._model
