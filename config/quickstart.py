"""A small LowRank GPT on the Python standard library's source, for two CPU cores and three minutes."""
n_layer = 4                 # few, for two cores
n_embd = 256                # a step takes 0.15 seconds on two cores
n_head = 4                  # heads of 64
block_size = 256            # about 20 lines of source

ffn = "lowrank"             # the idea of this repository
rank = 64                   # a quarter of the width: 31 % of a dense FFN's parameters

dataset = "stdlib"          # every Python brings it: no download
tokenizer = "spm:2048"      # trained on it in seconds; few tokens, as the embeddings are a fifth of the model
max_tokens = 1_200_000      # three minutes
batch_size = 4              # many small steps rather than few large ones
micro_batch_size = 4        # no gradient accumulation

lr = 1e-3                   # small models take a high one
betas = (0.9, 0.95)         # 0.999 would average over 1000 steps, nearly the whole run
eval_interval = 300         # three validations during the run
eval_tokens = 64 * 256      # a second or two each
final_eval_tokens = 512 * 256  # about ten seconds
log_interval = 20           # a line every three seconds
save_interval = 300         # with the validations
resume = "auto"             # the same command again continues
