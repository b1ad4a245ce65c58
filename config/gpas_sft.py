"""GPAS section 4.1, fine-tuning of the 1B models: `python train.py config/gpas_sft.py --init_from=out-gpas_pre`.

Data: Commonsense170K, prompts without loss, with the tokenizer of the run that is tuned (T5's); offline stand-in: local
.jsonl of prompts and answers. 4 epochs with LISA and frozen gates at lr 3e-4. Neither the batch (128 here), the warm-up
(none), the decay (cosine to 0) LISA's two numbers (2 layers of each 20 steps, as in its paper) nor clipping (1.0 here) are stated."""

dataset = "commonsense170k"
batch_size, gradient_accumulation_steps = 16, 8
learning_rate, min_lr, warmup_iters = 3e-4, 0.0, 0
max_iters = 4 * 170_420 // 128
beta1, beta2, weight_decay = 0.9, 0.999, 0.0
grad_clip = 1.0
lisa_layers, lisa_interval = 2, 20
eval_interval = 500
eval_iters = 50
