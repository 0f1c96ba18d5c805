"""How keys and values are stored: in full precision, as integer codes, or as 8-bit floats.

Three layouts. `token`: one group, hence one scale, for each vector of a token and head. `kivi` (Liu et al., KIVI, arXiv
2402.02750): keys have outlier channels that persist over tokens, so keys are grouped per channel over `group` tokens;
values have none, so values are grouped per token; the most recent `residual` tokens stay in full precision. KIVI splits
the channels of a value into groups as well; here a value's vector is one group, whose parameters an attention kernel
applies to one probability instead of to every element. `static`: no group and no parameters; keys and values come
divided by scales that are weights of the model, fixed when it was calibrated, and are rounded to whole numbers, as
ONNX Runtime's GroupQueryAttention stores them.

A group is stored as codes (uint8) and float16 parameters:

    int8            code * scale                signed codes -127..127, int8 seen as uint8: `codes.view(torch.int8)`
    int4, int2      minimum + code * scale      unsigned codes 0..2^bits-1; KIVI uses this form for 8 bits as well
    static          code                        signed codes, -128..127 or -8..7, which are 8..-7 seen as 0..15
    fp8             code * scale                float8_e4m3fn seen as uint8; the scale maps the largest magnitude to 448

Codes under 8 bits are packed in runs of channels, so that a kernel unpacks into contiguous halves: at 4 bits byte j
holds channel j and, in its high bits, channel j + D/2; at 2 bits j, j + D/4, j + D/2, j + 3D/4 from the lowest up.

Parameters are rounded to float16 towards the safe side first, the scale up and the minimum down, and codes are computed
against the rounded parameters, ties to even: nothing is clipped, and the error is at most half a step. The smallest
scale is float16's, 2^-24. `static` has none of this: it rounds, ties to even, and clips to its range. `code * scale` is
exact in float32, so decoding rounds once (the sum), whether or not the multiplication and the sum are fused.

A group that holds a NaN or an infinity, or whose parameters exceed float16, decodes to NaN as a whole; other groups
are untouched; `static` stores a NaN as 0. Arithmetic is float32 and every group is encoded by itself, whatever it is
batched with.

Shapes: D channels per head, G tokens per group, P parameters per group (scale, then minimum where there is one).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kvpass.errors import PlanError

_FORMS = (
    "int8, int4, int2, fp8, static8, static4, kiviBITS:GROUP:RESIDUAL such as kivi4:32:128, or an empty text for full "
    "precision"
)
_NUMBER = "(0|[1-9][0-9]{0,8})"
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448  # torch.finfo(_FP8).max
_SMALLEST_GROUP = 8


@dataclass(frozen=True)
class KVFormat:
    """How the keys and values of one layer are stored.

    Attributes:
        kind: "full" keeps the model's dtype, "int" stores integer codes, "fp8" 8-bit floats (e4m3).
        bits: per channel: 8, 4 or 2 for "int", 8 for "fp8", 0 for "full".
        layout: "token" has one group per token and head; "kivi" groups keys per channel, values per token; "static"
            has no groups: scales are weights.
        group: tokens in a group of keys ("kivi"), a power of two from 8 on.
        residual: most recent tokens that stay in full precision ("kivi"), a multiple of `group`.
    """

    kind: Literal["full", "int", "fp8"] = "full"
    bits: int = 0
    layout: Literal["token", "kivi", "static"] = "token"
    group: int = 0
    residual: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "group", "residual"):
            if type(getattr(self, name)) is not int:
                self._refuse(f"{name} must be a whole number, not {getattr(self, name)!r}", f"give {name} as an int")
        if self.kind not in ("full", "int", "fp8"):
            self._refuse(f"kind must be 'full', 'int' or 'fp8', not {self.kind!r}", "choose one of the three")
        if self.layout not in ("token", "kivi", "static"):
            self._refuse(f"layout must be 'token', 'kivi' or 'static', not {self.layout!r}", "choose one of the three")
        widths = {"full": (0,), "int": (8, 4, 2), "fp8": (8,)}[self.kind]
        if self.bits not in widths:
            allowed = " or ".join(str(width) for width in widths)
            self._refuse(f"kind {self.kind!r} has bits {allowed}, not {self.bits}", f"set bits to {allowed}")
        if self.layout != "kivi":
            for name in ("group", "residual"):
                if getattr(self, name) != 0:
                    what = f"layout {self.layout!r} has no {name}, but {name} is {getattr(self, name)}"
                    self._refuse(what, f"set {name} to 0, or use layout 'kivi'")
            if self.layout == "static" and (self.kind != "int" or self.bits < 4):
                what = f"layout 'static' stores integers of 8 or 4 bits, not {self.kind!r} of {self.bits}"
                self._refuse(what, "use kind 'int' and bits 8 or 4, or layout 'token'")
            return
        if self.kind != "int":
            self._refuse(f"layout 'kivi' stores integers, not kind {self.kind!r}", "use kind 'int' or layout 'token'")
        if self.group < _SMALLEST_GROUP or self.group & (self.group - 1):
            self._refuse(f"group must be a power of two from {_SMALLEST_GROUP} on, not {self.group}", "use 32")
        if self.residual < 0 or self.residual % self.group:
            what = f"residual must be a multiple of the group of {self.group} tokens, not {self.residual}"
            self._refuse(what, f"use {max(0, -(-self.residual // self.group) * self.group)}")

    def _refuse(self, what: str, fix: str) -> None:
        raise PlanError(what, where=repr(self), fix=fix)

    @property
    def full(self) -> bool:
        """Whether keys and values are stored as the model computes them."""
        return self.kind == "full"

    @property
    def parameters(self) -> int:
        """float16 parameters of each group (P): 0 in full precision and "static", 1 for a scale, 2 with a minimum."""
        if self.full or self.layout == "static":
            return 0
        return 2 if self.kind == "int" and (self.layout == "kivi" or self.bits < 8) else 1

    @property
    def range(self) -> tuple[int, int]:
        """The lowest and the highest signed code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def __str__(self) -> str:
        if self.full:
            return ""
        if self.kind == "fp8":
            return "fp8"
        if self.layout == "static":
            return f"static{self.bits}"
        return f"kivi{self.bits}:{self.group}:{self.residual}" if self.layout == "kivi" else f"int{self.bits}"

    @staticmethod
    @lru_cache(maxsize=256)  # asked for in every attention
    def parse(text: str) -> KVFormat:
        """The format that `str` writes as `text`.

        Raises:
            PlanError: there is no such format.
        """
        if text == "":
            return KVFormat()
        if text == "fp8":
            return KVFormat("fp8", 8)
        if match := re.fullmatch(rf"int{_NUMBER}", text):
            return KVFormat("int", int(match[1]))
        if match := re.fullmatch(rf"static{_NUMBER}", text):
            return KVFormat("int", int(match[1]), "static")
        if match := re.fullmatch(rf"kivi{_NUMBER}:{_NUMBER}:{_NUMBER}", text):
            bits, group, residual = (int(number) for number in match.groups())
            return KVFormat("int", bits, "kivi", group, residual)
        raise PlanError(f"{text!r} is not a format for keys and values", where="KV format", fix=f"use {_FORMS}")

    def closed(self, length: int) -> int:
        """Tokens that KIVI has quantized of a sequence of `length`: whole groups, all older than the residual."""
        return max(0, length - self.residual) // self.group * self.group

    def check_dim(self, dim: int) -> None:
        """Refuse a head of `dim` channels that does not fill whole bytes.

        Raises:
            PlanError: with the number that would.
        """
        if dim < 1:
            raise PlanError(f"a head has at least 1 channel, not {dim}", where=f"KV format {str(self)!r}")
        per_byte = 8 // self.bits if self.bits else 1
        if dim % per_byte:
            raise PlanError(
                f"{self} packs {per_byte} channels into a byte, which does not divide {dim} channels",
                where=f"KV format {str(self)!r}",
                fix="use 8 bits for this head size",
            )

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of one vector of `dim` channels.

        Raises:
            PlanError: the format is full precision, which has no codes, or `dim` does not fill whole bytes.
        """
        if self.full:
            raise PlanError("full precision has no codes", where="KV format ''", fix="store the tensor as it is")
        self.check_dim(dim)
        return dim * self.bits // 8

    def key_bytes(self, dim: int, dtype: torch.dtype) -> Fraction:
        """Bytes that one token of one head adds to the stored keys for good, its share of the parameters included.

        `dtype` is what full precision is stored in. Under "kivi" the parameters of a group are shared by its tokens,
        so this may be no whole number for one token; times the tokens of whole groups it is. What `residual` holds
        does not grow with the sequence and is not in here.
        """
        if self.layout == "kivi":
            return self.code_bytes(dim) + Fraction(dim * self.parameters * torch.float16.itemsize, self.group)
        return self.value_bytes(dim, dtype)

    def value_bytes(self, dim: int, dtype: torch.dtype) -> Fraction:
        """Bytes that one token of one head adds to the stored values for good, parameters included."""
        if self.full:
            return Fraction(dim * dtype.itemsize)
        return Fraction(self.code_bytes(dim) + self.parameters * torch.float16.itemsize)

    @property
    def step(self) -> float:
        """The distance of two neighbouring codes, relative to the largest value of a group: what rounding noise in a
        key or value can turn into."""
        if self.kind == "fp8":
            return 1 / 16
        return 0.0 if self.full else 2 / (2**self.bits - 1)


FULL = KVFormat()
"""Full precision."""


def encode_tokens(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor]:
    """Encode x [..., D] with one group per vector -> codes uint8 [..., D*bits/8], parameters float16 [..., P].

    Raises:
        PlanError: D does not fill whole bytes, or the format has no codes.
    """
    return _encode(x, fmt, -1)


def decode_tokens(codes: Tensor, params: Tensor, fmt: KVFormat, dim: int, dtype: torch.dtype) -> Tensor:
    """What `encode_tokens` stored: codes [..., D*bits/8], parameters [..., P] -> [..., D] in `dtype`; D is `dim`."""
    return _decode(codes, params, fmt, dim, dtype, -1)


def encode_channels(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor]:
    """Encode keys x [..., G, D] with one group per channel -> codes uint8 [..., G, D*bits/8], params [..., D, P].

    Raises:
        PlanError: G is not `fmt.group`, D does not fill whole bytes, or the layout is not "kivi".
    """
    _check_channels(fmt)
    if x.shape[-2] != fmt.group:
        raise PlanError(f"a group of {fmt} has {fmt.group} tokens, not {x.shape[-2]}", where=f"keys {list(x.shape)}")
    return _encode(x, fmt, -2)


def decode_channels(codes: Tensor, params: Tensor, fmt: KVFormat, dim: int, dtype: torch.dtype) -> Tensor:
    """What `encode_channels` stored: codes [..., G, D*bits/8], parameters [..., D, P] -> [..., G, D] in `dtype`."""
    _check_channels(fmt)
    return _decode(codes, params, fmt, dim, dtype, -2)


def fake_tokens(x: Tensor, fmt: KVFormat) -> Tensor:
    """x [..., D] as it comes back from `encode_tokens`, in its own dtype; the gradient passes straight through."""
    if fmt.full:
        return x
    codes, params = encode_tokens(x, fmt)
    return _straight_through(x, decode_tokens(codes, params, fmt, x.shape[-1], x.dtype))


def fake_channels(x: Tensor, fmt: KVFormat) -> Tensor:
    """Keys x [..., T, D] as they come back from `encode_channels`, in their own dtype.

    Whole groups of tokens from the first on are quantized; the tokens behind the last whole group are returned as they
    are. `fmt.residual` is not looked at: which tokens are recent depends on who reads them. The gradient passes
    straight through.
    """
    if fmt.full:
        return x
    _check_channels(fmt)
    groups = x.shape[-2] // fmt.group
    whole, tail = x[..., : groups * fmt.group, :], x[..., groups * fmt.group :, :]
    grouped = whole.unflatten(-2, (groups, fmt.group))
    codes, params = encode_channels(grouped, fmt)
    decoded = decode_channels(codes, params, fmt, x.shape[-1], x.dtype).flatten(-3, -2)
    return torch.cat([_straight_through(whole, decoded), tail], dim=-2)


def _check_channels(fmt: KVFormat) -> None:
    if fmt.layout != "kivi":
        where = f"KV format {str(fmt)!r}"
        raise PlanError(f"layout {fmt.layout!r} has no groups per channel", where=where, fix="use layout 'kivi'")


def _encode(x: Tensor, fmt: KVFormat, along: int) -> tuple[Tensor, Tensor]:
    """Codes, packed along the last dimension, and parameters of the groups that lie along dimension `along` of x."""
    fmt.code_bytes(x.shape[-1])  # refuses what has none
    x = x.detach().float()
    if fmt.layout == "static":
        least, most = fmt.range
        whole = x.nan_to_num().round().clamp(least, most)
        codes = whole.to(torch.int8).view(torch.uint8) if fmt.bits == 8 else _pack((whole - least).to(torch.uint8), 4)
        return codes, codes.new_empty((*codes.shape[:-1], 0), dtype=torch.float16)
    if fmt.parameters == 2:
        top = 2**fmt.bits - 1
        low, high = torch.aminmax(x, dim=along, keepdim=True)
        minimum = _float16_below(low)
        x = x - minimum.float()
        scale = _scale(high - minimum.float(), top)
        kept = [scale, minimum]
    else:
        top = _FP8_MAX if fmt.kind == "fp8" else 127
        scale = _scale(x.abs().amax(dim=along, keepdim=True), top)
        kept = [scale]
    # false for a scale of 0 (a constant group) and of NaN: no quotient reaches a cast to integers that it would not fit
    steps = torch.where(scale > 0, x / scale.float(), 0.0)
    if fmt.kind == "fp8":
        codes = steps.clamp(-top, top).to(_FP8).view(torch.uint8)
    elif fmt.parameters == 1:
        codes = steps.round().clamp(-top, top).to(torch.int8).view(torch.uint8)
    else:
        codes = _pack(steps.round().clamp(0, top).to(torch.uint8), fmt.bits)
    return codes, torch.stack(kept, dim=-1).squeeze(along - 1)


def _decode(codes: Tensor, params: Tensor, fmt: KVFormat, dim: int, dtype: torch.dtype, along: int) -> Tensor:
    """The inverse of `_encode` for vectors of `dim` channels."""
    if codes.shape[-1] != fmt.code_bytes(dim) or params.shape[-1] != fmt.parameters:
        raise PlanError(
            f"a vector of {dim} channels has {fmt.code_bytes(dim)} bytes of codes and {fmt.parameters} parameters "
            f"in {fmt}, not {codes.shape[-1]} and {params.shape[-1]}",
            where=f"codes {list(codes.shape)}, parameters {list(params.shape)}",
            fix="decode with the format and the head size that encoded",
        )
    if fmt.layout == "static":
        low, _ = fmt.range
        return (codes.view(torch.int8) if fmt.bits == 8 else _unpack(codes, 4).to(torch.int8) + low).to(dtype)
    scale, *minimum = params.float().unsqueeze(along - 1).unbind(-1)
    if fmt.kind == "fp8":
        x = codes.view(_FP8).float() * scale
    elif fmt.parameters == 1:
        x = codes.view(torch.int8).float() * scale
    else:
        x = _unpack(codes, fmt.bits).float() * scale + minimum[0]
    if dtype == torch.float16:  # a scale that was rounded up may lead past 65504 where the value itself did not
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def _scale(span: Tensor, top: int) -> Tensor:
    """The smallest float16 with `scale * top >= span` for a float32 span >= 0; NaN where there is none."""
    nearest = (span / top).half()
    # the product is exact in float32, unlike the quotient, which becomes 0 for a span in the last denormals
    below = nearest.float() * top < span
    scale = (nearest.view(torch.int16) + below).view(torch.float16)  # the next float16 up, inf after 65504
    return torch.where(scale.isfinite(), scale, float("nan"))


def _float16_below(x: Tensor) -> Tensor:
    """The largest float16 <= x, for float32 x; -inf below -65504."""
    nearest = x.half()
    bits = nearest.view(torch.int16)  # sign and magnitude: one less is smaller above zero, one more is below
    previous = torch.where(nearest > 0, bits - 1, bits + 1)
    return torch.where(nearest.float() > x, previous, bits).view(torch.float16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits [..., D] -> [..., D*bits/8]: the channels in 8/bits runs, the first in the lowest bits."""
    first, *others = codes.chunk(8 // bits, dim=-1)
    for index, run in enumerate(others, start=1):
        first = first | run << bits * index
    return first


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    if bits == 8:
        return codes
    return torch.cat([codes >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1)


def _straight_through(x: Tensor, decoded: Tensor) -> Tensor:
    """`decoded` with the gradient of x; what is subtracted is zero, or NaN where `decoded` is NaN already."""
    return decoded - (x.detach() - x)
