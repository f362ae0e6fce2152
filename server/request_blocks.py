"""How a request comes by its blocks and parts with them: from the prefix cache, by a copy, and back to the cache."""

from __future__ import annotations

from pagestream.server.block_pool import BlockPool
from pagestream.server.prefix_tree import CachedPrefix
from pagestream.server.request import Request


def num_missing(pool: BlockPool, request: Request, num_tokens: int) -> int:
    """How many blocks it needs beside its own, one of which may be left from a proposal, to hold `num_tokens`."""
    return max(pool.blocks_for(num_tokens) - len(request.block_ids), 0)


def num_found_in_use(pool: BlockPool, request: Request) -> int:
    """How many of the blocks it will find when it starts cost no room, because others hold them."""
    found = pool.find(request.tenant, request.tokens, request.num_reusable)
    return sum(pool.num_references_to(block_id) > 0 for block_id in found.block_ids)


def share_cached(pool: BlockPool, request: Request) -> CachedPrefix:
    """Gives it the pages that hold its next tokens; returns what else was found. A token behind which another is chosen
    is always computed: without it there are no logits.
    """
    found = pool.find(request.tenant, request.tokens, request.num_reusable, request.block_ids)
    pool.share(found.block_ids)
    request.block_ids.extend(found.block_ids)
    request.num_computed = len(request.block_ids) * pool.block_size
    return found


def take_cached(pool: BlockPool, request: Request, length: int) -> None:
    """Gives it, before it computes `length` tokens of a new page, what others have computed by now. A page that only
    begins like its own is copied, if there is room for that; it is held until then, so that the step can be repeated.
    """
    if request.num_uncomputed == 1 or request.num_computed < len(request.block_ids) * pool.block_size:
        return  # a decode, or in the midst of a page
    found = share_cached(pool, request)
    if not found.num_copyable:
        return
    end = min(request.num_computed + found.num_copyable + length, request.num_tokens)
    held = pool.num_references_to(found.copy_from) == 0
    if num_missing(pool, request, end) + held <= pool.num_available:
        pool.share([found.copy_from])
        request.copy_from = found.copy_from
        request.num_computed += found.num_copyable


def advance(pool: BlockPool, request: Request, end: int) -> None:
    """It has computed its tokens up to `end`: has them found from now on, but for decodes within a page."""
    start, request.num_computed = request.num_computed, end
    if request.copy_from is not None:
        pool.release([request.copy_from])
        request.copy_from = None
    if end % pool.block_size == 0 or end - start > 1 or end <= request.num_prompt_tokens:
        pool.keep(request.tenant, request.tokens, request.block_ids, start, end)


def release(pool: BlockPool, request: Request) -> None:
    """Lets go of all its blocks. What they hold can be found until others need them."""
    # Not if its last page holds nothing yet, nor if tokens were dropped: what it computed for them was kept at once.
    if request.copy_from is None and request.num_computed < request.num_tokens:
        page = request.num_computed // pool.block_size * pool.block_size
        pool.keep(request.tenant, request.tokens, request.block_ids, page, request.num_computed)
    pool.release(held(request))
    request.block_ids = []  # a new list: a chunk in flight still reads the old one
    request.copy_from = None


def held(request: Request) -> list[int]:
    """The blocks it has a reference to."""
    return request.block_ids if request.copy_from is None else [*request.block_ids, request.copy_from]
