"""features.npz: changes of features against a loop, and the file."""

import dataclasses

import numpy as np
import pytest
import torch

from fpocli.evaluation.feature_changes import changes_of, join, read_changes, write_changes
from fpocli.features.encoder import top_k
from fpocli.features.top_features import TopFeatures
from fpocli.system.errors import UserError

M = 30


def vectors(seed: int, pairs: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(pairs, 2, M).mul(torch.rand(pairs, 2, M) > 0.4)


def stored(reference: torch.Tensor, k: int, keep: list[int]) -> TopFeatures:
    index, value = top_k(reference, k)
    kept = torch.tensor(keep, dtype=torch.int64)
    unused = torch.where(value > 0, index, 65_535)
    return TopFeatures(unused, value, (reference > 0).sum(-1), reference[..., kept], kept)


def cut(vector: list[float], k: int, keep: list[int]) -> list[float]:
    """What a store has of a vector."""
    largest = set(sorted(range(M), key=lambda i: (-vector[i], i))[:k]) | set(keep)
    return [value if i in largest else 0.0 for i, value in enumerate(vector)]


@pytest.mark.parametrize(("k", "keep"), [(5, []), (5, [0, 7, 29]), (30, [])])
def test_changes_equal_a_loop(k, keep):
    policy, reference = vectors(1, 4), vectors(2, 4)
    found = changes_of(policy, stored(reference, k, keep))
    total = np.zeros((2, M))
    for pair in range(4):
        for side in range(2):
            after, before = (
                cut(x[pair, side].double().tolist(), k, keep) for x in (policy, reference)
            )
            row = found.change[[2 * pair + side]].toarray()[0]
            np.testing.assert_allclose(row, np.subtract(after, before), atol=1e-12)
            total[side] += before
    np.testing.assert_allclose(found.before, total)


def test_a_policy_that_is_the_reference_has_no_change_in_float16_either():
    reference = vectors(1, 4)
    for dtype in (torch.float32, torch.float16):
        rounded = stored(reference, 5, [3])
        rounded = dataclasses.replace(
            rounded,
            value=rounded.value.to(dtype).float(),
            kept_value=rounded.kept_value.to(dtype).float(),
        )
        assert changes_of(reference, rounded, dtype).change.nnz == 0


def test_parts_of_all_ranks_come_back_in_the_order_of_the_store(tmp_path):
    policy, reference = vectors(3, 6), vectors(4, 6)
    whole = changes_of(policy, stored(reference, 8, []))
    scattered = [[4, 0], [5], [2, 1, 3]]
    parts = [changes_of(policy[rows], stored(reference[rows], 8, [])) for rows in scattered]
    joined = join(parts, np.argsort(np.concatenate(scattered)))
    np.testing.assert_array_equal(joined.change.toarray(), whole.change.toarray())
    file = tmp_path / "features.npz"
    write_changes(file, np.arange(6), {"layer_1.mlp_out": joined, "layer_0.resid_post": whole})
    pairs, sites = read_changes(file)
    assert pairs.tolist() == [0, 1, 2, 3, 4, 5]
    assert list(sites) == ["layer_1.mlp_out", "layer_0.resid_post"]
    for found in sites.values():
        np.testing.assert_array_equal(found.change.toarray(), whole.change.toarray())
        np.testing.assert_allclose(found.before, whole.before)


def test_a_damaged_or_missing_file_is_an_error(tmp_path):
    file = tmp_path / "features.npz"
    with pytest.raises(UserError, match="does not exist"):
        read_changes(file)
    part = changes_of(vectors(1, 2), stored(vectors(2, 2), 5, []))
    write_changes(file, np.arange(2), {"layer_1.mlp_out": part})
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"PK" + whole[9:]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            read_changes(file)
