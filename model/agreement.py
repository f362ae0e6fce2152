"""How far attention of several members (heads, layers) agrees over blocks of the context, beside what chance gives."""

from __future__ import annotations

from typing import TypedDict

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


def agreement(masses: Array, page_size: int) -> Agreement:
    """Of `masses` [L, Hq, pages], without the first token; as step.py's PageSummary defines it. Heads that put less
    than a thousandth there are left out."""
    totals = masses.sum(-1, keepdims=True)
    counted = totals[..., 0] > LEAST_REST  # [L, Hq]
    heads = np.where(counted[..., None], masses / np.where(totals > 0, totals, 1), 0)
    per_layer = counted.sum(-1)
    layers = heads.sum(1) / np.maximum(per_layer, 1)[:, None]  # [L, pages]
    random = np.random.default_rng(0)
    head_means = _over_sizes(heads, counted, page_size, random)
    layer_means = _over_sizes(layers[None], (per_layer > 0)[None], page_size, random)
    return Agreement(
        head_jsd=head_means[0],
        head_jsd_null=head_means[1],
        layer_jsd=layer_means[0],
        layer_jsd_null=layer_means[1],
        coherence_heads=head_means[2],
        coherence_heads_null=head_means[3],
        coherence_layers=layer_means[2],
        coherence_layers_null=layer_means[3],
    )


def _over_sizes(
    members: Array, counted: npt.NDArray[np.bool_], page_size: int, random: np.random.Generator
) -> list[float | None]:
    """Means of divergence, its null, coherence, its null, of `members` [sets, members, pages], over the sets with two
    members or more that are counted, and over block sizes."""
    sets = counted.sum(-1) > 1
    blocks, counted = members[sets], counted[sets]
    found: list[Array] = []
    merged = page_size
    for size in _BLOCK_SIZES:
        if size < page_size or blocks.shape[-1] * merged <= size or not len(blocks):
            continue
        if size > merged:
            blocks = np.add.reduceat(blocks, np.arange(0, blocks.shape[-1], size // merged), axis=-1)
            merged = size
        count = counted.sum(-1).astype(blocks.dtype)
        mean_entropy = (entropy(blocks) * counted).sum(-1) / count
        bound = np.log(np.minimum(count, blocks.shape[-1]))
        for total in (blocks.sum(1), _shifted_sum(blocks, random)):
            jsd = np.maximum(entropy(total / count[:, None]) - mean_entropy, 0)
            found += [jsd.mean(), (1 - jsd / bound).mean()]
    if not found:
        return [None] * 4
    jsd, coherence, jsd_null, coherence_null = np.reshape(found, (-1, 4)).mean(0).tolist()
    return [jsd, jsd_null, coherence, coherence_null]


def _shifted_sum(blocks: Array, random: np.random.Generator) -> Array:
    """Over members of [sets, members, blocks], the blocks of each moved in a circle by its own distance: chance, but
    the same for the same shape."""
    sets, members, width = blocks.shape
    shifts = random.integers(width, size=(members, 1))
    places = np.arange(members)[:, None] * width + (np.arange(width) + shifts) % width
    total: Array = np.take(blocks.reshape(sets, -1), places, axis=1).sum(1)
    return total
