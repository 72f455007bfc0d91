"""Runs rows: prefill, eviction, decoding, and counting. Start in `run`, or in `reference`."""
