"""A function that is called again and again on the same tensors, captured in a CUDA graph."""

from collections.abc import Callable

import torch

FIRST = 3  # calls that are made as they are: what changes sooner is not worth capturing


class Repeated:
    """Calls a function that only works on tensors in place; on a GPU, it is captured soon.

    What is captured is launched as one: a small model's step is some hundred short kernels, which
    take the host far longer to launch than the GPU to run. A function that cannot be captured, for
    it waits for the GPU, goes on as it is.
    """

    def __init__(self, function: Callable[[], None], capturable: bool) -> None:
        self.function = function
        self.capturable = capturable
        self.changed()

    def changed(self) -> None:
        """The function works on other tensors from now on."""
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call it."""
        if self.capturable and self.calls == FIRST:
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
