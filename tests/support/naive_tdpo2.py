"""tdpo2 in plain transformers: every sequence by itself, over the whole vocabulary."""

from typing import Any

import numpy as np
import pytest
import torch


def follow(
    lines: list[dict], loader: Any, arrays: dict[str, np.ndarray], policy: Any, reference: Any,
    lr: float,
) -> None:  # fmt: skip
    """Train the policy by AdamW and compare every step with a run's, by loss and gradient norm.

    Args:
        lines: of the run's training steps.
        loader: of the run's pairs.
        arrays: of its store.
        policy: transformers' model, with its starting weights; what has a gradient is trained.
        reference: the same of the reference.
        lr: the learning rate.
    """
    ids = torch.from_numpy(arrays["tokens"].astype(np.int64))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)

    def naive(pair: int) -> torch.Tensor:
        begin, chosen, rejected, end = arrays["spans"][pair].tolist()
        sums, divergences = [], []
        for first, last in ((chosen, rejected), (rejected, end)):
            sequence = torch.cat([ids[begin:chosen], ids[first:last]])[None]
            predictors = slice(chosen - begin - 1, sequence.shape[1] - 1)
            own, other = (
                model(input_ids=sequence, use_cache=False).logits[0, predictors].log_softmax(-1)
                for model in (policy, reference)
            )
            sums.append(own.gather(-1, sequence[0, chosen - begin :, None]).sum())
            divergences.append((other.exp() * (other - own)).sum())
        of_reference = arrays["ref/logp"][pair]
        u = 0.1 * (sums[0] - sums[1] - (of_reference[0] - of_reference[1]))
        return -torch.nn.functional.logsigmoid(
            u - 2 * 0.1 * (divergences[1] - divergences[0].detach())
        )

    for line in lines:
        loss = torch.stack([naive(int(pair)) for pair in loader.pairs(line["step"] - 1)]).mean()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=2e-5)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        assert line["gradient_norm"] == pytest.approx(norm.item(), rel=2e-3)
        optimizer.step()
