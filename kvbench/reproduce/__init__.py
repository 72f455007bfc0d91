"""The paper's tables and claims beside the paper's own numbers."""
