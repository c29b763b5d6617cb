import pytest
import torch
from torch import nn
from torch.nn import functional

from speechgpt.training.cross_entropy import token_losses

TARGETS, DIMENSIONS, VOCABULARY = 37, 16, 50


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 36, 37])
def test_chunks_have_the_losses_and_gradients_of_the_whole(chunk, bias):
    torch.manual_seed(0)
    head = nn.Linear(DIMENSIONS, VOCABULARY, bias=bias)
    hidden = torch.randn(TARGETS, DIMENSIONS, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (TARGETS,)), torch.rand(TARGETS)
    whole = functional.cross_entropy(head(hidden), targets, reduction="none")
    expected = torch.autograd.grad((whole * weights).sum(), [hidden, *head.parameters()])
    losses = token_losses(head, hidden, targets, chunk_logits=chunk * VOCABULARY)
    assert losses.shape == (TARGETS,)
    torch.testing.assert_close(losses, whole)
    found = torch.autograd.grad((losses * weights).sum(), [hidden, *head.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_more_logits_than_asked_for_are_made_at_once():
    made: list[int] = []
    head = nn.Linear(DIMENSIONS, VOCABULARY)
    head.register_forward_hook(lambda _, __, logits: made.append(logits.numel()))
    hidden = torch.randn(TARGETS, DIMENSIONS, requires_grad=True)
    losses = token_losses(head, hidden, torch.zeros(TARGETS, dtype=torch.long), chunk_logits=8 * VOCABULARY)
    assert max(made) == 8 * VOCABULARY and sum(made) == TARGETS * VOCABULARY
    losses.sum().backward()
    assert sum(made) == 2 * TARGETS * VOCABULARY, "each chunk is made again in the backward pass"


def test_without_targets_there_are_no_losses():
    hidden = torch.randn(0, DIMENSIONS, requires_grad=True)
    losses = token_losses(nn.Linear(DIMENSIONS, VOCABULARY), hidden, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
    losses.sum().backward()
