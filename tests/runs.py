"""Token ids, and the ways to run a model on them: in one pass, token by token, greedily."""

import torch
from transformers import DynamicCache

BOUND = 1e-4
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}


def tokens(model, rows=2, columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, columns), generator=generator)


def padded_batch(model, columns=9, padding=4):
    """Two rows, the first padded on the left."""
    ids, mask = tokens(model, columns=columns), torch.ones(2, columns, dtype=torch.long)
    mask[0, :padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.inference_mode()
def one_pass(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@torch.inference_mode()
def token_by_token(model, ids, prefill, cache=None, attention_mask=None):
    """Logits of every token: a prefill, then one token at a time through the cache."""
    cache = cache if cache is not None else DynamicCache(config=model.config)

    def step(start, stop):
        mask = None if attention_mask is None else attention_mask[:, :stop]
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        return model(
            input_ids=ids[:, start:stop], past_key_values=cache, attention_mask=mask, position_ids=positions
        ).logits

    steps = [step(0, prefill), *(step(i, i + 1) for i in range(prefill, ids.shape[1]))]
    return torch.cat(steps, dim=1)


def assert_close(found, expected, bound=BOUND):
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
