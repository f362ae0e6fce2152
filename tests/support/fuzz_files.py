"""Damaged model and tokenizer files: each is opened as a server opens it, and is read or refused with a ModelError.

A process of its own with a bound on memory and on the time for each file; a crash or a hang of it is the finding.
usage: python -m tests.support.fuzz_files [--count N] [--first SEED] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizers
from gguf import GGMLQuantizationType as GgmlType
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from pagestream.model.chat_template import TemplateError
from pagestream.model.checkpoint import check_tensors, open_checkpoint
from pagestream.model.errors import ModelError
from pagestream.model.hf_config import parse_hf_config
from pagestream.model.weights import expected_tensors

SECONDS = 20  # for one file; the usual is 0.01
MEMORY = 6 * 2**30  # address space, of which the libraries alone take 3 GiB

_SENTENCES = ["The quick brown fox jumps over the lazy dog.", "naïve café 日本語 Привет 🎉 0123456789"] * 5
_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
_CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": [2], "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_samples(folder: Path) -> list[Path]:
    """A folder with tokenizer.json, one with tokenizer.model, a GGUF file of each kind of vocabulary."""
    tensors = expected_tensors(parse_hf_config(_CONFIG))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in tensors.items()}
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_SENTENCES, trainer)
    made = folder / "sentencepiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES), model_prefix=str(made), vocab_size=360, hard_vocab_limit=False,
        minloglevel=2, byte_fallback=True, model_type="bpe",
    )  # fmt: skip
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": _TEMPLATE}
    for name in ("fast", "pieces"):
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(_CONFIG))
        (folder / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    backend.save(str(folder / "fast" / "tokenizer.json"))
    shutil.move(f"{made}.model", folder / "pieces" / "tokenizer.model")
    (folder / "pieces" / "added_tokens.json").write_text(json.dumps({"<tool>": 360}))
    names = sorted(backend.get_vocab(), key=backend.token_to_id)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    _write_gguf(folder / "bpe.gguf", weights, "gpt2", names, merges)
    processor = sentencepiece.SentencePieceProcessor(str(folder / "pieces" / "tokenizer.model"))
    _write_gguf(folder / "spm.gguf", weights, "llama", [processor.IdToPiece(i) for i in range(len(processor))], [])
    return [folder / "fast", folder / "pieces", folder / "bpe.gguf", folder / "spm.gguf"]


def _write_gguf(path: Path, weights: dict[str, Any], kind: str, tokens: list[str], merges: list[str]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    types = [gguf.TokenType.CONTROL if token in ("<s>", "</s>") else gguf.TokenType.NORMAL for token in tokens]
    types[0] = gguf.TokenType.UNKNOWN
    if kind == "llama":
        types = [gguf.TokenType.BYTE if token.startswith("<0x") else t for token, t in zip(tokens, types, strict=True)]
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_TEMPLATE)
    for name, values in weights.items():
        stem, suffix = name.rsplit(".", 1)
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        short = top.get(stem) or f"blk.0.{_GGUF_NAMES[stem.removeprefix('model.layers.0.')]}"
        quant = GgmlType.F32 if values.ndim == 1 else (GgmlType.Q8_0, GgmlType.Q4_1, GgmlType.F16)[len(short) % 3]
        data = values if quant is GgmlType.F32 else gguf.quants.quantize(values, quant)
        writer.add_tensor(f"{short}.{suffix}", data, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four damages, most of them near the front, where headers are."""
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not damaged:
            break
        end = len(damaged) if chance.random() < 0.4 else min(len(damaged), chance.choice((16, 256, 4096)))
        place = chance.randrange(end)
        _DAMAGES[chance.randrange(len(_DAMAGES))](damaged, place, chance)
    return bytes(damaged)


def _flip(data: bytearray, place: int, chance: random.Random) -> None:
    data[place] ^= 1 << chance.randrange(8)


def _noise(data: bytearray, place: int, chance: random.Random) -> None:
    data[place : place + chance.choice((1, 4, 64))] = chance.randbytes(chance.choice((0, 1, 4, 64)))


def _number(data: bytearray, place: int, chance: random.Random) -> None:
    size = chance.choice((1, 4, 8))
    value = chance.choice((0, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1))
    data[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def _cut(data: bytearray, place: int, _chance: random.Random) -> None:
    del data[place:]


def _repeat(data: bytearray, place: int, chance: random.Random) -> None:
    piece = data[place : place + chance.choice((1, 16, 1024))]
    data[place:place] = piece * chance.choice((1, 2, 50))


_DAMAGES: tuple[Callable[[bytearray, int, random.Random], None], ...] = (_flip, _noise, _number, _cut, _repeat)
_ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x00", "é" * 99, [], [[]],
    [0], {}, {"a": 1}, {"content": 1}, "<s>", [{"name": "default", "template": "{{"}], {"1": {"content": "<s>"}},
    {"999999999999": {"content": "y"}}, {"y": 10**12},
)  # fmt: skip


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Still JSON: one to three values somewhere inside become something else, vanish, or stand under another name."""
    root = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        holder = root
        while isinstance(holder, dict | list) and holder:
            place = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            inner = holder[place]
            if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
                _replace(holder, place, chance)
                break
            holder = inner
    return json.dumps(root).encode()


def _replace(holder: Any, place: Any, chance: random.Random) -> None:
    match chance.randrange(4):
        case 0:
            del holder[place]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("x", "type", "bos_token", "added_tokens_decoder", "chat_template"))] = holder[place]
        case _:
            holder[place] = deepcopy(chance.choice(_ODD))  # it may be damaged further


def open_as_a_server_does(path: Path) -> None:
    """Everything of the files that is foreign: headers, tensors, vocabulary, template. Raises ModelError."""
    checkpoint = open_checkpoint(path)
    check_tensors(checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    for name in checkpoint.tensors:
        checkpoint.read(name)
    for name in checkpoint.group_bits:
        checkpoint.read_groups(name)
    ids = tokenizer.encode("The café 日本 <s>\x00", add_special_tokens=True)
    tokenizer.decode(ids)
    if tokenizer.chat_template is not None:
        with contextlib.suppress(TemplateError):
            tokenizer.chat_template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)


def fuzz(samples: list[Path], seeds: range, report: Callable[[int], None]) -> dict[str, Any]:
    """Opens one damaged file for each seed. What is neither read nor refused is listed."""
    outcomes: Counter[str] = Counter()
    untyped: list[str] = []
    slowest = 0.0
    for seed in seeds:
        report(seed)
        chance = random.Random(seed)
        sample = chance.choice(samples)
        files = sorted(sample.iterdir()) if sample.is_dir() else [sample]
        file = chance.choice(files)
        whole = file.read_bytes()
        changes = mutate_json if file.suffix == ".json" and chance.random() < 0.7 else mutate
        file.write_bytes(changes(whole, chance))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        started = time.monotonic()
        try:
            open_as_a_server_does(sample)
            outcome = "read"
        except ModelError:
            outcome = "refused"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = "untyped"
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "?"
            untyped.append(f"seed {seed}, {file.name}: {type(error).__name__} at {where}: {str(error)[:200]}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            file.unlink()
            file.write_bytes(whole)
        slowest = max(slowest, time.monotonic() - started)
        outcomes[f"{file.name}: {outcome}"] += 1
    return {
        "files": len(seeds),
        "first_seed": seeds.start,
        "outcomes": dict(sorted(outcomes.items())),
        "untyped": untyped,
        "slowest_seconds": round(slowest, 3),
        "resident_mb_peak": _resident_mb_peak(),
    }


def report_result(name: str, result: dict[str, Any], out: Path | None) -> None:
    """As the last line of the output, and with date, commit and machine in a file."""
    if out is None:
        print(json.dumps(result))  # noqa: T201 - read by a test
        return
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from record import save

    save(name, result, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first file")
    parser.add_argument("--progress", type=Path, help="file for the seed in work")
    parser.add_argument("--out", type=Path, help="folder for the result")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        samples = write_samples(Path(folder))
        for sample in samples:
            open_as_a_server_does(sample)  # undamaged

        def report(seed: int) -> None:
            if options.progress:
                options.progress.write_text(str(seed))

        result = fuzz(samples, range(options.first, options.first + options.count), report)
    report_result("fuzz_files", result, options.out)
    sys.exit(1 if result["untyped"] else 0)


def _resident_mb_peak() -> int:
    """Of this process alone: getrusage's begins with that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


if __name__ == "__main__":
    main()
