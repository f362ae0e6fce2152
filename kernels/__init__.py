"""One public function per operator."""

from pagestream.kernels.append import append_kv
from pagestream.kernels.operators import (
    attention_workspace,
    paged_attention,
    plan_attention,
    quantized_linear,
    store_kv,
)

__all__ = [
    "append_kv",
    "attention_workspace",
    "paged_attention",
    "plan_attention",
    "quantized_linear",
    "store_kv",
]
