"""Tokens of a query's best clusters: their masses, and the choice of those to attend to."""

from __future__ import annotations

import math

import numpy as np

from . import compiled
from .scores import LOWEST, TINY, cap, exponentials


@compiled
def token_masses(
    query, shift, codes, bits, score, softcap, near, first, size, tokens, elsewhere, mass, peak, each, worth
):  # fmt: skip
    """See `tokens.token_masses`; `query` is multiplied by the steps of the codes, `shift` `[S, G]` is by their offsets.

    `softcap` is 0 where there is none. The last four are written; `worth` is 0 before.
    """
    streams, group, _ = query.shape
    row = np.zeros(codes.shape[2] * (8 // bits), np.float32)
    for stream in range(streams):
        for nth in range(near.shape[1]):
            for offset in range(each.shape[3]):
                if offset >= size[stream, nth]:
                    each[stream, :, nth, offset] = -np.inf
                    continue
                _unpack(codes[stream, first[stream, nth] + offset], bits, row)
                for head in range(group):
                    total = shift[stream, head] + score[stream, head, near[stream, nth]]
                    for channel in range(query.shape[2]):
                        total += query[stream, head, channel] * row[channel]
                    each[stream, head, nth, offset] = total
        for head in range(group):
            clusters, own = mass[stream, head], each[stream, head].reshape(-1)
            clusters[:] = score[stream, head]
            for cluster in near[stream]:
                clusters[cluster] = -np.inf
            highest = max(cap(clusters, softcap), cap(own, softcap), elsewhere[stream, head, 0], LOWEST)
            total = max(np.float32(math.exp(elsewhere[stream, head, 0] - highest)), TINY)
            exponentials(clusters, highest)
            for cluster in range(len(clusters)):
                clusters[cluster] *= tokens[stream, cluster]
                total += clusters[cluster]
            exponentials(own, highest)
            for nth in range(near.shape[1]):
                together = np.float32(0)
                for offset in range(size[stream, nth]):
                    together += each[stream, head, nth, offset]
                clusters[near[stream, nth]] = together
                total += together
            peak[stream, head, 0], share = highest, np.float32(1) / total
            for nth in range(near.shape[1]):
                for offset in range(size[stream, nth]):
                    worth[stream, nth, offset] += each[stream, head, nth, offset] * share


@compiled
def choose_tokens(worth, size, here, budget, enough, left, each, near, mass, kept, read, held):
    """See `tokens.choose_tokens`. The last three are written, and `mass` changes."""
    streams, count, _ = worth.shape
    for stream in range(streams):
        most, there = budget[stream], here[stream].copy()
        tokens = size[stream].sum()
        lacks = False
        for nth in range(count):
            there[nth, size[stream, nth] :] = False
            for offset in range(size[stream, nth]):
                lacks = lacks or not there[nth, offset]
        least = _best(worth[stream], there, most, kept[stream])
        if lacks:
            gain = np.zeros(count, np.float32)
            for nth in range(count):
                for offset in range(size[stream, nth]):
                    if not there[nth, offset] and worth[stream, nth, offset] > least:
                        gain[nth] += worth[stream, nth, offset] - least
            if _fewest(gain, np.float32(0) if tokens <= most else enough, left, read[stream]):
                for nth in range(count):
                    if read[stream, nth]:
                        there[nth, : size[stream, nth]] = True
                _best(worth[stream], there, most, kept[stream])
        for head in range(mass.shape[1]):
            for nth in range(count):
                lost = np.float32(0)
                for offset in range(size[stream, nth]):
                    if kept[stream, nth, offset]:
                        held[stream, head] += each[stream, head, nth, offset]
                    else:
                        lost += each[stream, head, nth, offset]
                mass[stream, head, near[stream, nth]] = lost


@compiled
def _best(worth, there, most, chosen):
    """Choose the `most` best tokens of those `there`; what another has to be worth to be among them."""
    some, count = np.empty(worth.size, np.float32), 0
    for nth in range(worth.shape[0]):
        for offset in range(worth.shape[1]):
            chosen[nth, offset] = there[nth, offset]
            if there[nth, offset]:
                some[count] = worth[nth, offset]
                count += 1
    if count < most:
        return np.float32(0)
    if most == 0:
        chosen[:] = False
        return np.float32(np.inf)
    least = _greatest(some, count, most)
    ties = most
    for token in range(count):
        ties -= some[token] > least
    for nth in range(worth.shape[0]):
        for offset in range(worth.shape[1]):
            if there[nth, offset] and not worth[nth, offset] > least:
                chosen[nth, offset] = worth[nth, offset] == least and ties > 0
                ties -= chosen[nth, offset]
    return least


@compiled
def _greatest(numbers, count, most):
    """The number at place `most`, from 1, of the first `count` in descending order (Hoare's quickselect)."""
    low, high, place = 0, count - 1, most - 1
    while low < high:
        pivot = numbers[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while numbers[i] > pivot:
                i += 1
            while numbers[j] < pivot:
                j -= 1
            if i <= j:
                numbers[i], numbers[j] = numbers[j], numbers[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return numbers[place]


@compiled
def _fewest(gain, enough, left, read):
    """Mark the clusters worth reading, all but those that bring least, and say whether there are any."""
    total, some = np.float32(0), False
    for nth in range(len(gain)):
        total += gain[nth]
        read[nth] = gain[nth] > 0
        some = some or read[nth]
    if not total > enough:
        read[:] = False
        return False
    below = np.float32(0)
    while True:
        least = -1
        for nth in range(len(gain)):
            if read[nth] and (least < 0 or gain[nth] < gain[least]):
                least = nth
        if least < 0:
            return False
        below += gain[least]
        if below > left * enough:
            return some
        read[least] = False


@compiled
def _unpack(packed, bits, row):
    """All codes of one vector, in the order of its channels (`codes.pack`)."""
    width, low = len(packed), (1 << bits) - 1
    for part in range(8 // bits):
        for byte in range(width):
            row[part * width + byte] = np.float32((packed[byte] >> (part * bits)) & low)
