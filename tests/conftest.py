"""Settings of every test: this folder is importable, one thread, deterministic."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be downloaded
sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import the zoo under any import mode

import pytest
import torch

torch.set_num_threads(1)  # tiny networks: threads cost more than they give, and sums stay in one order


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the process as it found it."""
    torch.manual_seed(0)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == grad, "the test left gradients switched"
    torch.set_num_threads(threads)
