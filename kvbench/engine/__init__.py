"""Runs rows: prefill, eviction, decoding, and the count of what is resident."""
