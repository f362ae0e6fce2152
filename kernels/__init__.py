"""One public function per operator: `paged_attention`, `store_kv`."""

from pagestream.kernels.operators import paged_attention, store_kv

__all__ = ["paged_attention", "store_kv"]
