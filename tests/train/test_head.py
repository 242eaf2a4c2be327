"""The output head where rounding could hide: tokens that the model is sure of, in bfloat16."""

import torch

from prefloop.train.head import _HeadLogps


def test_the_gradient_of_a_sure_token_keeps_its_sign_in_bfloat16() -> None:
    # p = 0.9995: what pulls at the target's row is g (1 - p), the small rest of two numbers that bfloat16 rounds apart.
    weight = torch.zeros(8, 4, requires_grad=True)
    with torch.no_grad():
        weight[3, 0] = 9.5
    hidden = torch.tensor([[1.0, 0.5, 0.25, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    target = torch.tensor([3])
    truth = torch.autograd.grad(0.3 * (hidden.float() @ weight.T).log_softmax(1)[0, 3], (weight, hidden))
    logps, *_ = _HeadLogps.apply(hidden, weight, None, target, 1.0, None, False, False)
    found = torch.autograd.grad(0.3 * logps.sum(), (weight, hidden))
    assert 1e-4 < float(truth[0][3, 0]) < 2e-4
    torch.testing.assert_close(found[0], truth[0], rtol=1e-2, atol=0.0)
    torch.testing.assert_close(found[1], truth[1], rtol=1e-2, atol=0.0)
