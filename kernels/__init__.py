"""One public function per operator."""

from pagestream.kernels.operators import dequantize, paged_attention, quantized_linear, store_kv

__all__ = ["dequantize", "paged_attention", "quantized_linear", "store_kv"]
