"""Peri-LN appendix D.2, fine-tuning on LIMA: 1,000 conversations, 15 epochs, batches of 128, lr 1e-5, cosine.

Data: with the tokenizer of the run that is tuned (cl100k_base); offline stand-in: local .jsonl of prompts and answers.
A row is one conversation, of any length that the model was trained on. 15 x 1,000 / 128 are about 117 steps; some more
with the 30 longer dialogues of the published set, some fewer for what is held out (prepare_data.py --val_fraction). Not
stated: Adam's betas (here its defaults), no weight decay, decay to 0, no warm-up, clipping at 1.0.
"""

dataset = "lima"
rows = "documents"
block_size = 8192
batch_size, gradient_accumulation_steps = 1, 128
epochs = 15.0
learning_rate, min_lr, warmup_iters = 1e-5, 0.0, 0
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
grad_clip = 1.0
eval_interval = 8
eval_iters = 50  # conversations, or as many as are held out
recompute = True
