"""l wide and structured: half the attention, a larger FFN of rank 768, trained on the FLOPs of gqa_l."""
n_layer = 24
n_embd = 1536
n_head = 12
block_size = 1024
vocab_size = 32000
n_kv_head = 4
attn_dim = 768
ffn_dim = 7424
ffn = "lowrank"
rank = 768

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 23.36e9
batch_size = 512
micro_batch_size = 16

lr = 2.5e-4
