"""The card and the head scores of SmolLM2-135M-Instruct; the weights ship in another package."""
