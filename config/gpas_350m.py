"""GPAS Table 1, 350M."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 24, 1024, 2736, 16
learning_rate = 5e-4
warmup_iters, max_iters = 6000, 60_000
