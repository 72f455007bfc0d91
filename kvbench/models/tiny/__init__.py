"""The embedded model: where it lies, how it is trained, what it scores."""
