"""One public function per operator: `paged_attention`, `store_kv`."""
