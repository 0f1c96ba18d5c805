"""`Transformed`: what `kvpass.transform` returns. It runs, generates, explains itself and is saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kvpass.errors import RequestError
from kvpass.ir.check import plan_of
from kvpass.ir.plan import CachePlan
from kvpass.ir.program import Program
from kvpass.ir.text import graph_text
from kvpass.manager import Report
from kvpass.runtime.executor import Backend, Executor
from kvpass.runtime.selective import SelectiveState
from kvpass.runtime.state import State

if TYPE_CHECKING:
    from kvpass.export.onnx.export import Exported
    from kvpass.recipe import Recipe
    from kvpass.runtime.engine import Engine
    from kvpass.runtime.paged import Kind

CHUNK = 2048  # tokens per row that prefill runs at a time; bounds the memory of long prompts


class Transformed(nn.Module):
    """A rewritten decoder.

    Attributes:
        plan: what each layer stores.
        report: what each pass did.
        recipe: the passes that made it.
        device: where it computes.
        backend: what computes attention: "triton", "reference", or "auto" for the best there is for the device.
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        device: torch.device,
        recipe: Recipe,
        original: Program | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.program = program
        self.original = original
        self.report = report
        self.recipe = recipe
        self.device = device
        self.backend = backend
        self.plan: CachePlan = plan_of(program)
        self._executor: list[Executor] = []
        self._generator: list[Any] = []

    @property
    def executor(self) -> Executor:
        """The lowered program; weights are read and folded on first use."""
        if not self._executor:
            self._executor.append(Executor(self.program, self.plan, self.device, self.backend))
        return self._executor[0]

    def release(self) -> None:
        """Let go of the weights that were read to run it; the next run reads them again."""
        self._executor.clear()

    def with_program(self, program: Program) -> Transformed:
        """The same with another program, of other weights for one."""
        return Transformed(program, self.report, self.device, self.recipe, self.original, self.backend)

    @property
    def lowering(self) -> str:
        """What computes the attention of every layer, in every entry, and why where kernels do not: a table."""
        if self.executor.backend == "reference":
            return f"everything runs as its torch reference: backend {self.backend!r} on {self.device.type}"
        from kvpass.passes.lower_attention import table

        return table(self.executor.lowering)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]: the teacher-forced meaning of the variant, differentiable."""
        return self.executor(self._ids(input_ids))

    def prefill(
        self, input_ids: Tensor, lengths: Tensor | None = None, *, capacity: int | None = None, chunk: int | None = None
    ) -> tuple[Tensor, State]:
        """Read prompts into a fresh cache.

        Args:
            input_ids: [B, S] token ids; rows of different lengths are padded on the right with any id.
            lengths: [B] tokens per row; all S where None.
            capacity: tokens per row to make room for at once; the cache grows beyond it when needed.
            chunk: tokens per row that are run at a time; CHUNK where None, and all where tokens are dropped by rank.

        Returns:
            Logits [B, V] of each row's last token, and the state that `decode` goes on from.

        Raises:
            RequestError: an empty prompt, a length outside 1..S, ids outside the vocabulary.
        """
        ids = self._ids(input_ids)
        batch, length = ids.shape
        _check_prompt(ids)
        if chunk is not None and chunk < 1:
            raise RequestError(f"chunk must be at least 1, not {chunk}")
        counts = torch.full((batch,), length) if lengths is None else torch.as_tensor(lengths).cpu().long()
        if counts.shape != (batch,) or int(counts.min()) < 1 or int(counts.max()) > length:
            raise RequestError(
                f"lengths must be {batch} numbers from 1 to {length}, not {counts.tolist()}",
                fix="lengths count the tokens of each row without its padding",
            )
        longest = int(counts.max())
        executor = self.executor
        executor.check_length(longest)
        if self.plan.selective:
            if chunk is not None and chunk < longest:
                raise RequestError(
                    f"a prompt of {longest} tokens cannot be read {chunk} at a time where tokens are dropped by rank",
                    fix="leave out chunk=; memory stays bounded by the schedule",
                )
            chosen = SelectiveState.fresh(self.plan, batch, self.device)
            room = max(capacity or 0, longest)
            logits = executor.read_prompts(ids[:, :longest], chosen, counts.tolist(), room)[:, 0]
            chosen.lengths = counts.to(self.device)
            chosen.refresh()
            return logits, chosen
        chunk = chunk or CHUNK
        state = State.empty(self.plan, batch, max(capacity or 0, longest), self.device)
        found: Tensor | None = None
        stops = counts.to(self.device) if int(counts.min()) < longest else None
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            ends = (counts - 1 - start).clamp(0, stop - start - 1).to(self.device)
            part = executor.step(ids[:, start:stop], state, ends, stops)[:, 0]
            finishes = ((counts > start) & (counts <= stop)).to(self.device).unsqueeze(1)
            found = part if found is None else torch.where(finishes, part, found)
            state.lengths = torch.full_like(state.lengths, stop)
            state.refresh()
        assert found is not None
        state.lengths = counts.to(self.device)
        state.refresh()
        return found, state

    def decode(self, input_ids: Tensor, state: State) -> Tensor:
        """Logits [B, S, V] of S >= 1 more tokens [B, S] per row; `state` is updated in place.

        On a GPU a step of a few tokens is recorded as a CUDA graph and replayed where kernels run all its attention.
        """
        ids = self._ids(input_ids)
        if ids.shape[0] != state.batch:
            raise RequestError(f"{ids.shape[0]} rows were given to a state of {state.batch}")
        if ids.shape[1] == 0:
            raise RequestError("there are no tokens to decode", fix="give at least one token per row")
        if ids.shape[1] > 1 and self.executor.one_by_one:
            return torch.cat([self.decode(ids[:, i : i + 1], state) for i in range(ids.shape[1])], dim=1)
        logits = self.executor.decode(ids, state)
        state.advance(int(ids.shape[1]))
        return logits

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Hugging Face generation on this model: `max_new_tokens`, sampling, beams, stopping, streamers.

        Args:
            input_ids: [B, S] prompts; with `attention_mask`, padded on either side.
            options: what `transformers.GenerationMixin.generate` takes.

        Returns:
            [B, S + new] token ids.
        """
        from kvpass.runtime.generation import DecoderForGeneration, config_for_generation, generation_config

        ids = self._ids(input_ids)
        _check_prompt(ids)
        if not self._generator:
            facts = self.program.facts
            config = config_for_generation(facts.config, facts.vocab_size)
            face = DecoderForGeneration(self, config)
            face.generation_config = generation_config(facts.folder, config)
            self._generator.append(face)
        face = self._generator[0]
        if "max_new_tokens" not in options and "max_length" not in options and "generation_config" not in options:
            options["max_new_tokens"] = 64
        face.room = int(ids.shape[1]) + int(options.get("max_new_tokens") or 0)
        result: Tensor = face.generate(ids, **options)
        return result

    def engine(
        self,
        pages: int | Mapping[Kind, int] | None = None,
        max_batch: int = 8,
        when_full: Literal["error", "swap"] = "error",
        share_prefixes: bool = True,
        capacity: int | None = None,
    ) -> Engine:
        """A batch that sequences join and leave as they come and end, over one pool of pages.

        Args:
            pages: pages in the pool of each kind of store, one number or one per kind (window, sinks).
            max_batch: sequences that run together.
            when_full: where pages run out, raise `OutOfPages` ("error") or move the youngest sequence to host memory
                until there is room again ("swap").
            share_prefixes: let prompts that begin alike share the pages of their prefix.
            capacity: tokens of all sequences together to make pages for, instead of `pages`.

        Raises:
            RequestError: the cache is not paged: the recipe needs `PageKV`.
        """
        from kvpass.runtime.engine import Engine

        return Engine(
            self,
            pages=pages,
            max_batch=max_batch,
            when_full=when_full,
            share_prefixes=share_prefixes,
            capacity=capacity,
        )

    def graph_text(self, entry: str = "forward") -> str:
        """Canonical text of a graph; stable across runs and processes."""
        program = self.program if entry == "forward" else self.executor.program
        if entry not in program.entries:
            raise RequestError(
                f"there is no entry {entry!r}", fix=f"choose from {sorted(self.executor.program.entries)}"
            )
        return graph_text(program, entry)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the program and its weights; `kvpass.load` reads them without running any code from the folder."""
        from kvpass.export.program_folder import save

        return save(self, Path(folder), overwrite=overwrite)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a plain Hugging Face checkpoint, with the tokenizer and the generation config.

        Raises:
            UnsupportedError: the family's config cannot express the variant, with the reason.
        """
        from kvpass.export.checkpoint import save_pretrained

        return save_pretrained(self.program, Path(folder), overwrite=overwrite, report=self.report)

    def export_onnx(
        self,
        folder: str | Path,
        *,
        target: Literal["ort", "onnx", "onnx-static"] = "ort",
        dtype: Literal["fp32", "fp16"] = "fp32",
        weights: Literal["int4"] | None = None,
        positions: int | None = None,
        overwrite: bool = False,
    ) -> Exported:
        """Write an ONNX package that onnxruntime and onnxruntime-genai serve, checked against this program.

        See `kvpass.export.onnx.export.export_onnx`.
        """
        from kvpass.export.onnx.export import export_onnx

        return export_onnx(
            self, folder, target=target, dtype=dtype, weights=weights, positions=positions, overwrite=overwrite
        )

    def _ids(self, input_ids: Tensor) -> Tensor:
        ids = torch.as_tensor(input_ids)
        if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise RequestError(
                f"token ids are integers [batch, length], not {ids.dtype} {tuple(ids.shape)}",
                fix="pass one row per sequence, also for a single one",
            )
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.program.facts.vocab_size:
                raise RequestError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of {self.program.facts.vocab_size}",
                    fix="tokenize with this model's own tokenizer",
                )
        return ids.to(self.device, torch.long)


def _check_prompt(ids: Tensor) -> None:
    if ids.numel() == 0:
        raise RequestError(
            f"the prompt is empty: {ids.shape[0]} rows of {ids.shape[1]} tokens", fix="give at least one token per row"
        )
