"""A small LowRank GPT on the Python standard library's source, for two CPU cores and five minutes."""
n_layer = 4
n_embd = 256
n_head = 4
block_size = 256

ffn = "lowrank"
rank = 64

dataset = "stdlib"
tokenizer = "spm:2048"
max_tokens = 1_200_000
batch_size = 4
micro_batch_size = 4

lr = 1e-3
betas = (0.9, 0.95)
eval_interval = 300
eval_tokens = 64 * 256
final_eval_tokens = 512 * 256
log_interval = 20
save_interval = 300
resume = "auto"
