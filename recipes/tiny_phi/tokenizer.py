"""The base's tokenizer: byte-level BPE of 4096 tokens, digits one by one, with the chat markers of Phi-4-mini.

Digits stay single so that a number is copied sign by sign. The template has no line breaks and no end-of-text after the last turn.
Next: `corpus.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|end|>"
SPECIAL = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", END_OF_TURN)
MAX_POSITIONS = 2048
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer trained on `texts`: the same texts give the same merges."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files so that transformers' AutoTokenizer opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": None, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "unk_token": None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **marks,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    ids = {mark: tokenizer.token_to_id(mark) for mark in (END_OF_TEXT, END_OF_TURN)}
    generation = {"do_sample": False, "eos_token_id": [ids[END_OF_TURN], ids[END_OF_TEXT]], "pad_token_id": ids[END_OF_TEXT]}
    _write_json(folder / "generation_config.json", generation)


def letter_pieces(tokenizer: Tokenizer) -> list[str]:
    """Return the tokens that are letters only, in the order of their ids: material for words that nobody knows."""
    pieces = (tokenizer.decode([number]).strip() for number in range(tokenizer.get_vocab_size()))
    return list(dict.fromkeys(piece for piece in pieces if piece.isalpha()))


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
