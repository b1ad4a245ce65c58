"""GPAS appendix A, 7B: planned for 150K steps, stopped at 40K. Its 60B tokens are the 78.6B positions of 150K steps
without their padding (see gpas.py). Beyond one GPU's memory: torchrun --nproc_per_node=8."""

from config.gpas import *

norm = "gpas_pre"
n_layer, n_embd, n_hidden, n_head = 32, 4096, 11008, 32
learning_rate = 3e-4
warmup_iters, max_iters = 10_000, 150_000
batch_size, gradient_accumulation_steps = 16, 128  # 2048 sequences
grad_clip, gate_clip = 1.0, 0.01
shard = recompute = True
