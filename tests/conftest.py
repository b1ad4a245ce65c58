import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background hands on that Ctrl-C is ignored
torch.set_num_threads(1)  # models this small wait for threads longer than they compute


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed, whatever ran before it."""
    torch.manual_seed(0)
