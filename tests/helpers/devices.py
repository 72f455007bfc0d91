"""Devices that exist in name only, so that a CPU can run a model that is split over several GPUs.

PyTorch keeps no index of a CPU device: `cpu:1` is `cpu`. Inside `Apart`, it does. A tensor is where
it was made or moved to, an operation is where its tensors are, and tensors of different devices do
not mix, by the same rules as on a GPU: only single numbers and indices may be on the CPU, and
`copy_` may copy from elsewhere.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvbench.models.load import LoadedModel, wrap_model

MOVES = {"to", "cpu", "copy_", "set_data"}
FREE = {"_has_compatible_shallow_copy_type", "__set__"}  # of `data` and `grad`, wherever they are
INDEXED = {"__getitem__", "__setitem__", "index_put_"}


class Apart(TorchFunctionMode):
    """Keeps apart what is on `cpu:1`, `cpu:2` and so on; what is on `cpu` stands for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, int] = {}  # the device of each storage, by its address

    def place(self, tensor: Tensor) -> int | None:
        """The number of a tensor's device; None for the host."""
        address = storage_of(tensor)  # 0 if it is empty
        return self.places.get(address) if address else getattr(tensor, "place", None)

    def put(self, made: Any, place: int | None) -> Any:
        """Note that what was made is on a device."""
        for tensor in tensors_in(made):
            if not (address := storage_of(tensor)):
                vars(tensor)["place"] = place
            elif place is None:
                self.places.pop(address, None)
            else:
                self.places[address] = place
        return made

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Run a function of PyTorch where its tensors are."""
        keywords, name = dict(keywords or {}), getattr(function, "__name__", "")
        if function == Tensor.device.__get__:
            place = self.place(arguments[0])
            return torch.device("cpu") if place is None else torch.device("cpu", place)
        if name in MOVES:
            return self.moved(function, name, arguments, keywords)
        if name in FREE:
            return function(*arguments, **keywords)
        given = list(tensors_in((arguments, keywords)))
        if name in INDEXED:
            given = [each for each in given if each is arguments[0] or self.place(each)]
        places = {self.place(each) for each in given if each.dim() or self.place(each)}
        if len(places) > 1:
            raise RuntimeError(f"{name}: tensors on the devices {places}")
        wanted = keywords.get("device")
        made = function(*arguments, **keywords)
        if isinstance(wanted, torch.device | str):
            return self.put(made, torch.device(wanted).index)
        return self.put(made, next(iter(places), None)) if given or name in MAKERS else made

    def moved(self, function: Any, name: str, arguments: Any, keywords: Any) -> Any:
        """Run a function that moves a tensor."""
        first, *others = arguments
        place = self.place(first)
        target = [*others, *keywords.values()]
        made = function(*arguments, **keywords)
        if name in ("copy_", "set_data"):
            return made
        wanted = place
        if name == "cpu":
            wanted = None
        for each in target:
            if isinstance(each, Tensor):
                wanted = self.place(each)
            elif isinstance(each, torch.device) or (isinstance(each, str) and "cpu" in each):
                wanted = torch.device(each).index
        if wanted != place and storage_of(made) == storage_of(first):
            made = made.clone()
        return self.put(made, wanted)


MAKERS = {"tensor", "arange", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "eye"}
MAKERS.add("randperm")


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def tensors_in(given: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from tensors_in(list(given.values()))
    elif isinstance(given, list | tuple):
        for each in given:
            yield from tensors_in(each)


def split_model(model: Any, places: Iterable[int], **how: Any) -> LoadedModel:
    """A model whose layers are on the devices `places`, as `device_map` puts them; inside `Apart`.

    The table of embeddings is with the first layer, all that follows the layers with the last.
    """
    at = [f"cpu:{place}" for place in places]
    outside = {"model.embed_tokens": at[0], "model.rotary_emb": at[0]}
    outside |= {"model.norm": at[-1], "lm_head": at[-1]}
    layers = {f"model.layers.{index}": place for index, place in enumerate(at)}
    dispatch_model(model, outside | layers)
    return wrap_model(model, None, name="split", **how)
