"""How far attention of several members (heads, layers) agrees over blocks of the context, beside what chance gives."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from pagestream.kernels.summary import LEAST_REST
from pagestream.model.routing import entropy

Array = npt.NDArray[np.floating]

_BLOCK_SIZES = (16, 64, 256, 1024)  # tokens


class Agreement(TypedDict):
    head_jsd: float | None
    head_jsd_null: float | None
    layer_jsd: float | None
    layer_jsd_null: float | None
    coherence_heads: float | None
    coherence_heads_null: float | None
    coherence_layers: float | None
    coherence_layers_null: float | None


def agreement(masses: Array, page_size: int, context: int) -> Agreement:
    """Of `masses` [L, Hq, pages], without the first token; as step.py's PageSummary defines it. Heads that put less
    than a thousandth there are left out. Nulls are drawn anew for each `context`: one draw for all rows is no mean,
    and of two members over two blocks it may turn both alike."""
    totals = masses.sum(-1)
    counted = totals > LEAST_REST  # [L, Hq]
    heads = masses * np.divide(1, totals, out=np.zeros_like(totals), where=counted)[..., None]
    per_layer = counted.sum(-1)
    layers = heads.sum(1) / np.maximum(per_layer, 1)[:, None]  # [L, pages]
    random = np.random.default_rng(context)
    of_heads = _over_sizes(heads, counted, page_size, random)
    of_layers = _over_sizes(layers[None], (per_layer > 0)[None], page_size, random)
    return Agreement(
        head_jsd=of_heads.jsd,
        head_jsd_null=of_heads.jsd_null,
        layer_jsd=of_layers.jsd,
        layer_jsd_null=of_layers.jsd_null,
        coherence_heads=of_heads.coherence,
        coherence_heads_null=of_heads.coherence_null,
        coherence_layers=of_layers.coherence,
        coherence_layers_null=of_layers.coherence_null,
    )


class _Means(NamedTuple):
    """Over block sizes and sets of members; None where there is nothing to compare."""

    jsd: float | None = None
    jsd_null: float | None = None
    coherence: float | None = None
    coherence_null: float | None = None


def _over_sizes(members: Array, counted: npt.NDArray[np.bool_], page_size: int, random: np.random.Generator) -> _Means:
    """Of `members` [sets, members, pages]: of sets with two members or more that are `counted` [sets, members]; the
    others are 0."""
    counts = counted.sum(-1)
    sets = counts > 1
    blocks, count = members[sets], counts[sets, None].astype(members.dtype)
    found: list[Array] = []  # for each size [divergence and its share of the bound, itself and its null, sets]
    merged = page_size  # tokens that a block of `blocks` spans
    for size in _BLOCK_SIZES:
        if size < page_size or blocks.shape[-1] * merged <= size or not len(blocks):
            continue
        if size > merged:
            blocks = np.add.reduceat(blocks, np.arange(0, blocks.shape[-1], size // merged), axis=-1)
            merged = size
        means = np.array((blocks.sum(1), _shifted_sum(blocks, random))) / count
        jsd = np.maximum(entropy(means) - entropy(blocks).sum(-1) / count[:, 0], 0)
        found.append(np.array((jsd, jsd / np.log(np.minimum(count[:, 0], blocks.shape[-1])))))
    if not found:
        return _Means()
    (jsd, jsd_null), (share, share_null) = np.mean(found, axis=(0, -1)).tolist()
    return _Means(jsd, jsd_null, 1 - share, 1 - share_null)


def _shifted_sum(blocks: Array, random: np.random.Generator) -> Array:
    """Over members of [sets, members, blocks], the blocks of each moved in a circle by its own distance: chance, but
    the same for the same row."""
    sets, members, width = blocks.shape
    shifts = random.integers(width, size=(members, 1))
    places = np.arange(members)[:, None] * width + (np.arange(width) + shifts) % width
    total: Array = np.take(blocks.reshape(sets, -1), places, axis=1).sum(1)
    return total
