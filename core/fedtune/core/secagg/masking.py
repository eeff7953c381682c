"""Putting masks on an update, and taking them off a sum: the two halves that must cancel, side by side.

client   y_i = u_i + PRG(b_i) + Σ_{j>i} PRG(s_ij) − Σ_{j<i} PRG(s_ij)                 j in U2, partners of i
server   Σ_{i∈U3} u_i = Σ_{i∈U3} (y_i − PRG(b_i)) − Σ_{i∈U3} Σ_{j∈U2∖U3} ± PRG(s_ij)   the sign i gave it
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from fedtune.core.secagg.config import segments_of
from fedtune.core.secagg.masks import Words, add_masks, pair_mask_keys, self_mask_key
from fedtune.core.secagg.transcript import Transcript, mask_agreement


def mask_update(
    words: Mapping[int, Words],
    transcript: Transcript,
    client_index: int,
    sharers: Set[int],
    seeds: tuple[bytes, bytes],
) -> None:
    """Masks one client's update in place.

    Args:
        words: machine words by segment index, for the segments of the client's tier.
        sharers: U2.
        seeds: the client's b and σ.

    Raises:
        ValueError: a partner's mask key is of small order.
    """
    self_seed, mask_seed = seeds
    added = {index: [self_mask_key(self_seed, transcript.salt, client_index, index)] for index in words}
    subtracted: dict[int, list[bytes]] = {index: [] for index in words}
    for partner, keys in _pair_keys(transcript, client_index, mask_seed, sharers).items():
        for index, key in keys.items():
            (added if client_index < partner else subtracted)[index].append(key)
    for index, masked in words.items():
        add_masks(masked, added[index], subtracted[index])


def unmask_sums(
    sums: Mapping[int, Words],
    transcript: Transcript,
    survivors: Set[int],
    seeds: Mapping[int, bytes],
) -> None:
    """Unmasks the sums over the survivors in place.

    Args:
        sums: machine words by segment index, Σ y_i over the survivors that carry the segment.
        survivors: U3.
        seeds: for every client index in U2, b if it survived, else σ.
    """
    added: dict[int, list[bytes]] = {index: [] for index in sums}
    subtracted: dict[int, list[bytes]] = {index: [] for index in sums}
    for owner, seed in seeds.items():
        if owner in survivors:
            for index in segments_of(transcript.config, owner):
                subtracted[index].append(self_mask_key(seed, transcript.salt, owner, index))
            continue
        for partner, keys in _pair_keys(transcript, owner, seed, survivors).items():
            for index, key in keys.items():
                (subtracted if partner < owner else added)[index].append(key)
    for index, words in sums.items():
        add_masks(words, added[index], subtracted[index])


def _pair_keys(
    transcript: Transcript, client_index: int, mask_seed: bytes, others: Set[int]
) -> dict[int, dict[int, bytes]]:
    """The pairwise mask keys of one client index, by partner among `others` and segment index."""
    agree = mask_agreement(mask_seed)
    partners = {
        index: transcript.partners(client_index, index) & others
        for index in segments_of(transcript.config, client_index)
    }
    keys = {}
    for partner in sorted(frozenset().union(*partners.values())):
        common = [index for index in partners if partner in partners[index]]
        shared = agree(transcript.keys[partner].mask_key)
        keys[partner] = dict(
            zip(common, pair_mask_keys(shared, transcript.salt, (client_index, partner), common), strict=True)
        )
    return keys
