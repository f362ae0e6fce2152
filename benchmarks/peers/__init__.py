"""Ours beside what people would pick instead: the parts of `benchmarks/compare.py`."""
