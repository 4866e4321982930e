"""The attention mask, one pair of query and key at a time.

Shapes: B batch, T queries, S keys.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.layers.mask import LayerFacts, Mask, RowFacts, document_starts


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.integers(0, 10),
    st.booleans(),
)
def test_a_mask_says_which_keys_a_query_sees(
    segments: list[int], index: list[int], window: int, causal: bool
) -> None:
    """For queries and keys that are not the same tokens, as in decoding with a cache."""
    q_index, k_index, q_segments, k_segments = index[:2], index[2:], segments[:2], segments[2:]
    arrays = (jnp.asarray([a]) for a in (q_index, k_index, q_segments, k_segments))
    mask = Mask(*arrays, causal=causal, window=window)
    if window and not causal:
        with pytest.raises(UserError, match=r"set model\.causal=True or model\.windows="):
            mask.dense()
        return
    seen = np.asarray(mask.dense())[0]
    for t, s in np.ndindex(2, 3):
        back = q_index[t] - k_index[s]
        expected = q_segments[t] == k_segments[s] and (not causal or back >= 0)
        assert seen[t, s] == (expected and (not window or back < window))


def test_a_layer_sees_through_its_own_window() -> None:
    mask = Mask.of_rows(jnp.asarray([[1, 1, 1, 2, 2, 0]]))
    assert mask.layout == "packed"
    assert Mask.of_rows(mask.q_segments_BT, one=True).layout == "one"
    np.testing.assert_array_equal(
        document_starts(mask.q_segments_BT), [[True, False, False, True, False, True]]
    )
    seen = LayerFacts(window=2).seen(RowFacts(mask.q_index_BT, mask))
    np.testing.assert_array_equal(seen.dense(), replace(mask, window=2).dense())
    np.testing.assert_array_equal(seen.dense()[0].sum(-1), [1, 2, 2, 1, 2, 1])
