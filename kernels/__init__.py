"""One public function per operator: `paged_attention`, `store_kv`."""

from pagestream.kernels.operators import attention_workspace, paged_attention, plan_attention, store_kv

__all__ = ["attention_workspace", "paged_attention", "plan_attention", "store_kv"]
