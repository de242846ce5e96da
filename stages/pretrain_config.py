"""The pretrain stage's Config."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from model.config import ModelConfig
from stages.config_base import StageConfig, operational


class PretrainConfig(StageConfig):
    """One language model from random initialisation."""

    STAGE_VERSION: ClassVar[int] = 1

    model: ModelConfig = Field(ModelConfig(), description="the transformer")
    steps: int = Field(200, gt=0, description="optimizer steps")
    seq_len: int = Field(256, gt=0, description="tokens per training window")
    tokens_per_step: int = Field(4096, gt=0, description="tokens per optimizer step, over all workers")
    micro_batch_size: int = Field(8, gt=0, description="windows per forward pass; the rest is gradient accumulation")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(50, ge=0, description="linear warm-up, in steps")
    min_lr_fraction: float = Field(0.1, ge=0, le=1, description="floor of the cosine decay, as a fraction of lr")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; never of norms, tau and bias")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    grad_clip: float = Field(1.0, gt=0, description="maximum global gradient norm")
    sink_balance: float = Field(
        0.0,
        ge=0,
        description="sink: weight of the head-balance loss that training adds (reported: 0.01); 0 leaves it out",
    )
    seed: int = Field(0, ge=0, description="seed of initialisation and data order")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="compute dtype (autocast); parameters, tau and bias stay float32"
    )
    document_masking: bool = Field(
        False, description="keep attention within documents, positions counted inside each; false: across their borders"
    )
    validation_windows: int = Field(
        64, gt=0, description="windows of seq_len tokens in the validation loss while training"
    )
    validate_every: int = operational(50, gt=0, description="steps between validations")
    checkpoint_every: int = operational(100, gt=0, description="steps between resume checkpoints")
    keep_checkpoints: int = operational(2, gt=0, description="resume checkpoints kept")
    log_every: int = operational(1, gt=0, description="steps between logged training metrics")
    kernel: Literal["auto", "reference", "blockwise", "triton"] = operational(
        "auto", description="backend of Lazy Attention"
    )
    deterministic: bool = operational(
        False,
        description="the same bits from every run on the same GPU, slower; on a CPU runs repeat themselves anyway",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        micro_batch_tokens = self.micro_batch_size * self.seq_len
        if self.tokens_per_step % micro_batch_tokens:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of micro_batch_size * seq_len = "
                f"{self.micro_batch_size} * {self.seq_len} = {micro_batch_tokens}; change one of the three"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.seq_len} is above model.max_seq_len={self.model.max_seq_len}; "
                "raise max_seq_len or lower seq_len"
            )
        if self.document_masking and self.model.mixer == "mamba2":
            raise ValueError(
                "document_masking=true does not go with mixer=mamba2, which carries its state across packed documents; "
                "set document_masking: false in this variant"
            )
        return self

    @property
    def micro_batches_per_step(self) -> int:
        return self.tokens_per_step // (self.micro_batch_size * self.seq_len)
