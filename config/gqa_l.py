"""l with grouped-query attention and a larger dense FFN: the partner of wide_l."""
n_layer = 24
n_embd = 1536
n_head = 12
block_size = 1024
vocab_size = 32000
n_kv_head = 2
ffn_dim = 7424

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 14.58e9
batch_size = 512
micro_batch_size = 16

lr = 2.5e-4
