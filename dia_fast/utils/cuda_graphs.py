"""CUDA graphs of what the engine and the codec launch over and over."""

from collections.abc import Callable

import torch


class CudaGraphs:
    """Captures steps as CUDA graphs, all of them in one memory pool, on the current device and stream.

    A capture needs a stream that is not the device's default one; where that is current, one of its own is used.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        stream, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        if stream == default:
            stream = torch.cuda.Stream()
            stream.wait_stream(default)
            with torch.cuda.stream(stream):
                step()  # compiles and loads the kernels, which a capture cannot
            default.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile, such as decoding sound, is no part of it and may go on. Without a stream here
        # torch would capture on one that all engines share, of the device that was the first to capture.
        with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
            step()
        return graph.replay
