"""The keys and values that each decoder layer has seen, where layers may differ in length.

Pruning inside the LLM leaves every layer with its own number of tokens, which transformers' own caches do
not offer. This one keeps the contract that a decoder layer calls (`update(keys, values, layer_idx)`) and adds
`trim`. Layers are counted from 0 here, as transformers does.
"""

from collections.abc import Iterator
from typing import Any

import torch


class LayerCache:
    """Keys and values of one sequence, layer by layer.

    Prefill hands over its tensors without a copy; the first decoded token moves a layer into a buffer with
    room for the tokens to come. Each time the room is used up it doubles, so that N generated tokens cost
    O(N) copying.
    """

    def __init__(self, n_layers: int, *, room: int = 256) -> None:
        """`room`: tokens that a layer's buffer has space for beyond the prompt before it must grow."""
        if n_layers < 1 or room < 1:
            raise ValueError(
                f"a cache needs at least one layer and room for one token, not {n_layers} and {room}"
            )
        self._keys: list[torch.Tensor | None] = [None] * n_layers
        self._values: list[torch.Tensor | None] = [None] * n_layers
        self._lengths = [0] * n_layers
        self._room = [room] * n_layers
        self._first_room = room

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held by each layer."""
        return tuple(self._lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by one layer, under the name that transformers calls."""
        return self._lengths[layer_idx]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (1, kv heads, S, head_dim) keys and values; returns all of the layer's, new ones last.

        The result shares memory with the cache and is valid until the layer's next `update` or `trim`.
        Further arguments that transformers may pass to its own caches mean nothing here and stay unread.
        """
        held, new = self._lengths[layer_idx], key_states.shape[2]
        if held == 0:
            self._keys[layer_idx], self._values[layer_idx] = key_states, value_states
        else:
            keys = self._with_space(self._keys, layer_idx, new)
            values = self._with_space(self._values, layer_idx, new)
            keys[:, :, held : held + new] = key_states
            values[:, :, held : held + new] = value_states
        self._lengths[layer_idx] = held + new
        return self.keys_values(layer_idx)

    def keys_values(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer holds, (1, kv heads, length, head_dim) each; an error while it holds nothing."""
        keys, values, length = self._keys[layer_idx], self._values[layer_idx], self._lengths[layer_idx]
        if keys is None or values is None:
            raise ValueError(f"layer {layer_idx} has no keys yet")
        return keys[:, :, :length], values[:, :, :length]

    def trim(self, layer_idx: int, keep: torch.Tensor) -> None:
        """Keep only a layer's tokens at `keep` (K,) int64, sorted; the others' memory is given back."""
        keys, values = self.keys_values(layer_idx)
        index = keep.to(keys.device)
        self._keys[layer_idx] = keys.index_select(2, index)
        self._values[layer_idx] = values.index_select(2, index)
        self._lengths[layer_idx] = index.shape[0]

    def fork(self, n_layers: int | None = None, *, drop_last: int = 0) -> "LayerCache":
        """Another cache that begins with what the first `n_layers` hold (default: all); the rest is empty.

        It leaves out each layer's last `drop_last` tokens. Tensors are shared and nothing is copied, yet
        growing or trimming one of the two never shows in the other. Raises ValueError for layers or tokens
        that there are not.
        """
        n_layers = len(self._keys) if n_layers is None else n_layers
        if not 0 <= n_layers <= len(self._keys):
            raise ValueError(f"cannot fork {n_layers} layers of a cache of {len(self._keys)}")
        made = LayerCache(len(self._keys), room=self._first_room)
        for index in range(n_layers):
            keys, values = self.keys_values(index)
            if not 0 <= drop_last <= self._lengths[index]:
                raise ValueError(
                    f"cannot leave {drop_last} of the {self._lengths[index]} tokens of layer {index} out"
                )
            length = self._lengths[index] - drop_last
            # Views without room: whichever of the two grows moves into a buffer of its own.
            made._keys[index], made._values[index] = keys[:, :, :length], values[:, :, :length]
            made._lengths[index] = length
        return made

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self._lengths = [0] * len(self._lengths)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The memory behind the keys and values held."""
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                yield tensor

    def bytes(self) -> int:
        """Bytes of the keys and values held, without the room kept for tokens to come."""
        total = 0
        for keys, length in zip(self._keys, self._lengths, strict=True):
            if keys is not None:
                total += 2 * keys.shape[0] * keys.shape[1] * length * keys.shape[3] * keys.element_size()
        return total

    def _with_space(self, store: list[torch.Tensor | None], layer_idx: int, new: int) -> torch.Tensor:
        """The buffer of a layer in `store`, moved into a larger one if `new` more tokens do not fit."""
        buffer, held = store[layer_idx], self._lengths[layer_idx]
        assert buffer is not None  # only called for a layer that holds tokens
        if held + new <= buffer.shape[2]:
            return buffer
        room = max(self._room[layer_idx], new)
        batch, heads, _, dim = buffer.shape
        grown = buffer.new_empty(batch, heads, held + room, dim)
        grown[:, :, :held] = buffer[:, :, :held]
        store[layer_idx] = grown
        if store is self._values:  # keys grow first, values right after by the same room
            self._room[layer_idx] = 2 * room
        return grown
