"""The pretrain stage's Config."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from lazypipe.model.config import ModelConfig
from lazypipe.stages.config import StageConfig, operational


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
    schedule: Literal["cosine", "wsd", "constant", "linear"] = Field(
        "cosine", description="shape of the learning rate after the warm-up; wsd: constant, then a linear decay"
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of all steps in the decay at the end")
    min_lr_fraction: float = Field(
        0.1, ge=0, le=1, description="what the rate decays to at the last step, as a fraction of lr"
    )
    tau_bias_lr_multiplier: float = Field(
        1.0, gt=0, description="lazy: learning rate of tau and the distance bias, as a multiple of the others'"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; never of norms, tau and bias")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    grad_clip: float = Field(1.0, gt=0, description="maximum global gradient norm")
    spike_sigma: float | None = Field(
        None, gt=0, description="skip a step whose loss or gradient norm is this many sigma above the mean; null: none"
    )
    spike_window: int = Field(128, gt=1, description="finite steps that mean and sigma of spike_sigma are taken over")
    sink_balance: float = Field(
        0.0,
        ge=0,
        description="sink: weight of the head-balance loss that training adds (reported: 0.01); 0 leaves it out",
    )
    z_loss: float = Field(
        0.0, ge=0, description="weight of mean(logsumexp(logits)^2) that training adds (PaLM: 1e-4); 0 leaves it out"
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
    keep_checkpoint_every: int | None = operational(
        None, gt=0, description="checkpoints of steps that it divides are kept as well; null: none"
    )
    async_checkpoints: bool = operational(
        True, description="write checkpoints in the background, from a copy of the state in host memory"
    )
    log_every: int = operational(1, gt=0, description="steps between logged training metrics")
    max_nonfinite_in_a_row: int = operational(
        10, gt=0, description="steps in a row without a finite loss and gradient norm after which training gives up"
    )
    loss_chunk_tokens: int | None = operational(
        None, gt=0, description="predictions whose logits exist at a time; null: all up to 256 MiB of logits"
    )
    activation_checkpointing: Literal["none", "block", "selective"] = operational(
        "none", description="compute blocks again in the backward pass: all of them, or what is cheap; saves memory"
    )
    compile: bool = operational(
        False, description="torch.compile the blocks: the first step takes longer, the others less"
    )
    kernel: Literal["auto", "reference", "blockwise", "triton"] = operational(
        "auto", description="backend of Lazy Attention"
    )
    parallel: Literal["replicate", "fsdp"] = operational(
        "replicate", description="what several workers hold: the whole model each, or shards of its matrices (FSDP2)"
    )
    reduction: Literal["all_reduce", "ordered"] = operational(
        "all_reduce",
        description="how gradients are summed; ordered: in the order of the micro-batches, so that any number of "
        "workers of equally many threads gives the same bits",
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
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"schedule=wsd with warmup_steps={self.warmup_steps} and decay_fraction={self.decay_fraction:g}, "
                f"{self.decay_steps} steps of decay, needs {self.warmup_steps + self.decay_steps} steps, but "
                f"steps={self.steps}; lower warmup_steps or decay_fraction"
            )
        if self.document_masking and not self.model.mechanism.packs_documents:
            raise ValueError(
                f"document_masking=true does not go with mixer={self.model.mixer}, which carries its state across "
                "packed documents; set document_masking: false in this variant"
            )
        if self.parallel == "fsdp" and not self.model.mechanism.shardable:
            raise ValueError(
                f"parallel=fsdp shards block by block, which does not go with mixer={self.model.mixer}: baselines are "
                "not made of our blocks, and a side sequence passes through blocks out of their turn; set "
                "parallel: replicate in this variant"
            )
        return self

    @property
    def decay_steps(self) -> int:
        """Steps in the decay of wsd, at least one."""
        return max(1, round(self.decay_fraction * self.steps))

    @property
    def tau_bias_apart(self) -> bool:
        """Whether tau and the distance bias learn at a rate of their own."""
        row = self.model.mechanism
        return (row.has_tau(self.model) or row.has_bias(self.model)) and self.tau_bias_lr_multiplier != 1

    @property
    def balances_sinks(self) -> bool:
        """Whether the head-balance loss is part of the objective."""
        return self.sink_balance > 0 and self.model.mechanism.sink_logit

    @property
    def micro_batches_per_step(self) -> int:
        return self.tokens_per_step // (self.micro_batch_size * self.seq_len)
