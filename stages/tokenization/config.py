"""The tokenize stage's Config: where text comes from and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lazypipe.stages.config import StageConfig, operational
from lazypipe.stages.data.remote import is_uri
from lazypipe.stages.data.sources import EmbeddedSource, FilesSource, HubSource


class TrainTokenizer(StageConfig):
    kind: Literal["train"] = Field("train", description="train a byte-level BPE on the training documents")
    vocab_size: int = Field(2048, ge=257, description="number of tokens: 256 bytes + <|endoftext|> + merges")


class FileTokenizer(StageConfig):
    kind: Literal["file"] = Field(description="load a tokenizer from a file")
    path: str = operational(min_length=1, description="a tokenizer.json (tokenizers library) or a SentencePiece .model")
    eos_token: str | None = Field(None, description="end-of-document token; found by its usual names when null")


class HubTokenizer(StageConfig):
    kind: Literal["hub"] = Field(description="load a tokenizer from the Hugging Face hub")
    name: str = Field(min_length=1, description="repository name, e.g. EleutherAI/pythia-70m")
    revision: str | None = operational(
        None, description="commit, tag or branch; the resolved commit enters the fingerprint"
    )
    eos_token: str | None = Field(None, description="end-of-document token; the tokenizer's own when null")


class Filters(StageConfig):
    min_chars: int = Field(0, ge=0, description="leave out documents of fewer characters")
    exact_duplicates: Literal["keep", "drop"] = Field(
        "keep", description="keep or drop copies of a document; the first in input order stays"
    )


class TokenizeConfig(StageConfig):
    """Text in, token shards out."""

    STAGE_VERSION: ClassVar[int] = 1

    source: Annotated[EmbeddedSource | FilesSource | HubSource, Field(discriminator="kind")] = Field(
        EmbeddedSource(), description="where the text comes from"
    )
    tokenizer: Annotated[TrainTokenizer | FileTokenizer | HubTokenizer, Field(discriminator="kind")] = Field(
        TrainTokenizer(), description="how text becomes tokens"
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="fraction of the bytes held out, whole documents in order of sha256(text)"
    )
    token_dtype: Literal["uint16", "uint32"] = Field("uint16", description="storage type of a token id")
    invalid_utf8: Literal["replace", "refuse"] = Field(
        "replace", description="what to do with bytes that are not UTF-8: replace and count, or refuse"
    )
    filters: Filters = Field(Filters(), description="which documents are left out")
    shard_bytes: int = operational(64 * 2**20, ge=2**12, description="approximate size of a token shard in bytes")
    copy_to: str | None = operational(
        None, min_length=1, description="URI of a folder (s3://, gs://, file://) the stored corpus is copied to"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.copy_to is not None and not is_uri(self.copy_to):
            raise ValueError(
                f"copy_to={self.copy_to} is not a URI; give one such as s3://BUCKET/FOLDER or file:///data/corpus"
            )
        vocab_size = getattr(self.tokenizer, "vocab_size", 0)
        if self.token_dtype == "uint16" and vocab_size > 2**16:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} does not fit token_dtype=uint16 (at most 65536); "
                "set token_dtype: uint32"
            )
        return self
