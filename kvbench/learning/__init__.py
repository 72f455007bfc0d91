"""Training of head scores (`docs/methods.md`, head splits) and of the embedded model."""
