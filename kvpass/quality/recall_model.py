"""A small decoder that is good at one thing: recalling what its context said. Trained from scratch in about a minute.

Small language models do not copy facts from their context, so there is no retrieval to lose. This one is trained on
associative recall (Arora et al. 2023, arXiv 2312.04927, ask many keys per sequence for dense supervision), mixed with
repeated random text, which is where induction heads form fastest. Left alone, training waits long for the first layer
to carry each token to its successor; an auxiliary loss that reads the previous token off that layer ends the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpass.errors import CheckError, RequestError
from kvpass.quality.retrieval import ALPHABET, Alphabet, plant

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

IGNORED = -100
WARMUP, SETTLE, CHECK_EVERY = 50, 200, 25  # steps
UNDERSTOOD, LEARNED = 0.7, 0.95  # accuracy at which repeated text is dropped, and at which contexts grow
HELD_OUT = 128  # sequences that accuracy is measured on
SHORTEST_PERIOD = 4


def train_recall_model(
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 8,
    head_dim: int = 16,
    length: int = 96,
    pairs: int = 8,
    steps: int = 1500,
    batch: int = 32,
    learning_rate: float = 4e-3,
    target: float = 0.99,
    alphabet: Alphabet = ALPHABET,
    progress: Callable[[int, float], None] | None = None,
) -> LlamaForCausalLM:
    """Train a Llama on associative recall.

    The result answers `recall_task(length=length, pairs=pairs)` and shorter ones. The same seed, number of threads
    and machine give the same weights.

    Args:
        seed: of the initial weights and of the data.
        hidden, layers, heads, head_dim: the model: full multi-head attention, at least two layers.
        length: the longest context in training (tokens); contexts start short.
        pairs: facts per sequence.
        steps: at most so many updates.
        batch: sequences per update.
        learning_rate: peak, of AdamW.
        target: accuracy on fresh sequences of full length that the result must have.
        alphabet: the token ids.
        progress: called with the step and the accuracy at each check.

    Returns:
        A float32 model on the CPU, in eval mode.

    Raises:
        RequestError: sizes that cannot work.
        CheckError: the target was not reached.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if layers < 2:
        raise RequestError(f"recall needs at least two layers, not {layers}")
    if pairs < 1 or pairs > alphabet.keys or length < 4 * pairs or length < 2 * SHORTEST_PERIOD:
        raise RequestError(
            f"{pairs} pairs in a context of {length} tokens cannot be trained",
            fix=f"take 1 to {alphabet.keys} pairs, and at least four tokens of context per pair",
        )
    if steps < 1 or batch < 2:
        raise RequestError(f"steps {steps} and batch {batch} are too few", fix="take at least 1 step of 2 sequences")
    config = LlamaConfig(
        vocab_size=alphabet.vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        probe = nn.Linear(hidden, alphabet.vocab_size, bias=False)
    random = torch.Generator().manual_seed(seed)
    fresh = torch.Generator().manual_seed(seed + 1)
    first: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        first[:] = [output[0] if isinstance(output, tuple) else output]

    hook = model.model.layers[0].register_forward_hook(keep)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probe.parameters()], lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    accuracy, reach, settled = 0.0, min(length, max(4 * pairs, 48)), 0
    repeats = batch // 2  # of random text, until recall is understood
    try:
        for step in range(1, steps + 1):
            left = 1.0 if not settled else max(0.0, 1 - (step - settled) / SETTLE)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(left, step / WARMUP)
            now = int(torch.randint(max(2 * pairs, reach // 3), reach + 1, (1,), generator=random))
            ids, targets = _batch(random, batch, repeats, now, pairs, alphabet)
            wanted = targets != IGNORED
            states = model.model(ids).last_hidden_state
            recall = F.cross_entropy(model.lm_head(states[wanted]), targets[wanted])
            carried = F.rms_norm(first[0][:, 1:], (hidden,))
            previous = F.cross_entropy(probe(carried).flatten(0, 1), ids[:, :-1].flatten())
            optimizer.zero_grad()
            (recall + previous).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            last = step == steps or (settled and step == settled + SETTLE)
            if last or step % CHECK_EVERY == 0:
                accuracy = _accuracy(model, fresh, reach, pairs, alphabet)
                if progress is not None:
                    progress(step, accuracy)
                if last:
                    break
                if accuracy >= UNDERSTOOD:
                    repeats = 0
                if not settled and accuracy >= LEARNED:  # longer contexts, and at full length a falling learning rate
                    settled = step if reach == length else 0
                    reach = min(length, reach + reach // 2)
    finally:
        hook.remove()
    if accuracy < target or reach < length:
        raise CheckError(
            f"the recall model answers {accuracy:.1%} at {reach} tokens after {step} steps; "
            f"{target:.1%} at {length} were wanted",
            fix="allow more steps, fewer pairs or a shorter length, or try another seed",
        )
    return model.requires_grad_(False).eval()


def _batch(
    random: torch.Generator, count: int, repeats: int, length: int, pairs: int, alphabet: Alphabet
) -> tuple[Tensor, Tensor]:
    """Token ids and next-token targets [count, length + 2 pairs]; `repeats` rows are random text that repeats itself,
    the others recall."""
    task = plant(random, count - repeats, length, pairs, pairs, alphabet)
    recall = torch.full_like(task.tokens, IGNORED).scatter_(1, task.query_positions, task.answers)
    total = task.tokens.shape[1]
    period = torch.randint(SHORTEST_PERIOD, total // 2 + 1, (repeats, 1), generator=random)
    text = torch.randint(0, alphabet.vocab_size, (repeats, total), generator=random)
    text = text.gather(1, torch.arange(total) % period)
    following = torch.full_like(text, IGNORED)
    seen = torch.arange(1, total) > period  # [repeats, total - 1]
    following[:, :-1] = torch.where(seen, text[:, 1:], following[:, :-1])
    return torch.cat([task.tokens, text]), torch.cat([recall, following])


def _accuracy(model: LlamaForCausalLM, random: torch.Generator, length: int, pairs: int, alphabet: Alphabet) -> float:
    """Share of answers that are right on fresh sequences."""
    task = plant(random, HELD_OUT, length, pairs, pairs, alphabet)
    with torch.no_grad():
        picked = model(task.tokens).logits.argmax(dim=-1).gather(1, task.query_positions)
    return float((picked == task.answers).double().mean())
