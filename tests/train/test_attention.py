"""The attention of a row against its definition, and the CUDA form against the CPU form."""

import pytest
import torch

from prefloop.train.attention import Layout, flex_attend, shared_prefix_attention
from prefloop.train.packing import TokenGroup

GROUPS = [TokenGroup((1, 2, 3, 4, 5), ((6, 7, 8, 9), (3,), (4, 4))), TokenGroup((), ((1, 2, 3), (9, 9))),
          TokenGroup((2,), ((1, 2, 3),))]  # fmt: skip


def row(layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    tokens = layout.input_ids.shape[1]
    query = torch.randn(1, 4, tokens, 16, requires_grad=True)
    key, value = (torch.randn(1, 2, tokens, 16, requires_grad=True) for _ in range(2))
    return query, key, value


def definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Dense softmax attention with a mask written down token by token from GROUPS."""
    owners = []
    for g, group in enumerate(GROUPS):
        for b, part in enumerate((group.prompt_ids, *(response[:-1] for response in group.responses))):
            owners += [(g, b)] * len(part)
    visible = torch.tensor(
        [[gq == gk and j <= i and bk in (0, bq) for j, (gk, bk) in enumerate(owners)]
         for i, (gq, bq) in enumerate(owners)]
    )  # fmt: skip
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_values_and_gradients_are_those_of_the_definition(softcap: float | None) -> None:
    layout = Layout.of(GROUPS)
    inputs = row(layout)
    found, _ = shared_prefix_attention(torch.nn.Module(), *inputs, None, scaling=0.3, softcap=softcap, layout=layout)
    expected = definition(*inputs, softcap).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_flex_attention_sees_the_same_tokens(softcap: float | None) -> None:
    layout = Layout.of(GROUPS)
    inputs = [tensor.detach() for tensor in row(layout)]
    found = flex_attend(inputs[0], inputs[1], inputs[2], layout, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(found, definition(inputs[0], inputs[1], inputs[2], softcap), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("extra", "message"), [({}, "extra keyword"), ({"s_aux": torch.ones(4)}, "sink")])
def test_what_it_cannot_compute_is_refused(extra: dict[str, torch.Tensor], message: str) -> None:
    layout = Layout.of(GROUPS)
    given = {"layout": layout} if extra else {}
    with pytest.raises(RuntimeError, match=message):
        shared_prefix_attention(torch.nn.Module(), *row(layout), None, **given, **extra)
