"""The paged KV cache: where keys and values live. Which page belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pagestream.model.config import ModelConfig

_SCALE = torch.float32  # of a row of int8


class KVCache:
    """`layers[i]` is the (key, value) cache of layer i, each [P, Hkv, B, D]: pages, KV heads, positions, head size.
    They are views of `rows` [L, P, Hkv, 2, B, D]. With int8, `scales` float32 [L, P, Hkv, 2, B] has a factor of each
    row, else it is None; `layer_scales[i]` are the (key, value) scales of layer i, each [P, Hkv, B] or None.

    All are views of `storage` [L, P, Hkv, 2, bytes]: the keys of one page and head, with int8 their scales, then its
    values likewise, so attention reads one run of memory for both and one copy of a page takes all of it. Memory is not
    touched here: on a CPU, pages cost nothing before they are first written.
    """

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        pages = (config.num_layers, num_pages, config.num_kv_heads, 2)
        size = page_size * config.head_dim * dtype.itemsize  # bytes
        self.storage = torch.empty(*pages, page_size * row_bytes(config, dtype), dtype=torch.uint8, device=device)
        self.rows = torch.unflatten(self.storage[..., :size].view(dtype), -1, (page_size, config.head_dim))
        self.scales = self.storage[..., size:].view(_SCALE) if dtype == torch.int8 else None
        self.layers = tuple((layer[:, :, 0], layer[:, :, 1]) for layer in self.rows)
        self.layer_scales: tuple[tuple[torch.Tensor, torch.Tensor] | tuple[None, None], ...] = (
            ((None, None),) * config.num_layers
            if self.scales is None
            else tuple((layer[:, :, 0], layer[:, :, 1]) for layer in self.scales)
        )

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Makes each target page, in every layer, a copy of its source; no page may be both."""
        source, target = (torch.tensor(pages, device=self.storage.device) for pages in (sources, targets))
        self.storage[:, target] = self.storage[:, source]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one position takes over all layers."""
    return config.num_layers * 2 * config.num_kv_heads * row_bytes(config, dtype)


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the key or value of one position, layer and head."""
    return config.head_dim * dtype.itemsize + (_SCALE.itemsize if dtype == torch.int8 else 0)
