"""Learning which KV heads need the whole cache (ALGORITHMS, section 6)."""
