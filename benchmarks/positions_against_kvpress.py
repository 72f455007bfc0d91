"""The positions that methods keep of a prompt, in kvbench and in kvpress 0.5.5.

    python benchmarks/positions_against_kvpress.py [--methods keydiff,tova] [--contexts 512,1024]

Models: random ones of four architectures, drawn anew for each `--seed`, and the embedded model on a
task that it was trained for. Both sides have the same weights in float32, the same prompt, read
whole, and the methods' defaults, which are kvpress's; methods that evict while decoding do so after
the prompt alone here, as presses do. kvpress decides how many entries stay, since it rounds
differently; kvbench keeps as many. A line gives the share of the kept entries, over all layers and
KV heads, that both sides have, and whether the tokens generated afterwards are the same.

kvpress needs an environment of its own: see `against_kvpress.py`. The exit code is 1 if some method
has less than `--least` in common.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_kvpress import Peer, environment
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.card import model_folder
from kvbench.models.load import LoadedModel, load_model, wrap_model
from kvbench.models.wheel import WHEELS
from kvbench.registry import tasks
from kvbench.spec import MethodSpec, parse_method
from kvbench.sweep.plan import Settings, encode_prompt, make_sample

METHODS = "snapkv,keydiff,tova,lagkv,cur,expected-attention,ada-snapkv,chunkkv,criticalkv"
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
}
SIZES: dict[str, Any] = {
    "vocab_size": 997,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # far from uniform attention, so that entries differ
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", default=METHODS, help="with commas between")
    parser.add_argument(
        "--models", default=",".join([*RANDOM, "tiny"]), help="also a folder, or smollm2-135m"
    )
    parser.add_argument("--contexts", default="700,1024", help="tokens, with commas between")
    parser.add_argument("--budgets", default="0.1,0.3,0.5,0.8")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the random models and prompts")
    parser.add_argument("--least", type=float, default=0.999, help="share in common to reach")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kvpress-python", type=Path, help="an interpreter that has kvpress")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    python = arguments.kvpress_python or environment()
    specs, budgets = known(arguments.methods.split(",")), arguments.budgets.split(",")
    logging.disable_progress_bar()
    missed = 0
    print("model        method              context budget   kept   common  same tokens")
    for name in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model, where = model_of(name, Path(folder), arguments.seed)
            peer = Peer(python, arguments.threads, where)
            cases = itertools.product(
                map(int, arguments.contexts.split(",")), specs, map(float, budgets)
            )
            for context, spec, budget in cases:
                ids = prompt_of(model, context, arguments.seed)
                asked = {"ids": ids, "new": arguments.new, "method": spec.name, "budget": budget}
                theirs = peer.ask(asked)
                share, kept, tokens = compare(model, spec, ids, arguments.new, theirs)
                missed += share < arguments.least
                same = "yes" if tokens == theirs["tokens"] else "no"
                if theirs["tokens"] is None:
                    same = "kvpress stopped"
                print(
                    f"{name:12} {spec.name:18} {len(ids):8} {budget:6} {kept:6.0f} {share:8.2%}  "
                    f"{same}",
                    flush=True,
                )
            peer.close()
    print(f"{missed} below {arguments.least:.1%}")
    return int(missed > 0)


def known(names: list[str]) -> list[MethodSpec]:
    """The methods that this kvbench has; names the others."""
    specs = []
    for name in names:
        try:
            specs.append(parse_method(name, {"interval": 0}))
        except InputError as error:
            print(f"not compared: {error}", file=sys.stderr)
    return specs


def model_of(name: str, folder: Path, seed: int) -> tuple[LoadedModel, Path]:
    """A model, and where kvpress can load it: a random one is saved to the folder."""
    if name in RANDOM:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(name, **SIZES, **RANDOM[name])
        random = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for weight in random.parameters():
                if weight.ndim == 1:  # else norms have ones and biases zeros
                    weight += 0.3 * torch.randn_like(weight)
        random.save_pretrained(folder)
        model, where = wrap_model(random, None, name=name), folder
    else:
        model = load_model(name, device="cpu", dtype="float32")
        wheel = WHEELS.get(name)
        where = wheel.installed(name) if wheel else Path(model_folder(name) or name)
    model.model.generation_config.eos_token_id = -1  # no token ends an answer
    return model, where


def prompt_of(model: LoadedModel, context: int, seed: int) -> list[int]:
    """The tokens of a sample of `needle`, or random ones for a model without a tokenizer."""
    if model.tokenizer is None:
        draw = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(1, SIZES["vocab_size"], (context,), generator=draw).tolist()
        return ids
    settings = Settings(context, 0, 1, (context,), (0.5,), chat_template=False)
    sample = make_sample(model, tasks.get("needle")(), seed, settings)
    return encode_prompt(model.tokenizer, sample, chat=None)


def compare(
    model: LoadedModel, spec: MethodSpec, prompt: list[int], new: int, theirs: dict[str, Any]
) -> tuple[float, float, list[int]]:
    """The share of kept entries in common, how many kvpress keeps a KV head, and our tokens."""
    heads = [set(head) for layer in theirs["kept"] for head in layer]
    kept = sum(map(len, heads)) / len(heads)
    row = Row(prompt, new, spec, kept / len(prompt))
    (outcome,) = run_rows(model, [row], prefill_chunk=None, keep_positions=True)
    assert outcome.kept is not None
    ours = [set(head) for layer in outcome.kept for head in layer]
    common = sum(len(a & b) for a, b in zip(heads, ours, strict=True))
    return common / max(sum(map(len, heads)), sum(map(len, ours))), kept, outcome.tokens


if __name__ == "__main__":
    sys.exit(main())
