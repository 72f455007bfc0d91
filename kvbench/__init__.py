"""kvbench: compare KV-cache eviction methods by KV footprint."""

__version__ = "0.1.0"
