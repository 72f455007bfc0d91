"""Attention kernels: single tokens on a CPU and a GPU, prefill chunks by flash-attn."""
