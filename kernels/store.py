"""How one layer's cache lies in memory, as far as a kernel must know.

Every kernel that writes or reads a cache takes its tensors as a list, in this order, and a `Store` that says what they
mean. Tensors are [B, Hkv, slots, X]; in pages [pages, Hkv, page, X], and the table [B, blocks] comes last:

    full precision   k, v
    codes            k_codes uint8, k_params float16, v_codes, v_params; one group per token and head
    KIVI             the same, keys' parameters [B, Hkv, groups, D, 2], then k_recent, v_recent in full precision

Codes are those of an int8, int4 or fp8 (e4m3) cache: at 4 bits byte j holds channel j in its low and channel j + D/2 in
its high half.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Store:
    """The layout of one layer's cache.

    Attributes:
        bits: of a code: 8 or 4; 0 for full precision.
        floats: the codes are fp8 (e4m3) instead of integers.
        group: tokens in a group of keys under KIVI (Liu et al., arXiv 2402.02750), a power of two; 0 without.
        residual: most recent tokens that KIVI keeps in full precision besides the group that fills up.
        window: slots of the ring behind the sinks, or (in pages) tokens that are kept besides them; 0 keeps all.
        sinks: first tokens that are always kept where there is a window.
        page: tokens per page; 0 for one stretch of memory per row.
    """

    bits: int = 0
    floats: bool = False
    group: int = 0
    residual: int = 0
    window: int = 0
    sinks: int = 0
    page: int = 0

    @property
    def ring(self) -> bool:
        """Whether position p >= sinks lies in slot sinks + (p - sinks) mod window."""
        return self.window > 0 and self.page == 0

    @property
    def minimum(self) -> bool:
        """Whether a group's parameters are its scale and its minimum, instead of the scale alone."""
        return self.group > 0 or self.bits == 4

    @property
    def parameters(self) -> int:
        """float16 parameters of a group: 0, 1 or 2."""
        return (1 + self.minimum) if self.bits else 0

    @property
    def pieces(self) -> int:
        """Tensors of the cache, the table of a paged one aside."""
        return 6 if self.group else 4 if self.bits else 2

    @property
    def recent(self) -> Store:
        """The ring in which KIVI keeps recent tokens as they are."""
        return Store(window=self.residual + self.group)
