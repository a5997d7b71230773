"""A model that is not ours: a small GPT as in nanoGPT, with learned positions, GELU and LayerNorm with biases.

    pgolf-post --family examples/my_family.py:TinyGPTFamily fit CHECKPOINT --budget 300000

Or register it once, in your own package's setup.cfg, under [options.entry_points]:

    pgolf_post.models =
        tiny_gpt = my_package.my_family:TinyGPTFamily

docs/howto/families.md says what each method is for. `save_checkpoint` writes the folder that every command starts from.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from pgolf_post.families import BaseFamily, Lookup, Site


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ln2, self.fc, self.out = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):  # (batch, seq_len, dim)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.out(F.gelu(self.fc(self.ln2(x))))


class TinyGPT(nn.Module):
    def __init__(self, vocab_size, seq_len, dim, layers, heads):
        super().__init__()
        self.seq_len = seq_len
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size, bias=False)

    def hidden(self, tokens):  # (batch, seq_len) → (batch, seq_len, dim): the head's input
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.ln(x)

    def logits(self, hidden):  # (…, dim) → (…, vocab_size)
        return self.head(hidden).float()


class TinyGPTFamily(BaseFamily):
    name = "tiny_gpt"
    settings = {"vocab_size": None, "seq_len": 64, "dim": 32, "layers": 2, "heads": 4}  # None: must be given
    roles = {"tokens.weight": "embedding", "positions.weight": "embedding", "head.weight": "head"}

    def build(self, model, graph):
        return TinyGPT(**self.complete(model))

    def sites(self, module):  # whose input feeds which matrices; their Hessian is Σxxᵀ of that input
        names = [f"blocks.{i}.{part}" for i in range(len(module.blocks)) for part in ("qkv", "proj", "fc", "out")]
        blocks = [Site(f"{name}.in", name, (f"{name}.weight",)) for name in names]
        return [*blocks, Site("head.in", "head", ("head.weight",), is_head=True)]

    def lookups(self, module):  # tables read by index, the token embedding first
        return [Lookup("tokens.weight", "tokens"), Lookup("positions.weight", "positions")]

    def role(self, tensor_name):
        part = re.fullmatch(r"blocks\.\d+\.(qkv|proj|fc|out)\.weight", tensor_name)
        inner = {"qkv": "q", "proj": "attn_proj", "fc": "mlp_fc", "out": "mlp_proj"}
        return inner[part[1]] if part else self.roles.get(tensor_name, "control")
