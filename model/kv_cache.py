"""The paged KV cache: where keys and values live. Which page belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagestream.model.config import ModelConfig


class KVCache:
    """`layers[i]` is the (key, value) cache of layer i, each [P, Hkv, B, D]: pages, KV heads, positions, head size.
    They are views of `storage` [L, P, Hkv, 2, B, D].

    The keys of one page and head are followed by its values, so attention reads one run of memory for both. Memory
    is not touched here: on a CPU, pages cost nothing before they are first written.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (config.num_layers, num_pages, config.num_kv_heads, 2, page_size, config.head_dim)
        self.storage = torch.empty(shape, dtype=dtype, device=device)
        self.layers = tuple((layer[:, :, 0], layer[:, :, 1]) for layer in self.storage)

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes each target page, in every layer, a copy of its source; no page may be both."""
        source, target = (torch.tensor(pages, device=self.storage.device) for pages in (sources, targets))
        self.storage[:, target] = self.storage[:, source]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one position takes over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
