"""What Sparsity's runs share: appendix C of the paper, and where it is silent, its code (configs/, train_script.sh).

Data: FineWeb-Edu with GPT-NeoX's tokenizer (50,280, here as there rounded up to 50,304; tiktoken cannot read it, gpt2
is near). From the code: betas, clipping, the decay to 10 %, std 0.02. Its YAML files decay every parameter, but its
train script sets no_decay_norm_and_bias, which takes precedence: norms and embeddings do not decay.
"""

dataset = "fineweb_edu"
norm = "pre"
vocab_size = 50304
n_layer, n_embd, n_hidden, n_head = 16, 2048, 8192, 16
block_size = 1024
batch_size, gradient_accumulation_steps = 8, 32  # 256 sequences
learning_rate, warmup_iters = 1e-3, 1000
beta1, beta2, weight_decay, grad_clip = 0.9, 0.95, 0.1, 1.0
decay_embedding = False
init_std = embed_std = 0.02
eval_interval = 500
eval_iters = 50
