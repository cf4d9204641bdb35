"""Reading a stream in pieces, for the tests of models that learn while they read."""

import torch


@torch.no_grad()
def read(model, ids, cuts=(), ahead=False):
    """Logits of a stream fed in pieces, and the cache after it.

    ahead: each piece comes with the token that follows it.
    """
    cache, logits = None, []
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        piece, known = ids[:, begin:end], ids[:, end : end + 1]
        known = known if ahead and known.numel() else None
        out = model(piece, past_key_values=cache, use_cache=True, next_tokens=known)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache
