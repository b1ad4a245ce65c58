"""What Sparsity's runs share (appendix C). Data: FineWeb-Edu with GPT-NeoX's tokenizer (50,280, here as there rounded
up to 50,304; tiktoken cannot read it, gpt2 is near); offline stand-in: --dataset=stdlib --vocab_size=0, bytes. From its
code: betas, clipping, the decay to 10 %, std 0.02, weight decay on every parameter."""

dataset = "fineweb_edu"
norm = "pre"
vocab_size = 50304
n_layer, n_embd, n_hidden, n_head = 16, 2048, 8192, 16  # of all but the MoE, depth and recipe runs
block_size = 1024
batch_size, gradient_accumulation_steps = 8, 32  # 256 sequences
learning_rate, min_lr, warmup_iters = 1e-3, 1e-4, 1000
beta1, beta2, grad_clip = 0.9, 0.95, 1.0
weight_decay, decay_vectors = 0.1, True
init_std = embed_std = 0.02
eval_interval = 500
eval_iters = 50


def steps(tokens, sequences, length):
    """Steps that take so many tokens."""
    return round(tokens / (sequences * length))
