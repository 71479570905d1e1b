"""m with grouped-query attention and a larger dense FFN: the partner of wide_m."""
n_layer = 24
n_embd = 1024
n_head = 16
block_size = 1024
vocab_size = 32000
n_kv_head = 4
ffn_dim = 4864

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 6.7e9
batch_size = 512
micro_batch_size = 32

lr = 3e-4
