"""The embedded model's tokenizer: whole words of the task texts, bytes for anything else."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from string import hexdigits, printable
from typing import Any

import regex
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbench.learning.examples import episodic_subtasks

END, PAD = "<|end|>", "<|pad|>"

# In this order: a group of four hexadecimal digits of a code; the space before such a group, alone,
# so that a group is spelt the same everywhere; tags; words; numbers of up to two digits; runs of
# punctuation; white space.
GROUP = r"(?<![0-9A-Za-z])[0-9a-f]{4}(?![0-9A-Za-z])"
PIECES = rf"{GROUP}| (?={GROUP})| ?</?[a-z]+>?| ?[A-Za-z]+| ?[0-9]{{1,2}}| ?[^\sA-Za-z0-9]+|\s+"


def tiny_tokenizer(seed: int) -> Any:
    """The tokenizer of the task texts: 150 episodes of each subtask, drawn by `seed`."""
    return build_tokenizer(task_texts(seed))


def task_texts(seed: int) -> Iterator[str]:
    """Contexts and turns of 150 episodes of each subtask."""
    for name, (task, subtask) in episodic_subtasks().items():
        for i in range(150):
            rng = random.Random(f"tokenizer/{seed}/{name}/{i}")
            episode = task.episode(rng, subtask, 30, 8)
            yield episode.context
            for turn in episode.turns:
                yield turn.question + turn.answer_prefix + turn.answer


def build_tokenizer(texts: Iterable[str], least_count: int = 3) -> Any:
    """A lossless tokenizer; its vocabulary is the pieces that occur `least_count` times in `texts`.

    Each piece is encoded as the fewest vocabulary entries (a unigram model of equal scores): a
    known word is one token, a code is pairs of hexadecimal digits, a number up to 99 is one token.
    Characters outside the vocabulary become their UTF-8 bytes.
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
