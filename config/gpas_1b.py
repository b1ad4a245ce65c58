"""GPAS Table 1, 1B."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 24, 2048, 5461, 32
learning_rate = 5e-4
warmup_iters, max_iters = 10_000, 100_000
