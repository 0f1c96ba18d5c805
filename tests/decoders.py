"""Hand-written decoders that no library has, for tests: ids [B, S] -> logits [B, S, V]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 61
MAX_LEN = 128
NEG_INF = float("-inf")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GeluMLP(nn.Module):
    """Two linears with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, hidden)
        self.proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class GatedMLP(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rotary_angles(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Angles [S, dim/2] of rotary embedding."""
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    return positions.float()[:, None] * base ** (-steps / dim)[None, :]


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the two halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


# --- 1: learned positions, one fused linear in three blocks, sdpa -------------------------------------------


class NanoAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q = q.view(b, s, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, s, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, s, self.heads, c // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, s, c))


class NanoBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = NanoAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = GeluMLP(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """Learned absolute positions, fused q|k|v, causal sdpa, head tied to the embedding."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, dim)
        self.wpe = nn.Embedding(MAX_LEN, dim)
        self.h = nn.ModuleList(NanoBlock(dim, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# --- 2: Wqkv laid out [H, 3, D], eager softmax, half-split rotary -------------------------------------------


class FusedWqkvBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = GatedMLP(dim, 2 * dim)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, c = x.shape
        qkv = self.Wqkv(x).view(b, s, self.heads, 3, self.head_dim)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(dim=3))
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        future = torch.triu(torch.ones(s, s, device=x.device), 1).bool()
        weights = scores.masked_fill(future, NEG_INF).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, s, c))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class FusedWqkv(nn.Module):
    """Fused projection interleaved per head; rotary cos and sin made in the forward pass."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(FusedWqkvBlock(dim, heads) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        angles = rotary_angles(torch.arange(ids.shape[1], device=ids.device), self.head_dim)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


# --- 3: complex rotary over adjacent pairs, grouped heads, a registered tril --------------------------------


class InterleavedBlock(nn.Module):
    mask: Tensor

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        self.feed_forward = GatedMLP(dim, 2 * dim)
        self.register_buffer("mask", torch.tril(torch.ones(MAX_LEN, MAX_LEN)).view(1, 1, MAX_LEN, MAX_LEN))

    def rotate(self, x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs[None, :, None, :]).flatten(3).type_as(x)

    def attend(self, x: Tensor, freqs: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.rotate(self.wq(x).view(b, s, self.heads, self.head_dim), freqs).transpose(1, 2)
        k = self.rotate(self.wk(x).view(b, s, self.kv_heads, self.head_dim), freqs).transpose(1, 2)
        v = self.wv(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(self.mask[:, :, :s, :s] == 0, NEG_INF)
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, s, -1))

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), freqs)
        return x + self.feed_forward(self.ffn_norm(x))


class InterleavedRope(nn.Module):
    """Rotary by complex multiplication with a table, 4 query heads on 2 key/value heads."""

    freqs_cis: Tensor

    def __init__(self, dim: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList(InterleavedBlock(dim, heads, kv_heads) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, VOCAB, bias=False)
        angles = rotary_angles(torch.arange(MAX_LEN), dim // heads)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        freqs = self.freqs_cis[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, freqs)
        return self.output(self.norm(x))


# --- 4: linear distance biases ------------------------------------------------------------------------------


class AlibiBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim, bias=False)
        self.mlp = GeluMLP(dim, 2 * dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.ln1(x)
        q, k, v = (
            proj(h).view(b, s, self.heads, self.head_dim).permute(0, 2, 1, 3) for proj in (self.q, self.k, self.v)
        )
        weights = torch.softmax(q @ k.mT * self.head_dim**-0.5 + bias, dim=-1)
        x = x + self.o((weights @ v).permute(0, 2, 1, 3).reshape(b, s, c))
        return x + self.mlp(self.ln2(x))


class AlibiDecoder(nn.Module):
    """No positions; the scores get slope * (j - i), and -inf above the diagonal."""

    slopes: Tensor

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(AlibiBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        s = ids.shape[1]
        pos = torch.arange(s, device=ids.device)
        distance = pos[None, :] - pos[:, None]
        bias = self.slopes[:, None, None] * distance
        bias = bias + torch.full((s, s), NEG_INF, device=ids.device).triu(1)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x))


# --- 5: odd layers see a window, even layers everything; rotary on half of each head ------------------------


class WindowBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = heads, dim // heads, window
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = GatedMLP(dim, 2 * dim)

    def partial_rotary(self, x: Tensor, angles: Tensor) -> Tensor:
        half = self.head_dim // 2
        turned, kept = x[..., :half], x[..., half:]
        turned = turned * angles.cos() + rotate_half(turned) * angles.sin()
        return torch.cat((turned, kept), dim=-1)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.norm1(x)
        q = self.q_proj(h).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        q, k = self.partial_rotary(q, angles), self.partial_rotary(k, angles)
        i = torch.arange(s, device=x.device)[:, None]
        j = torch.arange(s, device=x.device)[None, :]
        allowed = j <= i
        if self.window is not None:
            allowed = allowed & (i - j < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, s, c))
        return x + self.mlp(self.norm2(x))


class WindowAlternating(nn.Module):
    """Boolean masks from aranges; window 5 on odd layers."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 4, window: int = 5) -> None:
        super().__init__()
        self.rotary_dim = dim // heads // 2
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(WindowBlock(dim, heads, window if n % 2 else None) for n in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        angles = rotary_angles(torch.arange(ids.shape[1], device=ids.device), self.rotary_dim).repeat(1, 2)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


# --- 6: einsum attention, soft-capped scores, normalised queries and keys -----------------------------------


class SoftcapBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, cap: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.cap = heads, kv_heads, dim // heads, cap
        self.pre, self.post = RMSNorm(dim), RMSNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.mlp = GatedMLP(dim, 2 * dim)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.pre(x)
        q = self.q_norm(self.to_q(h).view(b, s, self.heads, self.head_dim)).transpose(1, 2)
        k, v = self.to_kv(h).view(b, s, 2 * self.kv_heads, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        k = self.k_norm(k)
        q = q * angles.cos() + rotate_half(q) * angles.sin()
        k = k * angles.cos() + rotate_half(k) * angles.sin()
        grouped = (b, self.kv_heads, self.heads // self.kv_heads, s, self.head_dim)
        k = k[:, :, None].expand(grouped).reshape(b, self.heads, s, self.head_dim)
        v = v[:, :, None].expand(grouped).reshape(b, self.heads, s, self.head_dim)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * self.head_dim**-0.5
        scores = torch.tanh(scores / self.cap) * self.cap
        causal = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
        weights = torch.where(causal, scores, torch.finfo(scores.dtype).min).softmax(-1)
        y = torch.einsum("bhij,bhjd->bihd", weights, v).reshape(b, s, c)
        x = x + self.to_out(y)
        return x + self.mlp(self.post(x))


class SoftcapQkNorm(nn.Module):
    """Per-head RMS norm with gain on q and k before rotary, tanh soft-cap on the scores, grouped heads."""

    def __init__(self, dim: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(SoftcapBlock(dim, heads, kv_heads, cap=1.5) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        angles = rotary_angles(torch.arange(ids.shape[1], device=ids.device), self.head_dim, base=500.0)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed(ids) * math.sqrt(self.embed.embedding_dim)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


# --- 7: attention and MLP in parallel, one key/value head, rotary from a table ------------------------------


class ParallelBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, (heads + 2) * self.head_dim)
        self.dense = nn.Linear(dim, dim)
        self.mlp = GeluMLP(dim, 2 * dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.norm(x)
        qkv = self.query_key_value(h).view(b, s, self.heads + 2, self.head_dim).transpose(1, 2)
        q, k, v = qkv[:, :-2], qkv[:, -2:-1], qkv[:, -1:]
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        k, v = k.expand(-1, self.heads, -1, -1), v.expand(-1, self.heads, -1, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dense(y.transpose(1, 2).reshape(b, s, c)) + self.mlp(h)


class ParallelMqa(nn.Module):
    """One norm feeds attention and MLP; biases everywhere; cos and sin are slices of [1, 1, T, D] tables."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.blocks = nn.ModuleList(ParallelBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB)
        angles = rotary_angles(torch.arange(MAX_LEN), dim // heads).repeat(1, 2)[None, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        s = ids.shape[1]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos[:, :, :s], self.sin[:, :, :s])
        return self.head(self.norm(x))


# --- 8: queries scaled before the product, biased projections, a sink logit per head ------------------------


class SinkBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=True) for _ in range(3))
        self.output = nn.Linear(dim, dim, bias=True)
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.mlp = GeluMLP(dim, 2 * dim)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        h = self.norm1(x)
        q = self.split(self.query(h) * (1.0 / math.sqrt(self.head_dim)))
        k, v = self.split(self.key(h)), self.split(self.value(h))
        pos = torch.arange(s, device=x.device)
        scores = torch.matmul(q, k.transpose(-1, -2)).masked_fill(pos[None, :] > pos[:, None], NEG_INF)
        sink = self.sinks.view(1, -1, 1, 1).expand(b, -1, s, 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
        x = x + self.output(torch.matmul(weights, v).transpose(1, 2).reshape(b, s, c))
        return x + self.mlp(self.norm2(x))


class ScaledQueries(nn.Module):
    """The scale is on q; a learned sink takes part in the softmax and is dropped; learned positions."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.positions = nn.Parameter(torch.zeros(MAX_LEN, dim))
        self.blocks = nn.ModuleList(SinkBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ==== Models that are not decoders with (only) a causal key/value cache =====================================


class MaskedBlock(nn.Module):
    """Plain eager attention block; `mask` is True where a query may look, `bias` is added to the scores."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.mlp = GatedMLP(dim, 2 * dim)

    def attend(self, x: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        b, s, c = x.shape
        q, k, v = (proj(x).view(b, s, self.heads, self.head_dim).transpose(1, 2) for proj in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, NEG_INF)
        return self.o((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, s, c))

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm1(x), mask, bias)
        return x + self.mlp(self.norm2(x))


class NegativeBase(nn.Module):
    """Embeddings, learned positions, blocks and a head; subclasses choose the masks."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.wpe = nn.Embedding(MAX_LEN, dim)
        self.blocks = nn.ModuleList(MaskedBlock(dim, heads) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def start(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))

    def causal(self, ids: Tensor) -> Tensor:
        pos = torch.arange(ids.shape[1], device=ids.device)
        return pos[None, :] <= pos[:, None]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, self.causal(ids))
        return self.head(self.norm(x))


class Bidirectional(NegativeBase):
    """No mask at all."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PrefixLM(NegativeBase):
    """The first four tokens see each other, the rest is causal."""

    def forward(self, ids: Tensor) -> Tensor:
        pos = torch.arange(ids.shape[1], device=ids.device)
        mask = (pos[None, :] <= pos[:, None]) | (pos[None, :] < 4)
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class LearnedBias(NegativeBase):
    """Causal, with a learned table [H, T, T] on the scores: no function of the distance."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__(dim, heads, layers)
        self.tables = nn.ParameterList(torch.zeros(heads, MAX_LEN, MAX_LEN) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        s = ids.shape[1]
        x = self.start(ids)
        for block, table in zip(self.blocks, self.tables, strict=True):
            x = block(x, self.causal(ids), table[:, :s, :s])
        return self.head(self.norm(x))


class OddLayer(NegativeBase):
    """Four layers, one of which (number 2) has no causal mask."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 4) -> None:
        super().__init__(dim, heads, layers)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for number, block in enumerate(self.blocks):
            x = block(x, None if number == 2 else self.causal(ids))
        return self.head(self.norm(x))


class PooledEncoder(NegativeBase):
    """A classifier: mean over the tokens, output [B, V]."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class DataDependentMask(NegativeBase):
    """Causal, and keys whose id is 0 are hidden (each query may always see itself)."""

    def forward(self, ids: Tensor) -> Tensor:
        seen = (ids != 0)[:, None, None, :] | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, seen & self.causal(ids))
        return self.head(self.norm(x))


class CrossTokenConv(NegativeBase):
    """Causal, but a depthwise convolution over tokens gives it a state beside keys and values."""

    def __init__(self, dim: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__(dim, heads, layers)
        self.convs = nn.ModuleList(nn.Conv1d(dim, dim, 3, groups=dim) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.start(ids)
        for block, conv in zip(self.blocks, self.convs, strict=True):
            x = x + conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)
            x = block(x, self.causal(ids))
        return self.head(self.norm(x))


class NoAttention(nn.Module):
    """Each token on its own, through MLPs."""

    def __init__(self, dim: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.mlps = nn.ModuleList(GatedMLP(dim, 2 * dim) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for mlp in self.mlps:
            x = x + mlp(x)
        return self.head(self.norm(x))


# ==== Registries ============================================================================================


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, none trivial: gains near 1, biases and sinks off 0, sharp attention."""
    gen = torch.Generator().manual_seed(seed)
    gains = {id(m.weight) for m in model.modules() if isinstance(m, (nn.LayerNorm, RMSNorm))}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=gen)
        leaf = name.rsplit(".", 1)[-1]
        if id(p) in gains:
            p.copy_(1.0 + 0.2 * noise)
        elif leaf == "bias":
            p.copy_(0.1 * noise)
        elif id(p) in tables or leaf == "positions":
            p.copy_(0.6 * noise)
        elif p.dim() == 1 or "tables" in name:
            p.copy_(noise)
        else:
            p.copy_(1.4 * noise / math.sqrt(p[0].numel()))


def _seeded(cls: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = cls()
        randomise(model, 0)
        return model.eval()

    return make


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "nano_gpt": _seeded(NanoGPT),
    "fused_wqkv": _seeded(FusedWqkv),
    "interleaved_rope": _seeded(InterleavedRope),
    "alibi": _seeded(AlibiDecoder),
    "window_alternating": _seeded(WindowAlternating),
    "softcap_qk_norm": _seeded(SoftcapQkNorm),
    "parallel_mqa": _seeded(ParallelMqa),
    "scaled_queries": _seeded(ScaledQueries),
}

NEGATIVE: dict[str, Callable[[], nn.Module]] = {
    "bidirectional": _seeded(Bidirectional),
    "prefix_lm": _seeded(PrefixLM),
    "learned_bias": _seeded(LearnedBias),
    "odd_layer": _seeded(OddLayer),
    "pooled_encoder": _seeded(PooledEncoder),
    "data_dependent_mask": _seeded(DataDependentMask),
    "cross_token_conv": _seeded(CrossTokenConv),
    "no_attention": _seeded(NoAttention),
}
