"""Peri-LN Table 4, 3.2B without embedding and head."""

from config.peri import *

n_layer, n_embd, n_hidden, n_head = 32, 2560, 10240, 16
