"""The network: embed, then for each layer attention over the pages and a gated MLP, then logits.

Llama (arXiv 2302.13971) and its relatives: pre-norm with RMS norm, rotary positions, grouped-query attention,
SwiGLU. Mistral adds a sliding window, Qwen2 biases, Qwen3 a norm of each query and key head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from pagestream import kernels
from pagestream.kernels.outputs import Outputs, summarize
from pagestream.kernels.summary import Observation, Observer
from pagestream.model.batch import Batch
from pagestream.model.config import ModelConfig
from pagestream.model.kv_cache import KVCache
from pagestream.model.native import native_decoder
from pagestream.model.rope import RotaryEmbedding
from pagestream.model.weights import LayerWeights, Weights


class Network:
    """T: rows of the batch; Hq, Hkv: query and key/value heads; D: head size; E: hidden size; V: vocabulary."""

    def __init__(self, config: ModelConfig, weights: Weights, *, deterministic: bool = False) -> None:
        """`deterministic`: prompts are multiplied as answers are, whatever the machine could do."""
        self._config = config
        self._deterministic = deterministic
        self._weights = weights
        self._rope = RotaryEmbedding(config, weights.norm.device)
        self._windows = config.windows
        self._decoder = native_decoder(config, weights)
        self._workspaces: dict[int, torch.Tensor] = {}  # of attention, by window; without elements on a CPU

    @property
    def is_row_invariant(self) -> bool:
        """Whether a token's logits depend, to the last bit, on nothing but the tokens before it and on which of these
        were generated: not on how many rows are computed at once. So it is in the compiled decoder; torch's own
        products choose their order of sums by size.
        """
        return self._decoder is not None

    def outputs(self, batch: Batch, cache: KVCache, observation: Observation | None = None) -> Outputs:
        """Writes the keys and values of every row into its slot; returns what sampled_rows say. `observation` receives
        what it asks of attention, and changes no bit of anything else.

        Running the same batch again writes the same values: a step can be repeated.
        """
        if self._decoder is not None:
            return self._decoder(
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.query_starts,
                batch.context_lengths,
                batch.block_tables,
                batch.sampled_rows,
                prefill_rows=0 if self._deterministic else batch.prefill_rows,
                with_statistics=batch.with_statistics,
                caches=cache.rows,
                scales=cache.scales,
                observation=observation,
            )
        return self._run(batch, cache, observation)

    @torch.inference_mode()  # not around the decoder, for which it would mean nothing and take 30 us
    def _run(self, batch: Batch, cache: KVCache, observation: Observation | None) -> Outputs:
        """The same as PyTorch operations and attention's own."""
        hidden = self._weights.embedding.lookup(batch.token_ids)  # [T, E]
        cos, sin = self._rope(batch.positions)
        lengths = (batch.block_tables, batch.query_starts, batch.context_lengths)
        observer = None if observation is None else Observer(observation, *lengths)
        scale = self._config.head_dim**-0.5
        attended = hidden.new_empty(len(hidden), self._config.num_heads, self._config.head_dim)
        self._plan_attention(batch, attended)
        for layer, caches, (key_scales, value_scales), window in zip(
            self._weights.layers, cache.layers, cache.layer_scales, self._windows, strict=True
        ):
            normed = self._rms_norm(hidden, layer.attention_norm)
            heads = layer.query_key_value(normed).view(len(hidden), -1, self._config.head_dim)
            kernels.append_kv(
                heads,
                cos,
                sin,
                *caches,
                batch.slots,
                norm_weight=layer.query_key_norm,
                epsilon=self._config.rms_norm_eps,
                key_scales=key_scales,
                value_scales=value_scales,
            )
            query = heads[:, : self._config.num_heads]
            kernels.paged_attention(
                query,
                *caches,
                *lengths,
                scale=scale,
                window=window,
                out=attended,
                workspace=self._workspaces[window],
                key_scales=key_scales,
                value_scales=value_scales,
            )
            if observer is not None:
                observer.add_layer(
                    query, *caches, scale=scale, window=window, key_scales=key_scales, value_scales=value_scales
                )
            hidden = hidden + layer.attention_output(attended.flatten(1))
            hidden = hidden + _mlp(layer, self._rms_norm(hidden, layer.mlp_norm))
        if observer is not None:
            observer.finish()
        last = self._rms_norm(hidden[batch.sampled_rows], self._weights.norm)  # [R, E]
        logits = self._weights.lm_head(last).float()
        return Outputs(logits, summarize(logits, batch.with_statistics))

    def _plan_attention(self, batch: Batch, attended: torch.Tensor) -> None:
        """Once for all layers of a window: on a GPU each would plan for itself."""
        num_heads, num_kv_heads, head_size = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        for window in set(self._windows):
            if window not in self._workspaces:
                self._workspaces[window] = kernels.attention_workspace(attended)
            kernels.plan_attention(
                batch.query_starts,
                batch.context_lengths,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                window=window,
                workspace=self._workspaces[window],
            )

    def _rms_norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(rows, weight.shape, weight, self._config.rms_norm_eps)


def _mlp(layer: LayerWeights, normed: torch.Tensor) -> torch.Tensor:
    gate, up = layer.gate_up(normed).chunk(2, dim=-1)
    return layer.down(functional.silu(gate) * up)
