"""The word-level tokenizer of the embedded model, as files in the ordinary Hugging Face layout.

A word, a punctuation mark and a line break are one token each; text is lower-cased and words that the toy
world does not know become <unk>. `encode` is the same in plain Python, for the workers of the trainer.
"""

import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from seats_cli.demo.nouns import COLOURS, GLYPHS, MOTIONS, NUMBERS, SHAPES, SOUNDS, WORDS
from seats_cli.demo.question_types import DENSE, TYPES
from seats_cli.demo.questions import LETTERS, STYLES

UNKNOWN = "<unk>"
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>"),
    *("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", UNKNOWN),
)
EXTRA = (
    "\n . , ? ! : ; ' - ( ) system user assistant you are a helpful assistant nothing yes no move moves stays"
)

# Common words of the same questions in other mouths: known to the tokenizer, seldom or never trained.
SPARE = "an and answer at be both can clip does during each hear in it me or please see tell there video who"

_PIECES = re.compile(r"\n|\w+|[^\w\s]")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Token to id: special tokens first, then the words of the world in the order of its tables."""
    nouns = (*LETTERS, *SHAPES, *COLOURS, *MOTIONS, *GLYPHS, *WORDS, *SOUNDS, *NUMBERS)
    texts = [text for row in (*TYPES, *DENSE) for text in row.paraphrases]
    texts += [*STYLES, EXTRA, SPARE, "first last"]
    pieces = [piece for text in texts for piece in _PIECES.findall(re.sub(r"\{\w+\}", " ", text).lower())]
    ordered = dict.fromkeys([*SPECIAL, "\n", *(p for p in EXTRA.split() if not p.isalnum()), *nouns, *pieces])
    return {token: i for i, token in enumerate(ordered)}


def encode(text: str) -> list[int]:
    """Ids of plain text (special tokens are not recognised in it), equal to the tokenizer's."""
    ids = vocabulary()
    unknown = ids[UNKNOWN]
    return [ids.get(piece, unknown) for piece in _PIECES.findall(text.lower())]


def build_tokenizer_files(folder: str | Path) -> None:
    """Write the four tokenizer files, the chat template among them, into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "tokenizer.json": _tokenizer_document(),
        "tokenizer_config.json": _config_document(),
        "special_tokens_map.json": _special_map(),
    }
    for name, document in documents.items():
        (folder / name).write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_tokenizer() -> Any:
    """The tokenizer as transformers loads it from the files."""
    from transformers import AutoTokenizer  # slow to import, and not needed by `encode`

    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer_files(folder)
        return AutoTokenizer.from_pretrained(folder)


def _tokenizer_document() -> dict[str, Any]:
    vocab = vocabulary()
    words = {
        "type": "Split",
        "pattern": {"Regex": r"\n|\w+|[^\w\s]"},
        "behavior": "Isolated",
        "invert": False,
    }
    blanks = {"type": "Split", "pattern": {"Regex": r"[^\S\n]+"}, "behavior": "Removed", "invert": False}
    added = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in SPECIAL
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [blanks, words]},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN},
    }


def _special_map() -> dict[str, Any]:
    return {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": UNKNOWN,
        "additional_special_tokens": [token for token in SPECIAL if token != UNKNOWN],
    }


def _config_document() -> dict[str, Any]:
    return {
        **_special_map(),
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
