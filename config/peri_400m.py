"""Peri-LN Table 4, 400M without embedding and head."""

from config.peri import *

n_layer, n_embd, n_hidden, n_head = 24, 1024, 4096, 8
