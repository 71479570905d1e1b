"""The paper's m: 335M parameters, 6.7B tokens of RefinedWeb."""
n_layer = 24
n_embd = 1024
n_head = 16
block_size = 1024
vocab_size = 32000

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 6.7e9
batch_size = 512
micro_batch_size = 32

lr = 3e-4
