"""The paper's s: 110M parameters, 2.2B tokens of RefinedWeb."""
n_layer = 12
n_embd = 768
n_head = 12
block_size = 1024
vocab_size = 32000

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 2.2e9
batch_size = 512
micro_batch_size = 64

lr = 6e-4
