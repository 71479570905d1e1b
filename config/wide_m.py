"""m wide and structured: half the attention, a larger FFN of rank 512, trained on the FLOPs of gqa_m."""
n_layer = 24
n_embd = 1024
n_head = 8
block_size = 1024
vocab_size = 32000
n_kv_head = 4
attn_dim = 512
ffn_dim = 4864
ffn = "lowrank"
rank = 512

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 10.58e9
batch_size = 512
micro_batch_size = 32

lr = 3e-4
