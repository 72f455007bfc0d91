"""The files of the embedded model: weights, tokenizer, card and head scores."""
