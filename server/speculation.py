"""Which decodes of a step also compute tokens that may come next, in which blocks, and which of these are kept.

A proposed token is kept if it is what the request chooses at its place, which depends on its position and on what
precedes it alone. The keys and values of the others lie behind what the request has computed, where the next step
writes before it reads. The prefix cache is told of none.
"""

from __future__ import annotations

from dataclasses import replace

from pagestream.model.step import Chunk, SampledToken
from pagestream.server.block_pool import BlockPool
from pagestream.server.request import Request

MAX_ROWS = 8  # of a step that speculates: each costs a tenth of a step, and a token kept saves a whole one


def add_proposals(pool: BlockPool, planned: dict[Request, Chunk], token_budget: int) -> None:
    """Adds proposed tokens to the chunks of a step in which requests only decode, as rows and blocks are to spare."""
    spare = min(MAX_ROWS, token_budget) - len(planned)
    for number, (request, chunk) in enumerate(planned.items()):
        if spare <= 0:
            return
        share = spare // (len(planned) - number)
        room = (len(request.block_ids) + pool.num_available) * pool.block_size
        end = min(chunk.end + share, room, request.final_length(pool.capacity))
        proposed = request.lookup.propose(request.tokens, end - chunk.end) if chunk.is_decode else ()
        if proposed:
            missing = pool.blocks_for(chunk.end + len(proposed)) - len(request.block_ids)
            request.block_ids.extend(pool.allocate(max(missing, 0)))
            planned[request] = replace(chunk, length=1 + len(proposed), proposed=proposed)
            spare -= len(proposed)


def accept(
    request: Request, chunk: Chunk, sampled: tuple[SampledToken, ...], capacity: int
) -> tuple[SampledToken, ...]:
    """Appends the tokens of `sampled` that hold to the request, and returns them. They end with the first that differs
    from the proposal, which is the right token at its place, or that ends the request in a pool of `capacity`.
    """
    count = 0
    for proposed, token in zip((*chunk.proposed, None), sampled, strict=False):
        count += 1
        request.tokens.append(token.token_id)
        if token.token_id != proposed or request.reason_to_finish(capacity) is not None:
            break
    request.lookup.observe(len(chunk.proposed), max(count - 1, 0))
    return sampled[:count]
