"""GPAS appendix, 7B (Pre-LN and Pre + GPAS; planned for 150K steps, stopped at 40K; they are 79B tokens of length 256,
the paper says 60B). C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0. Beyond one GPU's memory: torchrun
--nproc_per_node=8. The baseline: --norm=pre --gate_clip=0."""

from config.gpas import *

norm = "gpas_pre"
n_layer, n_embd, n_hidden, n_head = 32, 4096, 11008, 32
learning_rate, min_lr = 3e-4, 3e-5
warmup_iters, max_iters = 10_000, 150_000
batch_size, gradient_accumulation_steps = 16, 128  # 2048 sequences
grad_clip, gate_clip = 1.0, 0.01
shard = recompute = True
