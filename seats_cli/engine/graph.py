"""One decoded token as one CUDA graph: no Python between its kernels.

Every layer's keys and values move into buffers of this module's own, so that their addresses stay; how full
each is, and the position, are numbers on the device that the graph itself advances. The same graph serves
every answer whose buffers are large enough.
"""

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.model.adapter import Adapter

ROUNDING = 512  # a buffer's tokens come in multiples of this, so that a slightly longer clip reuses the graph


class GraphDecoder:
    """Decodes for one adapter, one sequence at a time; each `begin` forgets the sequence before it."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        device, geometry = adapter.device, adapter.geometry
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(geometry.n_layers, dtype=torch.int32, device=device)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self, cache: LayerCache, next_position: int, room: int) -> None:
        """Take over a prefill's cache; up to `room` tokens follow, the first at `next_position`."""
        self._make_room([length + room for length in cache.lengths])
        for index, length in enumerate(cache.lengths):
            keys, values = cache.keys_values(index)
            self._keys[index][:, :length] = keys[0]
            self._values[index][:, :length] = values[0]
        self._start(cache.lengths, next_position)
        cache.clear()

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits (V,) float32 after one more token (1,) int64, valid until the next step. Does not wait."""
        self._token.copy_(token)
        with torch.cuda.device(self._adapter.device):
            if self._graph is None:
                self._capture()
            else:
                self._graph.replay()
        assert self._logits is not None
        return self._logits[0]

    def release(self) -> None:
        """Give the buffers and the graph back, as after running out of memory; `begin` makes them anew."""
        self._keys, self._values, self._graph, self._logits = [], [], None, None

    def _start(self, lengths: tuple[int, ...], position: int) -> None:
        self._lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self._position.fill_(position)

    def _make_room(self, needed: list[int]) -> None:
        """Buffers for so many tokens a layer; those large enough stay, and with them the graph."""
        if self._keys and all(n <= keys.shape[1] for n, keys in zip(needed, self._keys, strict=True)):
            return
        held = [keys.shape[1] for keys in self._keys] or [0] * len(needed)
        self._keys, self._values, self._graph = [], [], None  # given back before larger ones are taken
        capacities = [
            max(before, -(-n // ROUNDING) * ROUNDING) for n, before in zip(needed, held, strict=True)
        ]
        made = [[self._buffer(capacity) for capacity in capacities] for _ in range(2)]
        self._keys, self._values = made  # both or, where memory runs out, neither

    def _buffer(self, capacity: int) -> torch.Tensor:
        geometry, adapter = self._adapter.geometry, self._adapter
        shape = (geometry.n_kv_heads, capacity, geometry.head_dim)
        return torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)

    def _capture(self) -> None:
        """Run the step once as it is, which also compiles its kernels, and record it for the next ones."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._advance()
        self._logits.copy_(logits)
        self._graph = graph

    def _advance(self) -> torch.Tensor:
        logits = self._adapter.decode_token(
            self._token, self._position, self._keys, self._values, self._lengths
        )
        self._lengths.add_(1)
        self._position.add_(1)
        return logits
