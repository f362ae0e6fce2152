"""What a Llama-family network looks like: the one description that every loader produces and the network reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pagestream.model.errors import ModelError, UnsupportedModelError

MAX_LAYERS = 1024  # eight times the most there are: a damaged file must not have billions counted


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (see rope.py for the formulas)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: the formula's own
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    def reach(self, max_position: int) -> int:
        """The longest context in tokens. YaRN is often switched on by these settings alone, max_position unchanged."""
        return max(max_position, int(self.original_max_position * self.factor)) if self.kind == "yarn" else max_position


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes in elements. `architecture` is the Hugging Face model type. Raises ModelError for sizes that cannot be,
    UnsupportedModelError for heads that the attention kernels do not take."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    sliding_window: tuple[int | None, ...] = ()  # one entry per layer; empty: full attention everywhere
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head before rotation (Qwen3)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding window of each layer, 0 for none."""
        return tuple(window or 0 for window in self.sliding_window) or (0,) * self.num_layers

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim < 8 or self.head_dim % 8:
            raise UnsupportedModelError(f"head size {self.head_dim} is not supported, only multiples of 8")
