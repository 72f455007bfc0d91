"""Models: loading them, their cards, and the data of the embedded ones."""
