"""A run whose scores are not comparable with the store's is refused before its first step."""

import numpy as np
import pytest
from runs import command, finish, read
from stores import attributes, cache_config, set_attributes

from fpocli import UserError, cache
from fpocli.caching import score_block
from fpocli.scoring.score import score


def train(material, out, *flags, **settings):
    words = command(material, out, *flags, **settings)
    return finish(words)


def without(words, flag):
    place = words.index(flag)
    return words[:place] + words[place + 2 :]


def test_another_dtype_is_refused_unless_it_is_allowed(material, store_path, tmp_path):
    words = without(command(material, tmp_path / "run"), "--allow")
    done = finish(words)
    assert done.returncode == 2
    assert "dtype float32 in the store, bfloat16 here" in done.stderr
    assert "--allow dtype" in done.stderr
    done = train(material, tmp_path / "run", allow="dtype")
    assert done.returncode == 0, done.stderr[-2000:]
    first = read(tmp_path / "run")[1]
    assert 0 < abs(first["u"]) < 0.01


def test_another_kernel_is_refused_unless_it_is_allowed(material, tmp_path):
    path = tmp_path / "ref.zarr"
    cache(cache_config(material, path))
    set_attributes(path, model=attributes(path)["model"] | {"attention": "flex_attention"})
    done = train(material, tmp_path / "run", "--no-bf16", cache=path)
    assert done.returncode == 2
    assert "kernel flex_attention in the store, fpo_by_sequence here" in done.stderr
    with pytest.raises(UserError, match=r"model\.attention is flex_attention there"):
        cache(cache_config(material, path))
    assert cache(cache_config(material, path, allow=["kernel"])).meta["state"] == "complete"
    done = train(material, tmp_path / "run", "--no-bf16", cache=path, allow="kernel")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("what", ["log-probabilities", "features"])
def test_a_store_whose_numbers_are_not_the_models_is_noticed(material, tmp_path, monkeypatch, what):
    """Weights, SAE and checksums are correct; only the numbers are wrong."""

    def wrong(*arguments, **settings):
        scores = score(*arguments, **settings)
        if what == "features":
            for pooled in scores.pooled.values():
                pooled *= 1.1
        else:
            scores.logp.sub_(0.01 * scores.count)
        return scores

    path = tmp_path / "ref.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(score_block, "score", wrong)
        cache(cache_config(material, path))
    done = train(material, tmp_path / "run", "--no-bf16", cache=path)
    assert done.returncode == 2
    assert "the policy should be the reference of" in done.stderr
    assert not read(tmp_path / "run"), "no step was taken"


def test_the_distance_of_other_starting_weights_is_printed(material, store_path, tmp_path):
    done = train(material, tmp_path / "run", "--no-bf16", model=material / "policy")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    (printed,) = (line for line in lines if "starting weights are not" in line)
    nats = float(printed.split("differ by ")[1].split()[0])
    assert 0.01 < nats < 5 and np.isfinite(nats)
    assert "of their mean square" in printed
