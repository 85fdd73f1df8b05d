"""The trainer's own forward pass equals the stock modules whose parameters it uses."""

import pytest
import torch

from seats_cli.demo.checkpoint import new_thinker, thinker_config
from seats_cli.demo.network import PackedMask, TrainingForward, dense_attend, split_attend
from seats_cli.demo.packing import vision_grid

GEOMETRY = {
    "text": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "mrope_section": [4, 6, 6],
    },
    "vision": {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "audio": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
}
WORDS = (
    *("<|endoftext|>", "<|im_end|>", "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "user", "a", "b"),
)


@pytest.fixture(scope="module")
def thinker():
    config = thinker_config(GEOMETRY, {word: index for index, word in enumerate(WORDS)})
    thinker = new_thinker(config, seed=3).eval()
    for p in thinker.parameters():  # biases and norms must matter too
        if p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.1)
    return thinker


@torch.no_grad()
def test_video_tokens_equal_the_stock_tower(thinker):
    grid = vision_grid(thinker, 112, torch.device("cpu"))
    patches = torch.randn(3, 64, 1176)
    ours = TrainingForward(thinker).encode_video(patches, grid.window_index, grid.cos, grid.sin, grid.window)
    stock = thinker.model.visual(patches.flatten(0, 1), grid_thw=torch.tensor([[3, 8, 8]])).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), stock, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_audio_tokens_equal_the_stock_encoder(thinker):
    mel = torch.randn(128, 600)
    chunks = mel.unflatten(1, (3, 200)).transpose(0, 1)
    ours = TrainingForward(thinker).encode_audio(chunks).flatten(0, 1)
    stock = thinker.model.audio_tower(mel, feature_lens=torch.tensor([600])).last_hidden_state
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_packed_questions_equal_separate_chats(thinker):
    """Two question blocks behind one prefix see what each would see alone, in every layer."""
    text = thinker.model.language_model
    prefix, blocks = 9, (5, 7)
    hidden = torch.randn(1, prefix + sum(blocks), 64)
    position = torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in blocks)])
    doc = torch.cat([torch.full((prefix,), -1), torch.full((blocks[0],), 0), torch.full((blocks[1],), 1)])
    mask = PackedMask(doc[None], torch.zeros(len(doc), dtype=torch.bool), first=0)
    dropped = torch.zeros(3, 1, dtype=torch.bool)
    ours, _ = TrainingForward(thinker).decode(
        hidden, position.expand(3, 1, -1), dense_attend, mask, dropped, 1
    )
    start = prefix
    for n in blocks:
        rows = torch.cat([torch.arange(prefix), torch.arange(start, start + n)])
        alone = text(
            inputs_embeds=hidden[:, rows], position_ids=position[rows].expand(3, 1, -1)
        ).last_hidden_state
        torch.testing.assert_close(ours[:, start : start + n], alone[:, prefix:], atol=1e-5, rtol=1e-4)
        start += n


@torch.no_grad()
def test_late_removal_equals_dropping_the_tokens(thinker):
    """Audio-visual tokens hidden from layer 3 on = removed from the sequence before layer 3."""
    text = thinker.model.language_model
    hidden = torch.randn(1, 12, 64)
    position = torch.arange(12).expand(3, 1, -1)
    is_av = torch.zeros(12, dtype=torch.bool)
    is_av[2:8] = True
    doc = torch.full((1, 12), -1)
    dropped = torch.tensor([[False], [False], [True]])
    forward = TrainingForward(thinker)
    ours, _ = forward.decode(hidden, position, dense_attend, PackedMask(doc, is_av, 8), dropped, 1)
    cos_sin = text.rotary_emb(hidden, position)
    x = hidden
    for layer in text.layers[:2]:
        x = layer(x, position_embeddings=cos_sin)
    keep = ~is_av
    x = text.layers[2](x[:, keep], position_embeddings=tuple(t[:, keep] for t in cos_sin))
    torch.testing.assert_close(ours[:, keep], text.norm(x), atol=1e-5, rtol=1e-4)


def test_split_attention_equals_the_reference():
    torch.manual_seed(0)
    q = torch.randn(3, 4, 30, 16)
    k, v = torch.randn(2, 3, 2, 30, 16).unbind(0)
    is_av = torch.zeros(30, dtype=torch.bool)
    is_av[4:16] = True
    doc = torch.full((3, 30), -1)
    doc[:, 18:23], doc[:, 23:] = 0, 1
    dropped = torch.tensor([True, False, True])
    reference = dense_attend(q, k, v, dropped, doc, is_av, 16)
    torch.testing.assert_close(
        split_attend(q, k, v, dropped, doc, is_av, 16), reference, atol=1e-6, rtol=1e-5
    )
