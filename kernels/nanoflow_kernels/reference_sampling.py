"""This module defines sampling in plain torch: how logits become token ids and log-probabilities, on every device.

A row's token depends on that row alone: its logits, its parameters, its seed and its position; never on the batch.

Shape legend: R rows, V vocabulary, P of the rows. Ids, seeds and positions are int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
ROUND = (0xD2511F53, 0xCD9E8D57)  # multipliers and key steps of Philox4x32 (Salmon et al., SC 2011)
KEY_STEP = (0x9E3779B9, 0xBB67AE85)
IN_PROMPT = 1 << 30  # in a count of outputs: the token is in the prompt, too


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token id for each row: the most likely one where the temperature is 0 (the lowest id where equal).

    Elsewhere one uniform u = uniform(seed, position) picks from softmax(logits / temperature), restricted first to
    tokens at least min_p times as likely as the most likely one, then to the top_k most likely of these (0: all), then
    to the smallest set of those that holds at least top_p of their mass (lower ids first where equal): the first id, in
    order of ids, whose cumulative probability exceeds u. A row without a possible token gives some id below V.

    logits [R, V] fp32 (-inf: never), temperature, top_k, top_p, min_p, seed, position [R] -> [R].
    """
    peak, ids = logits.max(-1)
    drawn = (temperature > 0) & (peak > -torch.inf)
    if not drawn.any():
        return ids
    rows = torch.where(drawn)[0]
    scores = logits[rows].double()
    scores = (scores - peak[rows, None]) / temperature[rows, None]
    probabilities = scores.softmax(-1)
    if (min_p[rows] > 0).any():
        probabilities[scores.exp() < min_p[rows, None]] = 0
    cut = torch.where((top_k[rows] > 0) | (top_p[rows] < 1))[0]
    if len(cut):
        probabilities[cut] = _restrict(probabilities[cut], top_k[rows][cut], top_p[rows][cut])
    cumulative = probabilities.cumsum(-1)
    u = uniform(seed[rows], position[rows])[:, None]
    ids[rows] = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
    return ids


def greedy(logits: Tensor) -> Tensor:
    """Find the most likely token of each row, the lowest id where equal. logits [R, V] fp32 -> [R]."""
    return logits.argmax(-1)


def penalise(
    logits: Tensor, rows: Tensor, seen: Tensor, entries: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Change `rows` of logits in place by what each has seen, by transformers' and then OpenAI's penalties:

    of seen tokens, x / repetition where x > 0, else x * repetition; then, of those that the output has c times,
    x - frequency c - presence.

    logits [R, V] fp32, rows [P], seen [E, V] int32: how often the output has a token, plus IN_PROMPT; entries [P]: the
    row of `seen` for each of `rows`; the penalties are fp32 [P].
    """
    held = seen[entries]
    count = held & (IN_PROMPT - 1)
    x = logits[rows]
    x = torch.where(held > 0, torch.where(x > 0, x / repetition[:, None], x * repetition[:, None]), x)
    logits[rows] = x - (frequency[:, None] * count + presence[:, None] * (count > 0))


def mask(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Set the logits of tokens that are not allowed to -inf, in `rows` of logits and in place.

    logits [R, V] fp32, rows [P], allowed [P, at least V / 32] int32: bit i % 32 of word i / 32 is token i's.
    """
    bits = allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=allowed.device) & 1
    forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)


def _restrict(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero what top_k and top_p exclude; the rest is not normalised. [R, V] -> [R, V]."""
    best, order = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(best.shape[1], device=best.device)
    best = best.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), 0)
    before = best.cumsum(-1) - best  # the mass of the more likely ones: a token is needed while that is < top_p
    needed = (before < top_p[:, None] * best.sum(-1, keepdim=True)) | (top_p[:, None] >= 1)
    return torch.zeros_like(best).scatter_(1, order, best.masked_fill(~needed, 0))


def logprobs(logits: Tensor, token_ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the log softmax of each row's token, then of its n most likely ones, best first; and the token's rank,
    which counts from 1.

    logits [R, V], token_ids [R] -> ids [R, 1 + n], log-probabilities [R, 1 + n] fp32, rank [R].
    """
    scores = logits.float().log_softmax(-1)
    own = scores.gather(1, token_ids[:, None])
    best, order = scores.topk(min(n, scores.shape[1]))
    return torch.cat((token_ids[:, None], order), 1), torch.cat((own, best), 1), (scores > own).sum(-1) + 1


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """Draw a number in [0, 1), of 2^31 equally spaced ones: the kernel language's `rand(seed, offset)`, bit for bit.

    seed [R], offset [R] -> [R] fp32.
    """
    zero = torch.zeros_like(offset)
    bits = philox(seed & LOW_32, seed >> 32 & LOW_32, offset & LOW_32, offset >> 32 & LOW_32, zero, zero)[0]
    magnitude = torch.where(bits >> 31 == 1, LOW_32 - bits, bits)  # of the two's complement, folded: -x - 1
    return magnitude.float() * 4.6566127342e-10


def philox(
    key_0: Tensor, key_1: Tensor, c_0: Tensor, c_1: Tensor, c_2: Tensor, c_3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn a counter into 128 random bits by Philox4x32 in 10 rounds. All are 32-bit words held in int64."""
    for _ in range(10):
        # Products wrap at 64 bits, of which all are kept: >> is arithmetic, hence the mask.
        product_0, product_2 = ROUND[0] * c_0, ROUND[1] * c_2
        c_0, c_1, c_2, c_3 = (
            (product_2 >> 32 & LOW_32) ^ c_1 ^ key_0,
            product_2 & LOW_32,
            (product_0 >> 32 & LOW_32) ^ c_3 ^ key_1,
            product_0 & LOW_32,
        )
        key_0, key_1 = key_0 + KEY_STEP[0] & LOW_32, key_1 + KEY_STEP[1] & LOW_32
    return c_0, c_1, c_2, c_3
