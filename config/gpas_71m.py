"""GPAS Table 1, 71M."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 12, 512, 1368, 8
learning_rate = 1e-3
warmup_iters, max_iters = 1000, 10_000
