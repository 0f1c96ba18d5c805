"""EvictKV and PrunePyramid against the family's own model whose attention reads what each method keeps, in float64.

The methods are written out here once more, token by token and head by head, from their papers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import families
import kvpass
from kvpass.errors import PlanError, RequestError, UnsupportedError
from kvpass.passes import EvictKV, GroupHeads, PageKV, PrunePyramid, QuantizeKV, ShareLayers, SlideWindow
from properties import error
from properties import forward as whole
from written_out import EXACT, captured, ids, reference

PROMPT, MORE = 64, 14
WINDOW = 6


def probabilities(q, k, rows, columns, scale, softcap):
    """[H, len(rows), len(columns)] of one sequence: causal attention by token numbers."""
    scores = q[:, rows] @ k[:, columns].transpose(1, 2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    hidden = torch.tensor(columns).unsqueeze(0) > torch.tensor(rows).unsqueeze(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def best(scores, count, always):
    """The tokens of a dict with the highest scores, those of `always` first; of two equal ones the later."""
    order = sorted(scores, key=lambda j: (j in always, scores[j], j), reverse=True)
    return set(order[:count])


def smoothed(scores, width):
    return {
        j: sum(scores.get(j + d, 0.0) for d in range(-(width // 2), width // 2 + 1)) / width for j in scores
    }  # of a run of neighbours


class Method:
    """What a layer keeps, for one sequence and one KV head (or for all: apart = False)."""

    apart = True

    def __init__(self, budget, window=WINDOW, sinks=0):
        self.budget, self.window, self.sinks = budget, window, sinks

    def prompt(self, weights, n):
        """Tokens that stay of a prompt, by weights [heads, n, n]."""
        raise NotImplementedError

    def step(self, weights, alive, t):
        """Tokens that stay after token t read `alive` (itself included) with weights [heads, len(alive)]."""
        return alive


class SnapKV(Method):
    def prompt(self, weights, n):
        seen = weights[:, n - self.window :].sum(1).mean(0)
        context = {j: float(seen[j]) for j in range(n - self.window)}
        kept = best(smoothed(context, 5), self.budget - self.window, set())
        return kept | set(range(n - self.window, n))


class H2O(Method):
    def prompt(self, weights, n):
        sums = weights.sum(1).mean(0)
        self.mass = {j: float(sums[j]) for j in range(n)}
        return best(self.mass, self.budget, set(range(n - self.budget // 2, n)))

    def step(self, weights, alive, t):
        for j, w in zip(sorted(alive), weights.mean(0).tolist(), strict=True):
            self.mass[j] = self.mass.get(j, 0.0) + w
        recent = {j for j in alive if j > t - self.budget // 2}
        return best({j: self.mass[j] for j in alive}, self.budget, recent)


class Tova(Method):
    apart = False

    def prompt(self, weights, n):
        last = weights[:, n - 1].mean(0)
        return best({j: float(last[j]) for j in range(n)}, self.budget, set())

    def step(self, weights, alive, t):
        scores = dict(zip(sorted(alive), weights.mean(0).tolist(), strict=True))
        return best(scores, self.budget, set())


class Scissorhands(Method):
    rows = 16

    def prompt(self, weights, n):
        self.often = {}
        for j in range(n):
            counts = [float(weights[:, i, j].mean() >= 1 / (i + 1)) for i in range(n - self.rows, n)]
            self.often[j] = sum(counts) / self.rows
        return best(self.often, self.budget, set(range(n - self.window, n)))

    def step(self, weights, alive, t):
        for j, w in zip(sorted(alive), weights.mean(0).tolist(), strict=True):
            old = self.often.get(j, 0.0)
            self.often[j] = old + (float(w >= 1 / len(alive)) - old) / self.rows
        recent = {j for j in alive if j > t - self.window}
        return best({j: self.often[j] for j in alive}, self.budget, recent)


class Recent(Method):
    apart = False

    def prompt(self, weights, n):
        return set(range(self.sinks)) | set(range(n - self.budget + self.sinks, n))

    def step(self, weights, alive, t):
        return set(sorted(alive - set(range(self.sinks)))[-(self.budget - self.sinks) :]) | (
            alive & set(range(self.sinks))
        )


def evicted(make, kv_heads, prompts, log=None):
    """The attention of a model whose prompts of so many tokens are cut by `make(layer)`, a Method."""

    def read(layer, q, k, v, scale, softcap):
        out = torch.zeros_like(q)
        heads = q.shape[1]
        group = heads // kv_heads
        for row, n in enumerate(prompts):
            whole_prompt = list(range(n))
            weights = probabilities(q[row], k[row], whole_prompt, whole_prompt, scale, softcap)
            out[row, :, :n] = weights @ v[row, :, :n]
            method = make(layer)
            size = group if method.apart else heads
            for first in range(0, heads, size):
                mine = slice(first, first + size)
                method = make(layer)
                alive = method.prompt(weights[mine], n) if method.budget < n else set(whole_prompt)
                if log is not None:
                    log[layer, row, first // size] = sorted(alive)
                for t in range(n, q.shape[2]):
                    alive = alive | {t}
                    columns = sorted(alive)
                    p = probabilities(q[row, mine], k[row, mine], [t], columns, scale, softcap)
                    out[row, mine, t] = (p @ v[row, mine][:, columns])[:, 0]
                    alive = method.step(p[:, 0], alive, t)
        return out

    return read


def run(slim, tokens, prompts):
    """Logits of the last prompt token and of what follows it, by prefill and decode; the state at the end of both."""
    longest = max(prompts)
    logits, state = slim.prefill(tokens[:, :longest], torch.tensor(prompts))
    after = state.clone()
    parts = [logits.unsqueeze(1)]
    following = torch.stack([tokens[row, n : n + MORE] for row, n in enumerate(prompts)])
    parts += [slim.decode(following[:, i : i + 1], state) for i in range(MORE)]
    return torch.cat(parts, dim=1), after, state


def expected_of(full, prompts):
    return torch.stack([full[row, n - 1 : n + MORE] for row, n in enumerate(prompts)])


def changed(source, *passes, verify="off"):
    return kvpass.transform(source, list(passes), progress=False, verify=verify)


FAMILIES = {
    "llama": ("llama", {}),
    "soft-capped": ("gemma2", {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}),
    "normed": ("qwen3", {}),
}
METHODS = {
    "snapkv": (EvictKV("snapkv", budget=20, window=WINDOW), lambda layer: SnapKV(20)),
    "h2o": (EvictKV("h2o", budget=20), lambda layer: H2O(20)),
    "tova": (EvictKV("tova", budget=20), lambda layer: Tova(20)),
    "scissorhands": (EvictKV("scissorhands", budget=20, window=WINDOW, rows=16), lambda layer: Scissorhands(20)),
    "recent": (EvictKV("recent", budget=20, sinks=3), lambda layer: Recent(20, sinks=3)),
    "pyramidkv": (EvictKV("pyramidkv", budget=20, window=WINDOW), lambda layer: SnapKV([33, 7][layer])),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_and_computes_what_its_paper_says(method, family):
    step, make = METHODS[method]
    name, options = FAMILIES[family]
    tokens, log = ids(2, PROMPT + MORE), {}
    prompts = [PROMPT, PROMPT - 11]
    expected = expected_of(reference(name, tokens, evicted(make, 2, prompts, log), **options), prompts)
    found, after, _ = run(changed(captured(name, **options), step, verify="fast"), tokens, prompts)
    for (layer, row, head), kept in log.items():
        assert after.positions(layer)[row][head].tolist() == kept
    assert error(found, expected) < EXACT


# ---------------------------------------------------------------------- pruning the residual stream


def pruned(plan, prompts, rule, log=None):
    """The attention of a model behind whose layers tokens leave for good: rule(layer, context, n) -> how many stay."""
    gone = {row: set() for row in range(len(prompts))}

    def read(layer, q, k, v, scale, softcap):
        out = torch.zeros_like(q)
        for row, n in enumerate(prompts):
            there = [j for j in range(n) if j not in gone[row]]
            if log is not None:
                log[layer, row] = there
            weights = probabilities(q[row], k[row], there, there, scale, softcap)
            out[row, :, there] = weights @ v[row][:, there]
            for t in range(n, q.shape[2]):
                columns = there + list(range(n, t + 1))
                p = probabilities(q[row], k[row], [t], columns, scale, softcap)
                out[row, :, t] = (p @ v[row][:, columns])[:, 0]
            window = min(n // 5 + 1, 8)
            stay = rule(layer, len(there) - window, n)
            ramp = torch.linspace(1, 1.2, window, dtype=q.dtype)
            scores = (weights[:, -window:] * ramp.view(1, -1, 1)).mean(dim=(0, 1))
            context = {j: float(s) for j, s in zip(there, scores, strict=True) if j < n - window}
            kept = best(context, stay, {0, 1, 2}) | set(range(n - window, n))
            gone[row] |= set(there) - kept
        return out

    return read


DEEP = {"num_hidden_layers": 5}
SMALL = {"max_recent": 8, "min_context": 9, "sinks": 3}
SCHEDULES = {
    "solved": PrunePyramid(keep=0.55, length=64, **SMALL),
    "published": PrunePyramid(schedule="pyramidinfer", decay=0.6, **SMALL),
    "every other layer": PrunePyramid(schedule="pyramidinfer", decay=0.5, interval=2, **SMALL),
    "constant": PrunePyramid(schedule="pyramidinfer", decay=0.7, strategy="constant", **SMALL),
    "step": PrunePyramid(schedule="step", at=1, keep=0.3, **SMALL),
}


def staying(plan, stops):
    def rule(layer, context, n):
        share = plan[layer].passes.share if plan[layer].passes is not None else 1
        wanted = int(context * share)
        if context <= 9 or share == 1:
            return context
        return wanted if wanted > 9 else (context if stops else 9)

    return rule


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_survivors_alone_are_computed_above_a_cut(schedule, family):
    tokens, log = ids(2, PROMPT + MORE, seed=3), {}
    prompts = [PROMPT, PROMPT - 11]
    slim = changed(captured(family, **DEEP), SCHEDULES[schedule], verify="fast")
    rule = staying(slim.plan, SCHEDULES[schedule].schedule == "pyramidinfer")
    expected = expected_of(reference(family, tokens, pruned(slim.plan, prompts, rule, log), **DEEP), prompts)
    found, after, _ = run(slim, tokens, prompts)
    assert min(len(there) for there in log.values()) < PROMPT - 15
    for (layer, row), there in log.items():
        assert after.extras[layer][0][row, 0, : len(there)].tolist() == there  # as they lie in memory
        assert not row or set(log[layer, row]) <= set(log[max(0, layer - 1), row])
    assert error(found, expected) < EXACT


def test_a_cut_that_keeps_everything_changes_no_bit():
    dense, tokens = captured("llama", **DEEP), ids(2, 40)
    everything = [
        PrunePyramid(keep=1.0),
        PrunePyramid(schedule="pyramidinfer", decay=1.0),
        EvictKV("snapkv", keep=1.0, window=4),
    ]
    logits, state = dense.prefill(tokens)
    expected = [logits.unsqueeze(1), dense.decode(tokens[:, :1], state), dense.decode(tokens[:, 1:4], state)]
    for step in everything:
        slim = changed(dense, step)
        logits, state = slim.prefill(tokens)
        found = [logits.unsqueeze(1), slim.decode(tokens[:, :1], state), slim.decode(tokens[:, 1:4], state)]
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_without_a_cache_nothing_is_dropped():
    dense, tokens = captured("llama", **DEEP), ids(2, 40)
    assert torch.equal(whole(changed(dense, SCHEDULES["solved"]), tokens), whole(dense, tokens))


# ---------------------------------------------------------------------- generated text


def test_generated_text_is_thinned_and_the_prompt_is_not():
    tokens = ids(2, 120, seed=5)
    step = PrunePyramid(schedule="pyramidinfer", decay=0.7, interval=2, thin=True, thin_decay=0.2, **SMALL)
    slim = changed(captured("llama", **DEEP), step)
    prompts = [40, 33]
    _, state = slim.prefill(tokens[:, :40], torch.tensor(prompts))
    before = [state.positions(layer) for layer in range(5)]
    grown = [dict(state.fills) for _ in range(1)]
    for index in range(60):
        slim.decode(tokens[:, 40 + index : 41 + index], state)
        grown.append({layer: list(rows) for layer, rows in state.fills.items()})
    for layer in range(5):
        for line, fill in zip(state.extras[layer][0], state.fills[layer], strict=True):
            assert bool((line[0, 1:fill] > line[0, : fill - 1]).all())
            assert bool((line[0, fill:] < 0).all())
        stays = slim.plan[layer].keeps.thinned
        for row, n in enumerate(prompts):
            kept = state.positions(layer)[row][0].tolist()
            assert kept[: before[layer][row].shape[1]] == before[layer][row][0].tolist()
            made = kept[before[layer][row].shape[1] :]
            assert made == sorted(made)
            assert made[-8:] == list(range(n + 52, n + 60))
            thinned = [m for m in made if m < n + 48]
            assert len(thinned) == 3 * stays
            for block in range(3):
                assert len([m for m in made if n + 16 * block <= m < n + 16 * (block + 1)]) == stays
    assert [slim.plan[layer].keeps.thinned for layer in range(5)] == [14, 14, 10, 14, 3]


@pytest.mark.parametrize("family", ["llama", "soft-capped"])
def test_thinning_drops_what_the_latest_queries_care_least_for(family):
    name, options = FAMILIES[family]
    tokens = ids(1, 60, seed=8)
    window, kept = 8, {}
    step = PrunePyramid(schedule="pyramidinfer", decay=1.0, thin=True, strategy="constant", thin_decay=0.5, **SMALL)

    def read(layer, q, k, v, scale, softcap):
        out, weights = torch.zeros_like(q), {}
        alive, begin = list(range(30)), 30
        out[0, :, :30] = probabilities(q[0], k[0], alive, alive, scale, softcap) @ v[0, :, :30]
        for t in range(30):
            weights[t] = dict(
                zip(alive, probabilities(q[0], k[0], [t], alive, scale, softcap)[:, 0].mean(0), strict=True)
            )
        for t in range(30, 60):
            alive.append(t)
            p = probabilities(q[0], k[0], [t], alive, scale, softcap)
            out[0, :, t] = (p @ v[0][:, alive])[:, 0]
            weights[t] = dict(zip(alive, p[:, 0].mean(0), strict=True))
            if t + 1 - window - begin >= 16:
                ramp = torch.linspace(1, 1.2, window, dtype=q.dtype)
                rows = range(t + 1 - window, t + 1)
                block = {
                    j: sum(float(r * weights[i][j]) for r, i in zip(ramp, rows, strict=True))
                    for j in range(begin, begin + 16)
                }
                dropped = set(block) - best(block, 7, set())
                alive, begin = [j for j in alive if j not in dropped], begin + 16
        kept[layer] = alive
        return out

    expected = reference(name, tokens, read, **options)[:, 29:]
    slim = changed(captured(name, **options), step)
    logits, state = slim.prefill(tokens[:, :30])
    found = [logits.unsqueeze(1), *(slim.decode(tokens[:, t : t + 1], state) for t in range(30, 60))]
    for layer, alive in kept.items():
        assert len(alive) == 60 - 9
        assert state.positions(layer)[0][0].tolist() == alive
    assert error(torch.cat(found, dim=1), expected) < EXACT


def test_thinning_does_not_count_alibi():
    with pytest.raises(UnsupportedError, match="layer 0 knows positions by ALiBi"):
        changed(captured("bloom"), PrunePyramid(schedule="pyramidinfer", thin=True, **SMALL))


def test_many_tokens_at_once_are_the_same_as_one_by_one():
    tokens = ids(2, 70, seed=6)
    for step in (EvictKV("h2o", budget=12), EvictKV("snapkv", budget=20, window=4), SCHEDULES["solved"]):
        slim = changed(captured("llama", **DEEP), step)
        _, state = slim.prefill(tokens[:, :60], torch.tensor([60, 47]))
        other = state.clone()
        once = torch.cat([slim.decode(tokens[:, t : t + 1], state) for t in range(60, 70)], dim=1)
        parts = torch.cat([slim.decode(tokens[:, 60:63], other), slim.decode(tokens[:, 63:70], other)], dim=1)
        assert error(once, parts) < EXACT


def test_rows_are_selected_repeated_and_copied():
    tokens = ids(3, 80, seed=7)
    for step in (
        EvictKV("tova", budget=16),
        SCHEDULES["solved"],
        PrunePyramid(keep=0.8, length=64, thin=True, **SMALL),
    ):
        slim = changed(captured("llama", **DEEP), step)
        _, state = slim.prefill(tokens[:, :60], torch.tensor([60, 31, 47]))
        copied = state.clone()
        expected = torch.cat([slim.decode(tokens[:, t : t + 1], state) for t in range(60, 80)], dim=1)
        copied.select(torch.tensor([2, 0, 2]))
        following = tokens[torch.tensor([2, 0, 2]), 60:80]
        found = torch.cat([slim.decode(following[:, t : t + 1], copied) for t in range(20)], dim=1)
        assert error(found, expected[torch.tensor([2, 0, 2])]) < EXACT


@pytest.mark.parametrize(
    "steps",
    [
        (EvictKV("snapkv", keep=0.4, window=6),),
        (EvictKV("h2o", budget=20),),
        (PrunePyramid(keep=0.6, length=64, **SMALL),),
        (PrunePyramid(keep=0.6, length=64, thin=True, **SMALL),),
        (PrunePyramid(schedule="step", at=1, keep=0.5, **SMALL), EvictKV("snapkv", keep=0.4, window=6), QuantizeKV(8)),
    ],
)
def test_states_are_as_large_as_planned(steps):
    slim = changed(captured("llama", **DEEP), *steps)
    tokens = ids(2, 64)
    _, state = slim.prefill(tokens)
    assert state.used_bytes() == slim.plan.bytes(2, 64)
    full = captured("llama", **DEEP)
    assert slim.plan.bytes(2, 64) < full.plan.bytes(2, 64)
    room = 0 if all(slim.plan[o].keeps is None or slim.plan[o].keeps.then != "replace" for o in range(5)) else 1
    assert state.allocated_bytes() <= state.used_bytes() * (1 + room / 10) + 16  # one free slot per row, and lengths


def test_generation_takes_beams_and_padding():
    slim = changed(captured("llama", **DEEP), SCHEDULES["solved"], EvictKV("snapkv", keep=0.5, window=6))
    tokens = ids(2, 50)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    alone = slim.generate(tokens[1:, 9:], max_new_tokens=6, do_sample=False, eos_token_id=-1)
    both = slim.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert both[1, 50:].tolist() == alone[0, 41:].tolist()
    beams = slim.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=-1)
    assert beams.shape == (2, 55)


# ---------------------------------------------------------------------- with other passes


@pytest.mark.parametrize("policy", ["snapkv", "h2o"])
def test_eviction_of_quantized_entries_is_eviction_then_rounding(policy):
    """A budget that nothing exceeds: what is left is int8 alone; a smaller one drops the same tokens."""
    tokens = ids(2, 60)
    plain = changed(captured("llama"), QuantizeKV(8))
    slim = changed(captured("llama"), QuantizeKV(8), EvictKV(policy, budget=200, window=6))
    a, b = (run(model, torch.cat([tokens, tokens], dim=1), [60, 49])[0] for model in (plain, slim))
    assert error(a, b) < EXACT
    small = changed(captured("llama"), EvictKV(policy, budget=24, window=6), QuantizeKV(8))
    full = changed(captured("llama"), EvictKV(policy, budget=24, window=6))
    (_, after, _), (_, exact, _) = (run(m, torch.cat([tokens, tokens], dim=1), [60, 49]) for m in (small, full))
    same = [
        len(set(x.tolist()) & set(y.tolist()))
        for x, y in zip(after.positions(0)[0], exact.positions(0)[0], strict=True)
    ]
    assert min(same) >= 22


@pytest.mark.parametrize("steps", [(GroupHeads(1, method="mean"),), (ShareLayers("cla:2"),)])
def test_grouped_and_shared_layers_are_pruned_too(steps):
    dense = captured("llama", num_hidden_layers=4)
    tokens = ids(2, PROMPT + MORE)
    prunings = [
        EvictKV("snapkv", budget=20, window=6),
        PrunePyramid(keep=0.7, length=64, **SMALL),
        PrunePyramid(schedule="step", at=1, keep=0.4, **SMALL),
    ]
    for pruning in prunings:
        first, second = changed(dense, *steps, pruning), changed(changed(dense, *steps), pruning)
        a, after, _ = run(first, tokens, [PROMPT, PROMPT - 9])
        b, _, _ = run(second, tokens, [PROMPT, PROMPT - 9])
        assert error(a, b) < EXACT
        assert after.used_bytes() < 0.9 * 2 * first.plan.side_bytes(0, 0, 0) + first.plan.bytes(2, PROMPT) * 1.01


def test_shared_layers_are_cut_only_where_nothing_above_reads_below():
    plan = changed(
        captured("llama", num_hidden_layers=4), ShareLayers("cla:2"), PrunePyramid(keep=0.7, length=64, **SMALL)
    ).plan
    assert [c.passes is not None for c in plan] == [False, True, False, False]
    with pytest.raises(PlanError, match="no layer"):
        changed(
            captured("llama", num_hidden_layers=4), ShareLayers("0_0_0_0"), PrunePyramid(keep=0.7, length=64, **SMALL)
        )


def test_alibi_counts_distances_between_original_positions():
    tokens = ids(2, PROMPT + MORE)
    for step in (
        PrunePyramid(keep=0.75, length=64, **SMALL),
        EvictKV("snapkv", budget=24, window=6),
        EvictKV("h2o", budget=20),
    ):
        for name in ("bloom", "mpt"):
            slim = changed(captured(name), step)
            a, _, _ = run(slim, tokens, [PROMPT, PROMPT - 20])
            b, _, _ = run(slim, tokens[1:], [PROMPT - 20])
            assert error(a[1:], b) < EXACT
    wide = changed(captured("bloom"), EvictKV("h2o", budget=200))
    a, _, _ = run(wide, tokens, [PROMPT, PROMPT - 20])
    assert error(a, expected_of(whole(captured("bloom"), tokens), [PROMPT, PROMPT - 20])) < EXACT


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((EvictKV("snapkv", budget=30),), "leaves nothing to choose"),
        ((EvictKV("snapkv", keep=0.0),), "above 0"),
        ((EvictKV("snapkv", keep=1.5),), "not above 1"),
        ((EvictKV("snapkv"),), "how much is to stay"),
        ((EvictKV("snapkv", keep=0.5, budget=40),), "how much is to stay"),
        ((EvictKV("lru", keep=0.5),), "no policy 'lru'"),
        ((EvictKV("snapkv", keep=0.5, pool=4),), "pool must be odd"),
        ((PrunePyramid(keep=0.0),), "above 0"),
        ((PrunePyramid(keep=-0.1),), "above 0"),
        ((PrunePyramid(keep=1.01),), "not above 1"),
        ((PrunePyramid(),), "how much is to stay"),
        ((PrunePyramid(bytes=0),), "must be positive"),
        ((PrunePyramid(keep=0.3, length=60),), "takes at least"),
        ((PrunePyramid(schedule="step", at=1, keep=0.5),), "cannot leave behind layer 1"),
        ((PrunePyramid(schedule="pyramidinfer", keep=0.5),), "decay ratio"),
        ((PrunePyramid(keep=0.9, length=64, recent_ratio=1.0, **SMALL),), "recent_ratio"),
        ((PrunePyramid(keep=0.9, length=64, **SMALL), PrunePyramid(keep=0.9, length=64, **SMALL)), "already"),
        ((EvictKV("h2o", keep=0.5), EvictKV("tova", keep=0.5)), "already"),
        ((SlideWindow(16), EvictKV("snapkv", keep=0.5)), "every layer keeps a window"),
        ((SlideWindow(8, positions="cache"), PrunePyramid(keep=0.9, length=64, **SMALL)), "counts positions"),
        ((QuantizeKV(4), EvictKV("snapkv", keep=0.5)), "KIVI"),
        ((EvictKV("snapkv", keep=0.5), PageKV()), "pages"),
        ((ShareLayers("0_0"), EvictKV("h2o", keep=0.5)), "several layers read"),
        ((ShareLayers("1_1", upward=True), EvictKV("snapkv", keep=0.5)), "several passes"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(steps, reason):
    with pytest.raises(PlanError, match=reason):
        changed(captured("llama"), *steps)


def test_opaque_masks_are_refused():
    with pytest.raises(PlanError, match="mask of layer 0 is kept as a table"):
        changed(captured("llama4_text", num_hidden_layers=2), EvictKV("snapkv", keep=0.5))


def test_a_prompt_below_the_floor_is_kept_whole():
    slim = changed(captured("llama", **DEEP), SCHEDULES["solved"])
    _, state = slim.prefill(ids(1, 10))
    assert [state.fills[layer] for layer in range(5)] == [[10]] * 5


def test_prompts_are_not_read_in_chunks():
    slim = changed(captured("llama"), EvictKV("snapkv", keep=0.5))
    with pytest.raises(RequestError, match="cannot be read 7 at a time"):
        slim.prefill(ids(1, 30), chunk=7)


class TimeFirst(nn.Module):
    """A decoder that computes in [S, B, D]."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 32), nn.Linear(32, 97, bias=False)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(0, 1)
        length, batch = x.shape[:2]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.view(length, batch, 4, 8).permute(1, 2, 0, 3) for t in qkv(x).chunk(3, dim=-1))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.permute(2, 0, 1, 3).reshape(length, batch, 32))
        return self.head(x.transpose(0, 1))


def test_a_stream_that_is_not_by_rows_and_tokens_is_refused():
    dense = kvpass.transform(TimeFirst().double(), dtype=torch.float64, progress=False, verify="off")
    with pytest.raises(UnsupportedError, match="passes from layer to layer"):
        changed(dense, PrunePyramid(keep=0.8, length=64, **SMALL))


def test_a_saved_model_keeps_its_rules(tmp_path):
    source = families.build("llama", num_hidden_layers=5)
    source.save_pretrained(tmp_path / "source")
    steps = [SCHEDULES["solved"], EvictKV("snapkv", keep=0.4, window=6)]
    slim = kvpass.transform(str(tmp_path / "source"), steps, progress=False)
    slim.save(tmp_path / "saved")
    loaded = kvpass.load(tmp_path / "saved")
    assert loaded.plan == slim.plan
    assert loaded.recipe == slim.recipe
    tokens = ids(2, PROMPT + MORE)
    assert torch.equal(run(loaded, tokens, [PROMPT, 40])[0], run(slim, tokens, [PROMPT, 40])[0])
    for step, said in zip(steps, ("lets only some tokens", "drops entries"), strict=True):
        with pytest.raises(UnsupportedError, match=said):
            kvpass.transform(str(tmp_path / "source"), [step], progress=False).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_layers_with_a_window_stay_as_small_as_their_window():
    dense = captured("gemma2")  # windows of 5 and full attention in turn
    tokens = ids(2, PROMPT + MORE)
    for step in (SCHEDULES["solved"], EvictKV("snapkv", budget=20, window=6), EvictKV("h2o", budget=20)):
        if isinstance(step, PrunePyramid):
            step = PrunePyramid(schedule="step", at=1, keep=0.5, **SMALL)
        slim = changed(dense, step)
        _, after, state = run(slim, tokens, [PROMPT, PROMPT - 20])
        for held in (after, state):
            assert [held.fills[layer] for layer in (0, 2)] == [[5, 5], [5, 5]]
        assert after.positions(0)[0][0].tolist() == list(range(PROMPT - 5, PROMPT))
        assert slim.plan.bytes(1, 10_000) - slim.plan.bytes(1, 9_999) <= (0 if isinstance(step, EvictKV) else 2 * 600)
    wide = changed(dense, EvictKV("snapkv", budget=200, window=6))
    found, _, _ = run(wide, tokens, [PROMPT, PROMPT - 20])
    assert error(found, expected_of(whole(dense, tokens), [PROMPT, PROMPT - 20])) < EXACT
