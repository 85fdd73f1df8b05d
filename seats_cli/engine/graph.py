"""One decoded token a sequence as one CUDA graph: no Python between its kernels.

Every layer's keys and values move into buffers of this module's own, so that their addresses stay; how full
each is, and the positions, are numbers on the device that the graph itself advances. The same graph serves
every answer whose buffers are large enough.
"""

from functools import lru_cache

import torch

from seats_cli.engine.cache import LayerCache
from seats_cli.measure.clock import idle_until_done
from seats_cli.model.adapter import Adapter
from seats_cli.selection.transfer import on_device

ROUNDING = 512  # a buffer's tokens come in multiples of this, so that a slightly longer clip reuses the graph


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are recorded, which no other thread may use meanwhile.

    PyTorch has 32 streams of each priority and gives them out in turns, so a thread that asks for "a new one"
    may get any other's, this one too; those of this priority nobody else here asks for. What is recorded
    keeps the priority: decoding, which takes little of the GPU, goes before encoders that run beside it.
    """
    return torch.cuda.Stream(device, priority=-1)


class GraphDecoder:
    """Decodes for one adapter, up to `slots` sequences at once, which begin and end independently.

    A slot holds one sequence; `begin` forgets what the slot held before. Every step runs all slots, for
    reading the weights is what a step costs; an idle one computes nothing that anybody reads. What a sequence
    gets does not depend on what the other slots hold.
    """

    def __init__(self, adapter: Adapter, slots: int = 1) -> None:
        if slots < 1:
            raise ValueError(f"a decoder needs at least one slot, not {slots}")
        self._adapter = adapter
        self.slots = slots
        device, n_layers = adapter.device, adapter.geometry.n_layers
        self._token = torch.zeros(slots, dtype=torch.int64, device=device)
        self._position = torch.zeros(3, slots, dtype=adapter.position_dtype, device=device)
        self._lengths = torch.zeros(n_layers, slots, dtype=torch.int32, device=device)
        self._active = torch.zeros(slots, dtype=torch.int32, device=device)
        self._busy: set[int] = set()
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in (*self._keys, *self._values))

    def begin(self, cache: LayerCache, next_position: float, room: int, slot: int = 0) -> None:
        """Take over a prefill's cache; up to `room` tokens follow, the first at `next_position`."""
        self.retire(slot)
        lengths = cache.lengths
        self._make_room([length + room for length in lengths])
        read = [cache.keys_values(index) for index in range(len(lengths))]
        for held, buffers in zip(zip(*read, strict=True), (self._keys, self._values), strict=True):
            places = [buffer[slot, :, :n] for buffer, n in zip(buffers, lengths, strict=True)]
            torch._foreach_copy_(places, [tensor[0] for tensor in held])  # one call for all layers
        # Nothing here waits for the step in the making; `self._active[slot] = 1` would, for its one number.
        self._lengths[:, slot] = on_device(torch.tensor(lengths, dtype=torch.int32), self._lengths.device)
        self._position[:, slot].fill_(next_position)
        self._active[slot].fill_(1)
        self._busy.add(slot)
        cache.clear()

    def retire(self, slot: int) -> None:
        """End a slot's sequence; the slot is free."""
        self._busy.discard(slot)
        self._active[slot].fill_(0)
        self._lengths[:, slot].fill_(0)

    def release(self) -> None:
        """Give the buffers back, which otherwise stay as large as the largest sequence so far needed.

        Sequences that have not ended are lost. Waits for the step in the making, whose memory this is."""
        idle_until_done(self._adapter.device)
        self._keys, self._values, self._graph, self._logits = [], [], None, None
        for slot in range(self.slots):
            self.retire(slot)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits (slots, V) float32 after one more token in each slot, (slots,) int64; idle slots' mean
        nothing. Valid until the next step. Does not wait."""
        self._token.copy_(token)
        if self._token.device.type != "cuda":  # nothing to record: what a graph would run, as it is
            self._logits = self._advance()
            return self._logits
        with torch.cuda.device(self._adapter.device):
            if self._graph is None:
                self._capture()
            else:
                self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _make_room(self, needed: list[int]) -> None:
        """Buffers for so many tokens a layer; those large enough stay, and with them the graph."""
        held = [keys.shape[2] for keys in self._keys] or [0] * len(needed)
        if all(n <= before for n, before in zip(needed, held, strict=True)):
            return
        # Else the allocator may take the graph's memory from under the step in the making.
        idle_until_done(self._adapter.device)
        self._graph = None
        capacities = [
            max(before, -(-n // ROUNDING) * ROUNDING) for n, before in zip(needed, held, strict=True)
        ]
        if not self._busy or not self._keys:  # nothing to carry over: given back before larger ones are taken
            self._keys, self._values = [], []
            made = [[self._buffer(capacity) for capacity in capacities] for _ in range(2)]
            self._keys, self._values = made  # both or, where memory runs out, neither
            return
        for index, capacity in enumerate(capacities):
            if capacity > held[index]:  # both or neither: a step takes the capacity of one for the other's
                grown = self._grown(self._keys[index], capacity), self._grown(self._values[index], capacity)
                self._keys[index], self._values[index] = grown

    def _buffer(self, capacity: int) -> torch.Tensor:
        geometry, adapter = self._adapter.geometry, self._adapter
        shape = (self.slots, geometry.n_kv_heads, capacity, geometry.head_dim)
        return torch.zeros(shape, dtype=adapter.dtype, device=adapter.device)

    def _grown(self, buffer: torch.Tensor, capacity: int) -> torch.Tensor:
        grown = self._buffer(capacity)
        grown[:, :, : buffer.shape[2]] = buffer
        return grown

    def _capture(self) -> None:
        """Run the step once as it is, which also compiles its kernels, and record it for the next ones."""
        stream = recording_stream(self._adapter.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._advance()
        self._logits.copy_(logits)
        self._graph = graph

    def _advance(self) -> torch.Tensor:
        logits = self._adapter.decode_token(
            self._token, self._position, self._keys, self._values, self._lengths
        )
        self._lengths.add_(self._active)
        self._position.add_(self._active)
        return logits
