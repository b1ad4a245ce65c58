"""GPAS section 4.1, fine-tuning of the 1B models: Commonsense170K, 4 epochs, learning rate 3e-4, frozen gates, LISA.

Data: prompts without loss, with the tokenizer of the run that is tuned (T5's); offline stand-in: local .jsonl of
prompts and answers. GPAS's README gives LISA 4 layers and an interval of 3, and refers for the rest to OwLore, whose
LISA script takes batches of 16 windows of 512 tokens, into which it packs the examples: so here, and an epoch is a pass
over the windows. One example a row is --rows=documents. Not stated, and inferred from that script's defaults: no
warm-up, decay to 0 (linear there, a cosine here), clipping at 1.0.
"""

dataset = "commonsense170k"
block_size = 512
batch_size, gradient_accumulation_steps = 2, 8  # 16 windows
epochs = 4.0
learning_rate, min_lr, warmup_iters = 3e-4, 0.0, 0
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
grad_clip = 1.0
lisa_layers, lisa_interval = 4, 3
eval_interval = 500
eval_iters = 50
