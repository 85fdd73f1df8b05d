"""What an answer needs of a device's memory, counted before anything is loaded.

A run's peak is its weights and the largest of four moments: the encoders at work, the sequence being put
together, the prefill, and the cache moving into the buffers of decoding. Each moment is the sum of the
tensors that live in it, which the fast paths decide (`model.fused_vision`, `fused_audio`, `fused_text`,
`engine.graph`); the functions below say which those are. Counted are tensors, as
`torch.cuda.max_memory_allocated` does. What CUDA itself takes and what the allocator cannot hand out again is
left to `HEADROOM`, which is an allowance. Stage I's distances, positions and masks are small and left out.

In the formulas: S tokens of a layer, D its width, D_q and D_kv the widths of its queries and keys, I its
MLP's width, P patches of the vision encoder at once, b bytes of a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

HEADROOM = 2**30  # bytes of a GPU left for CUDA's context, its kernels and what the allocator keeps in pieces
MATMUL_WORKSPACE = 32 * 2**20  # PyTorch's default for cuBLAS on Hopper; less elsewhere
SALIENCY_SCORES = 1 << 27  # attention scores held at once where no kernel sums them (model's reference path)
FLOAT32 = 4


class NetworkSizes(Protocol):
    """The sizes of a network; `seats_cli.model.adapter.Geometry` has them."""

    @property
    def n_layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def active_experts(self) -> int: ...
    @property
    def shared_mlp(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def temporal_patch(self) -> int: ...
    @property
    def vision_hidden(self) -> int: ...
    @property
    def vision_heads(self) -> int: ...
    @property
    def vision_mlp(self) -> int: ...
    @property
    def audio_hidden(self) -> int: ...
    @property
    def audio_mlp(self) -> int: ...


@dataclass(frozen=True)
class Workload:
    """What one answer asks of the device.

    patches:      of the vision encoder's largest batch; 0 without pictures; of these `window_patches` attend
                  to each other where saliency is asked for, 0 where it is not
    pixel_bytes:  of the resized frames of that batch, and of one piece of native ones
    positions:    of the audio encoder's largest batch; 0 without sound
    held:         media tokens whose embeddings wait for the language model: those that stage I keeps, or all
                  of them where the method chooses over the whole clip
    entering:     tokens that the first layer processes, text among them
    lengths:      tokens that each layer processes, the first layer first
    new_tokens:   of the answer, at most
    """

    patches: int
    window_patches: int
    pixel_bytes: int
    positions: int
    held: int
    entering: int
    lengths: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Engine:
    """How it is run.

    itemsize:     bytes of a number of the language model and the encoders
    fused:        the encoders run fast paths; `fused_text`: so does the decoder
    graph_rounds: tokens to which the buffers of decoding in a CUDA graph are rounded up; 0: no graph
    text_cache:   what is dropped later leaves the caches of earlier layers as well (decode_cache=text)
    dequantised:  bytes of the largest weight of a layer, where it is quantised: it is unpacked to be used
    on_gpu:       whether cuBLAS' workspace is needed
    """

    itemsize: int
    fused: bool = True
    fused_text: bool = True
    graph_rounds: int = 0
    text_cache: bool = False
    dequantised: int = 0
    on_gpu: bool = True


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. encode, assemble, prefill and decode are moments, each above the weights; only the largest
    counts. kv is the cache after prefill, buffers what decoding keeps for it until a longer clip comes."""

    weights: int
    workspace: int
    encode: int
    assemble: int
    prefill: int
    decode: int
    kv: int
    buffers: int

    @property
    def moments(self) -> dict[str, int]:
        """Each moment's name and bytes."""
        return {
            "encode": self.encode,
            "assemble": self.assemble,
            "prefill": self.prefill,
            "decode": self.decode,
        }

    @property
    def largest(self) -> str:
        """The moment that decides the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def working(self) -> int:
        """The peak without the weights."""
        return self.workspace + max(self.moments.values())

    @property
    def peak(self) -> int:
        """Peak bytes of tensors of a first answer; a later one has the buffers of the one before as well."""
        return self.weights + self.working


def estimate(sizes: NetworkSizes, weights: int, work: Workload, engine: Engine) -> MemoryEstimate:
    """What `work` takes on a network of these sizes whose weights take `weights` bytes.

    Raises ValueError unless there is one length a layer.
    """
    if len(work.lengths) != sizes.n_layers:
        raise ValueError(f"{len(work.lengths)} lengths for {sizes.n_layers} layers")
    embeddings = work.held * sizes.hidden * engine.itemsize
    return MemoryEstimate(
        weights=weights,
        workspace=MATMUL_WORKSPACE if engine.on_gpu else 0,
        encode=max(vision_bytes(work, sizes, engine) + embeddings, audio_bytes(work, sizes, engine)),
        assemble=assemble_bytes(work, sizes, engine),
        prefill=prefill_bytes(work, sizes, engine),
        decode=decode_bytes(work, sizes, engine),
        kv=cache_bytes(work.lengths, sizes, engine),
        buffers=buffer_bytes(work, sizes, engine),
    )


# ---- encoders ---------------------------------------------------------------------------------------------


def vision_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """The vision encoder on one batch: pixels + P b (C + 6 D + 4 I), its own D and I, C numbers of a patch.

    In a block, while gate and up are multiplied: the stream (D), what attended (3 D of queries, keys and
    values, D of output), the normed stream (D), and gate and up (2 I) of this block and of the one before,
    whose name still holds them. The patches themselves wait outside. Making the patches takes less: two
    float32 copies of the pixels. Without a kernel for the saliency, its scores are held twice in float32, a
    number for each head and pair of patches in a window, in chunks.
    """
    pixels = 3 * sizes.temporal_patch * sizes.patch**2
    block = work.patches * engine.itemsize * (6 * sizes.vision_hidden + 4 * sizes.vision_mlp)
    making = work.patches * pixels * 2 * FLOAT32
    scoring = 0
    if not (engine.fused and engine.on_gpu):
        one = sizes.vision_heads * work.window_patches**2
        every = sizes.vision_heads * work.window_patches * work.patches
        scoring = 2 * FLOAT32 * max(one, min(every, SALIENCY_SCORES))
        scoring += work.patches * engine.itemsize * 6 * sizes.vision_hidden
    return work.pixel_bytes + work.patches * pixels * engine.itemsize + max(block, making, scoring)


def audio_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """The audio encoder on one batch of T positions: T b (6 D + 3 I), in its own D and I.

    In a layer: as in a block of the vision encoder, with one product of width I for gate and up, that of the
    layer before, and its activation.
    """
    return work.positions * engine.itemsize * (6 * sizes.audio_hidden + 3 * sizes.audio_mlp)


def assemble_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """The sequence in the making: b D (2 H + 2 S), H tokens held and S entering.

    The batches' embeddings and all of them in one tensor, then with the text, then in the prompt's order.
    """
    return engine.itemsize * sizes.hidden * (2 * work.held + 2 * work.entering)


# ---- language model ---------------------------------------------------------------------------------------


def layer_bytes(length: int, sizes: NetworkSizes, engine: Engine) -> int:
    """One decoder layer at its fullest, without its keys and values: S b (4 D + 2 D_q + 2 D_kv + MLP).

    The layer's input and the stream, the normed stream, the attention's output (D_q), queries, keys and
    values before and after rotation (less those that the cache has); then the MLP: gate and up and their
    product, 3 I, or 4 I in transformers' own layer. In a mixture of k experts a token: k (3 D + 3 I), its
    copies sorted by expert, what the experts make of them, and that in the old order.
    """
    queries, keys = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    inner = (3 if engine.fused_text else 4) * (sizes.shared_mlp if sizes.active_experts else sizes.mlp)
    if sizes.active_experts:
        inner += sizes.active_experts * 3 * (sizes.hidden + sizes.mlp)
    width = 4 * sizes.hidden + 2 * queries + 2 * keys + inner
    return length * width * engine.itemsize + engine.dequantised


def prefill_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """The prefill: the largest over its layers of the layer itself and the cache so far, with the sequence
    that came in (S b D), and at its end the logits of one token in float32 and before (V (4 + b)).

    With decode_cache=text earlier caches shrink at every drop; until the first, they are the same.
    """
    given = work.entering * sizes.hidden * engine.itemsize
    most = 0
    for layer, length in enumerate(work.lengths, start=1):
        passed = [length] * layer if engine.text_cache else work.lengths[:layer]
        most = max(most, layer_bytes(length, sizes, engine) + _kv(passed, sizes, engine))
    return given + max(most, _kv(work.lengths, sizes, engine) + sizes.vocab * (FLOAT32 + engine.itemsize))


def decode_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """The buffers of decoding while they are filled: beside them all of the prefill's cache in a graph, the
    longest layer's without one, since a layer moves at a time."""
    cached = [work.lengths[-1]] * sizes.n_layers if engine.text_cache else list(work.lengths)
    moving = cached if engine.graph_rounds else [max(cached)]
    return buffer_bytes(work, sizes, engine) + _kv(moving, sizes, engine)


def cache_bytes(lengths: Sequence[int], sizes: NetworkSizes, engine: Engine) -> int:
    """Keys and values after prefill: 2 b D_kv (sum of S over the layers)."""
    kept = [lengths[-1]] * len(lengths) if engine.text_cache else lengths
    return _kv(kept, sizes, engine)


def buffer_bytes(work: Workload, sizes: NetworkSizes, engine: Engine) -> int:
    """What decoding keeps keys and values in: the cache's lengths with room for the answer, in a graph
    rounded up to a multiple of `graph_rounds`."""
    lengths = [work.lengths[-1]] * sizes.n_layers if engine.text_cache else list(work.lengths)
    room = [length + work.new_tokens for length in lengths]
    if not engine.graph_rounds:
        return _kv(room, sizes, engine)
    rounds = engine.graph_rounds
    return _kv([-(-length // rounds) * rounds for length in room], sizes, engine)


def _kv(lengths: Sequence[int], sizes: NetworkSizes, engine: Engine) -> int:
    return 2 * sum(lengths) * sizes.n_kv_heads * sizes.head_dim * engine.itemsize
