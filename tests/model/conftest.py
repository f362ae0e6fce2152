"""Tiny tokenizers, trained here."""
# ruff: noqa: RUF001, S106 - foreign scripts are meant, and these tokens are no passwords

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it? He'll say: 3.14159 in 2026!",
    "def f(x):\n    return x ** 2  # two   spaces\n\n\tprint(f(10))",
    "Das große Übel; déjà vu; żółć; naïve café",
    "日本語のテキスト。中文文本，测试。한국어 문장입니다.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم",
    "हिन्दी में पाठ। ภาษาไทย 👨‍👩‍👧 👍🏽 e\u0301 🇫🇷",
]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture(scope="session")
def byte_level_backend() -> tokenizers.Tokenizer:
    """GPT-2's kind: byte-level BPE. Treat as read-only."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_fallback_backend() -> Callable[[str], tokenizers.Tokenizer]:
    """Llama 2's kind: BPE over characters with bytes for the rest. `style` is how leading spaces are handled."""

    def make(style: str) -> tokenizers.Tokenizer:
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Metaspace()
        learner.train_from_iterator(SENTENCES[:3], trainers.BpeTrainer(vocab_size=250, show_progress=False))
        learned = sorted(learner.get_vocab(), key=learner.token_to_id)
        names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
        vocabulary = {name: index for index, name in enumerate(names)}
        merges = [pair for name in learned if (pair := _merge(name, learner)) is not None]
        bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        backend = tokenizers.Tokenizer(bpe)
        if style == "strip":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            last = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *last])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
            metaspace = decoders.Metaspace(prepend_scheme=style)
            backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
        backend.add_special_tokens(SPECIAL_TOKENS)
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return backend

    return make


def _merge(name: str, learner: tokenizers.Tokenizer) -> tuple[str, str] | None:
    parts = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
    return next((pair for pair in parts if all(learner.token_to_id(part) is not None for part in pair)), None)


@pytest.fixture(scope="session")
def sentencepiece_model() -> Callable[..., bytes]:
    """Trains a SentencePiece model; options are those of its trainer."""
    made: dict[str, bytes] = {}

    def make(**options: object) -> bytes:
        key = repr(sorted(options.items()))
        if key not in made:
            file = io.BytesIO()
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(SENTENCES * 5),
                model_writer=file,
                vocab_size=480,
                hard_vocab_limit=False,
                minloglevel=2,
                **{"byte_fallback": True, "character_coverage": 0.98, "normalization_rule_name": "identity", **options},
            )
            made[key] = file.getvalue()
        return made[key]

    return make
