"""Peri-LN appendix D.2, fine-tuning on LIMA: 1,000 conversations, 15 epochs, batches of 128, lr 1e-5, cosine.

Data: with the tokenizer of the run that is tuned (cl100k_base); offline stand-in: local .jsonl of prompts and answers.
A row here is a window into which conversations are packed, so the batch and the length are set in tokens: LIMA's paper
counts 750,000 in its conversations, hence 96,000 in 128 of them. Not stated: decay to 0, no warm-up, clipping at 1.0.
"""

dataset = "lima"
block_size = 1024
batch_size, gradient_accumulation_steps = 4, 24  # 96 windows: about 128 conversations
max_tokens = 15 * 750_000
learning_rate, min_lr, warmup_iters = 1e-5, 0.0, 0
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
grad_clip = 1.0
eval_interval = 8
eval_iters = 50
