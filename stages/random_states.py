"""The state of every global random generator of a process as tensors: torch on the CPU and each GPU, NumPy, Python."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """torch.cpu and torch.cuda.<i> (uint8, torch's own format), numpy.* and python.* (MT19937: key, position, rest)."""
    states = {"torch.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    _, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states["numpy.integers"] = torch.from_numpy(np.array([*key, position, has_gauss], dtype=np.int64))
    states["numpy.gauss"] = torch.tensor([gauss], dtype=torch.float64)
    version, integers, next_gauss = random.getstate()
    states["python.integers"] = torch.tensor([version, *integers], dtype=torch.int64)
    states["python.gauss"] = torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64)
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put the result of `random_states` back. States of GPUs that this process does not have are left out."""
    torch.set_rng_state(states["torch.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"torch.cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"torch.cuda.{i}"], i)
    *key, position, has_gauss = states["numpy.integers"].tolist()
    gauss = states["numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    version, *integers = states["python.integers"].tolist()
    next_gauss = states["python.gauss"].tolist()
    random.setstate((version, tuple(integers), next_gauss[0] if next_gauss else None))


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on afterwards as if nothing had been."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
