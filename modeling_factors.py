"""Hugging Face architectures with structured FFNs as factors; export.py puts a copy beside the weights.

AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) loads them. Everything but the FFNs is the stock
class; y = W x + bias of the structured linears ("Building on Efficient Foundations", arXiv 2406.16450) goes through
    lowrank       V (R, N), U (M, R)
    blockshuffle  V (B, q, N/B), U (B, M/B, q) with a fixed permutation between and its inverse after
    blockdense    V (B, R/B, N/B), U (M, R)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import ArceeForCausalLM, Gemma3ForCausalLM, GPT2LMHeadModel, GPTBigCodeForCausalLM, LlamaForCausalLM
from transformers import MistralForCausalLM, Qwen3ForCausalLM, StableLmForCausalLM, Starcoder2ForCausalLM


class Factors(nn.Module):
    def __init__(self, n, m, ffn, rank, nblocks, bias):
        super().__init__()
        self.ffn = ffn
        B = max(nblocks, 1)
        V, U = {"lowrank": ((rank, n), (m, rank)), "blockdense": ((B, rank // B, n // B), (m, rank)),
                "blockshuffle": ((B, min(n, m) // B, n // B), (B, m // B, min(n, m) // B))}[ffn]
        self.V, self.U = nn.Parameter(torch.empty(V)), nn.Parameter(torch.empty(U))
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None

    def forward(self, x):
        if self.ffn == "lowrank":
            return F.linear(F.linear(x, self.V), self.U, self.bias)
        B, q, p = self.V.shape
        t = torch.einsum("...bp,bqp->...bq", x.unflatten(-1, (B, p)), self.V)
        if self.ffn == "blockdense":
            return F.linear(t.flatten(-2), self.U, self.bias)
        t = t.flatten(-2).unflatten(-1, (q, B)).transpose(-1, -2)
        y = torch.einsum("...bq,bsq->...bs", t, self.U).transpose(-1, -2).flatten(-2)
        return y if self.bias is None else y + self.bias


class FFN(nn.Module):
    def __init__(self, act, n_embd, ffn_dim, n_dense_layers, **shape):
        super().__init__()
        self.act = act
        self.fc1 = Factors(n_embd, 2 * ffn_dim if act == "swiglu" else ffn_dim, **shape)
        self.fc2 = Factors(ffn_dim, n_embd, **shape)

    def forward(self, x):
        h = self.fc1(x)
        if self.act == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * value)
        return self.fc2(F.relu(h).square() if self.act == "relu2" else F.gelu(h, approximate="tanh"))


class WithFactors:
    def __init__(self, config):
        super().__init__(config)
        layers = self.model.layers if hasattr(self, "model") else self.transformer.h
        for layer in layers[config.structured_ffn["n_dense_layers"]:]:
            layer.mlp = FFN(**config.structured_ffn)


def with_factors(stock):
    return type(f"{stock.__name__}WithFactors", (WithFactors, stock), {})


ArceeForCausalLMWithFactors = with_factors(ArceeForCausalLM)
Gemma3ForCausalLMWithFactors = with_factors(Gemma3ForCausalLM)
GPT2LMHeadModelWithFactors = with_factors(GPT2LMHeadModel)
GPTBigCodeForCausalLMWithFactors = with_factors(GPTBigCodeForCausalLM)
LlamaForCausalLMWithFactors = with_factors(LlamaForCausalLM)
MistralForCausalLMWithFactors = with_factors(MistralForCausalLM)
Qwen3ForCausalLMWithFactors = with_factors(Qwen3ForCausalLM)
StableLmForCausalLMWithFactors = with_factors(StableLmForCausalLM)
Starcoder2ForCausalLMWithFactors = with_factors(Starcoder2ForCausalLM)
