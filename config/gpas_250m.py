"""GPAS Table 1, 250M."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 24, 768, 2560, 16
learning_rate = 1e-3
warmup_iters, max_iters = 4000, 40_000
