"""GPAS Table 1, 130M."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 12, 768, 2048, 12
learning_rate = 1e-3
warmup_iters, max_iters = 2000, 20_000
