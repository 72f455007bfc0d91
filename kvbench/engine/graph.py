"""Captures a decoding step in a CUDA graph, so that it is launched as one."""

from collections.abc import Callable

import torch

FIRST = 3  # calls without a graph; a function that changes sooner is not worth capturing


class Repeated:
    """Calls a function that works on tensors in place; on a GPU, from a CUDA graph after a while.

    A step of a small model is hundreds of short kernels, which the host launches more slowly than
    the GPU runs them; a graph is launched as one. Functions that synchronise with the GPU cannot be
    captured and run without a graph.

    `capturable` says whether to try; `first` is how many calls are made before.
    """

    def __init__(self, function: Callable[[], None], capturable: bool, first: int = FIRST) -> None:
        self.function = function
        self.capturable = capturable
        self.first = first
        self.changed()

    def changed(self) -> None:
        """Tell that the function works on other tensors from now on."""
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call the function."""
        if self.capturable and self.calls == self.first:
            self.graph = self._captured()
        self.calls += 1
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.function()
            except RuntimeError:
                self.capturable = False
            try:
                graph.capture_end()
            except RuntimeError:
                self.capturable = False
        torch.cuda.current_stream().wait_stream(stream)
        return graph if self.capturable else None
