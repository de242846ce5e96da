"""SentencePiece .model files as `tokenizers` tokenizers.

transformers reads vocabulary, scores, merges and special pieces from the file; the normaliser, which its generic
converter fixes to one model family's, is rebuilt here from what the file itself asks for (dummy prefix, white space,
character map). The result is compared with SentencePiece on a few lines, and a difference is a warning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lazypipe.stages.contract import UserError, Warn

_SPACE = "▁"
_PROBES = (
    "Hello world",
    "  Two  spaces, and\ta tab.",
    "Line one\nLine two\n\n",
    "naïve café — 42 % of “it”",
    "日本 🙂",
)
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def pieces(path: Path) -> tuple[list[str], list[str]]:
    """(all pieces in order of id, control pieces). UserError when the file is no SentencePiece model."""
    model = _read(path)
    return [piece.piece for piece in model.pieces], [p.piece for p in model.pieces if p.type == _CONTROL]


def eos_piece(path: Path) -> str | None:
    """The piece the model itself uses as EOS, None when it was trained without one."""
    trainer = _read(path).trainer_spec
    return str(trainer.eos_piece) if trainer.eos_id >= 0 else None


def convert(path: Path, warn: Warn) -> Any:
    """A tokenizers.Tokenizer with the model's ids. UserError for model types other than Unigram and BPE."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    proto = _read(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise UserError(
            f"tokenizer.path: {str(path)!r} is a SentencePiece model of a kind that has no equal among tokenizers "
            "(only Unigram and BPE with white space as prefix have); train another or use a tokenizer.json"
        )
    found: Any = SentencePieceExtractor(str(path)).extract(None)
    if trainer.model_type == _UNIGRAM:
        tokenizer = Tokenizer(models.Unigram(found["vocab"], found["unk_id"], trainer.byte_fallback))
    else:
        tokenizer = Tokenizer(
            models.BPE(
                found["vocab"],
                found["merges"],
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    tokenizer.add_tokens(found["additional_special_tokens"])

    steps: list[Any] = []
    if normalizer.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # Words can be encoded one by one, and are then cached, unless a piece spans a space.
    if not any(_SPACE in piece.piece[1:] for piece in proto.pieces):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=True)
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    _compare(tokenizer, path, warn)
    return tokenizer


def _compare(tokenizer: Any, path: Path, warn: Warn) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    for text in _PROBES:
        expected, got = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if expected != got:
            warn(
                f"{path.name}: the converted tokenizer differs from SentencePiece on {text!r} ({got} instead of "
                f"{expected}); the converted one is used and saved with the model"
            )
            return


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"tokenizer.path: {str(path)!r} is not a SentencePiece model") from None
    if not model.pieces:
        raise UserError(f"tokenizer.path: {str(path)!r} is not a SentencePiece model (it holds no pieces)")
    return model
