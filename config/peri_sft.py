"""Peri-LN appendix D.2, fine-tuning on LIMA: `python train.py config/peri_sft.py --init_from=out-peri`.

1,000 conversations, 15 epochs, batches of 128, lr 1e-5 with a cosine (to 0, without warm-up, clipped at 1.0: not stated). The tokenizer
of the run that is tuned (cl100k_base); offline stand-in: local .jsonl of prompts and answers."""

dataset = "lima"
batch_size, gradient_accumulation_steps = 1, 128
learning_rate, min_lr, warmup_iters = 1e-5, 0.0, 0
max_iters = 15 * 1000 // 128
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
grad_clip = 1.0
eval_interval = 8
eval_iters = 50
