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
    head_means = _over_sizes(heads, counted, page_size)
    layer_means = _over_sizes(layers[None], (per_layer > 0)[None], page_size)
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


def _over_sizes(members: Array, counted: npt.NDArray[np.bool_], page_size: int) -> list[float | None]:
    """Means of divergence, its null, coherence, its null, of `members` [sets, members, pages], over the sets with two
    members or more that are counted, and over block sizes."""
    sets = counted.sum(-1) > 1
    members, counted = members[sets], counted[sets]
    found: list[Array] = []
    for size in _BLOCK_SIZES:
        if size < page_size or members.shape[-1] * page_size <= size or not len(members):
            continue
        starts = np.arange(0, members.shape[-1], size // page_size)
        blocks = np.add.reduceat(members, starts, axis=-1)
        count = counted.sum(-1)
        bound = np.log(np.minimum(count, blocks.shape[-1]))
        pair = [divergence(blocks, counted), divergence(_shifted(blocks), counted)]
        found.append(np.array([*pair, *(1 - jsd / bound for jsd in pair)]).mean(-1))
    return [float(mean) for mean in np.mean(found, axis=0)] if found else [None] * 4


def divergence(members: Array, counted: npt.NDArray[np.bool_]) -> Array:
    """Generalised Jensen-Shannon divergence, H(mean of P) - mean of H(P), nats: of `members` [..., m, blocks], those
    that are `counted` [..., m]."""
    count = counted.sum(-1)
    mean = members.sum(-2) / count[..., None]
    result: Array = np.maximum(entropy(mean) - (entropy(members) * counted).sum(-1) / count, 0)
    return result


def _shifted(members: Array) -> Array:
    """Each member's blocks moved in a circle, by its own distance: chance, but the same for the same shape."""
    blocks = members.shape[-1]
    shifts = np.random.default_rng(blocks).integers(blocks, size=members.shape[:-1])
    places = (np.arange(blocks) + shifts[..., None]) % blocks
    return np.take_along_axis(members, places, axis=-1)
