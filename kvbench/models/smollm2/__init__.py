"""The card of SmolLM2-135M-Instruct, and its head scores; a package of its own has the weights."""
