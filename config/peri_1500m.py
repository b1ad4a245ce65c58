"""Peri-LN Table 4, 1.5B without embedding and head."""

from config.peri import *

n_layer, n_embd, n_hidden, n_head = 24, 2048, 8192, 16
