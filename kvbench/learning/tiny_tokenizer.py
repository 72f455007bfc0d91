"""The embedded model's tokenizer: whole words of the task texts, bytes for anything else."""

from collections import Counter
from collections.abc import Iterable
from string import hexdigits, printable
from typing import Any

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"

# A code's group of four hexadecimal digits, and the space before it by itself so that the group is
# spelt the same everywhere; then tags, words, numbers of two digits, runs of marks, white space.
GROUP = r"(?<![0-9A-Za-z])[0-9a-f]{4}(?![0-9A-Za-z])"
PIECES = rf"{GROUP}| (?={GROUP})| ?</?[a-z]+>?| ?[A-Za-z]+| ?[0-9]{{1,2}}| ?[^\sA-Za-z0-9]+|\s+"


def build_tokenizer(texts: Iterable[str], least_count: int = 3) -> Any:
    """A lossless tokenizer whose vocabulary is the pieces that `texts` have `least_count` times.

    A piece of the text becomes the fewest vocabulary entries (a unigram model of equal scores), so
    known words are one token each, codes are pairs of hexadecimal digits, numbers up to 99 are one
    token; characters outside the vocabulary become their UTF-8 bytes.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(PIECES, text))
    pairs = [a + b for a in hexdigits[:16] for b in hexdigits[:16]]
    words = sorted(
        piece
        for piece, count in counts.items()
        if count >= least_count and not regex.fullmatch(r"[0-9a-f]{4}", piece)
    )
    vocabulary = dict.fromkeys(
        [*(f"<0x{byte:02X}>" for byte in range(256)), *printable, *pairs, *words]
    )
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
