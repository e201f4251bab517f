"""Loss, perplexity and token accuracy of tiny tables worked out by hand; masking; a Llama of transformers."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import niwaki
from niwaki.data import Tokens
from niwaki.distill import Logits, Weighted
from niwaki.errors import InputError, NotFiniteError, OutOfMemoryError, UnknownNameError
from niwaki.tasks import LanguageModelling
from niwaki.train import Recovery


def splits_of(*sequences, vocabulary=3, mask=None):
    """Every split has the same sequences."""
    tokens = Tokens(torch.tensor(sequences))
    return SimpleNamespace(train=tokens, val=tokens, test=tokens, vocabulary=vocabulary, mask=mask)


def table(*rows):
    """A model of one table: the scores of what follows a token, by that token alone."""
    model = nn.Embedding(len(rows), len(rows[0]))
    with torch.no_grad():
        model.weight.copy_(torch.tensor(rows))
    return model


LN = math.log
TABLE = table([0.0, LN(2), LN(5)], [LN(3), 0.0, 0.0], [0.0, 0.0, 0.0])
"""After 0: 1/8, 2/8, 5/8; after 1: 3/5, 1/5, 1/5; after 2: thirds."""
TASK = LanguageModelling(splits_of([0, 2, 1], [0, 1, 0]), batch=2)


def test_loss_and_metrics_by_hand():
    # 0 -> 2: 5/8 (first); 2 -> 1: 1/3 (0 is first); 0 -> 1: 2/8 (2 is first); 1 -> 0: 3/5 (first)
    nats = [-LN(5 / 8) - LN(1 / 3), -LN(2 / 8) - LN(3 / 5)]
    loss = sum(nats) / 4
    batch = (torch.tensor([[0, 2, 1], [0, 1, 0]]), torch.tensor([[2, 1, -100], [1, 0, -100]]))
    assert TASK.loss(TABLE, batch).item() == pytest.approx(loss)
    found = TASK.metrics(TABLE)
    assert list(found) == ["perplexity", "accuracy"]
    assert found["perplexity"].value == pytest.approx(math.exp(loss))
    spread = math.sqrt((nats[0] - 2 * loss) ** 2 + (nats[1] - 2 * loss) ** 2) / 4
    assert found["perplexity"].spread == pytest.approx(math.exp(loss) * spread)
    assert (found["accuracy"].value, found["accuracy"].unit, found["accuracy"].spread) == (50.0, "%", 0.0)
    assert "4 tokens in 2 of 2 sequences of the test split" in found["accuracy"].definition
    assert TASK.evaluate(TABLE, limit=1, split="val").value == 50.0
    first = TASK.metrics(TABLE, limit=1)["perplexity"]
    assert first.value == pytest.approx(math.exp(nats[0] / 2)) and "in 1 of 2 sequences" in first.definition


def test_a_causal_batch_asks_for_what_follows():
    (batch,) = TASK.calibration(3, 0)
    tokens, labels = batch
    assert torch.equal(labels[:, :-1], tokens[:, 1:]) and (labels[:, -1] == -100).all()
    assert TASK.inputs(batch) is tokens and TASK.example().shape == (1, 3) and TASK.steps == 1


def test_batches_are_decided_by_the_seed():
    task = LanguageModelling(splits_of(*[[i, i] for i in range(8)], vocabulary=8), batch=3)
    orders = [torch.cat([tokens for tokens, _ in task.train_batches(seed)]).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and len(orders[0]) == 6 and task.steps == 2


def test_what_is_hidden():
    splits = splits_of(*torch.randint(9, (200, 50), generator=torch.Generator().manual_seed(0)).tolist(),
                       vocabulary=10, mask=9)  # fmt: skip
    task = LanguageModelling(splits, batch=200, kind="masked", share=0.2)
    shown, labels = next(task.train_batches(3))
    whole = splits.train.blocks
    order = next(splits.train.batches(200, shuffle_seed=3))
    picked = labels != -100
    assert torch.equal(labels[picked], order[picked]) and torch.equal(shown[~picked], order[~picked])
    assert picked.float().mean().item() == pytest.approx(0.2, abs=0.015) and picked.any(1).all()
    hidden = (shown[picked] == 9).float().mean().item()
    same = (shown[picked] == labels[picked]).float().mean().item()
    assert hidden == pytest.approx(0.8 + 0.01, abs=0.03)  # a random token is the mask token once in ten
    assert same == pytest.approx(0.1 + 0.01, abs=0.03)
    again, _ = next(task.train_batches(3))
    other, _ = next(task.train_batches(4))
    assert torch.equal(again, shown) and not torch.equal(other, shown) and len(whole) == 200


def test_a_masked_task_by_hand():
    """One token of each sequence is picked, whichever: a table that knows nothing is right once in three."""
    task = LanguageModelling(splits_of([1, 1], [2, 2], vocabulary=3, mask=0), batch=1, kind="masked", share=1e-9)
    _, labels = task.calibration(1, 0)[0]
    assert (labels != -100).sum() == 1
    blank = table(*[[0.0] * 3] * 3)
    found = task.metrics(blank)
    assert found["perplexity"].value == pytest.approx(3.0) and "2 tokens in 2 of 2" in found["accuracy"].definition
    assert task.metrics(blank)["accuracy"].value == found["accuracy"].value  # the same tokens are hidden each time


def test_refusals():
    for settings, error, says in (
        ({"kind": "odd"}, UnknownNameError, "causal, masked"),
        ({"batch": 0}, InputError, "at least 1"),
        ({"share": 0.0}, InputError, r"in \(0, 1\)"),
        ({"kind": "masked"}, InputError, "without a mask token"),
        ({"splits": SimpleNamespace(**{**vars(TASK.splits), "train": []})}, InputError, "empty training split"),
    ):
        with pytest.raises(error, match=says):
            LanguageModelling(**{"splits": TASK.splits, **settings})
    for call, error, says in (
        (lambda: TASK.evaluate(TABLE, split="odd"), UnknownNameError, "train, val, test"),
        (lambda: TASK.evaluate(TABLE, limit=0), InputError, "limit above 0"),
        (lambda: TASK.calibration(0, 0), InputError, "at least 1"),
        (lambda: TASK.evaluate(table([0.0] * 2, [0.0] * 2, [0.0] * 2)), InputError, r"scores \[batch, tokens, voc"),
        (lambda: TASK.evaluate(nn.Sequential(TABLE, nn.Flatten())), InputError, r"shape \(2, 9\)"),
        (lambda: TASK.evaluate(table([0.0] * 3, [0.0] * 3)), InputError, "as many tokens and as long a context"),
        (lambda: TASK.evaluate(table([math.nan] * 3, [0.0] * 3, [0.0] * 3)), NotFiniteError, "NaN"),
    ):
        with pytest.raises(error, match=says):
            call()

    class Full(nn.Embedding):
        def forward(self, tokens):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="2 x 3 tokens"):
        TASK.evaluate(Full(3, 3))


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_llama_learns_is_cut_and_taught_again():
    counting = [[(start + i) % 12 for i in range(8)] for start in range(12)]
    task = LanguageModelling(splits_of(*counting, vocabulary=12), batch=6)
    model = llama()
    Recovery(epochs=40, lr=0.01, optimizer="adamw", weight_decay=0.0)(model, task)
    assert task.evaluate(model).value > 95
    found = {}
    for name, losses in (("plain", ()), ("taught", (Weighted(Logits(2.0)),))):
        outcome = niwaki.compress(
            model, {"input_ids": task.example(), "use_cache": False}, method=niwaki.methods.Taylor(),
            budget=niwaki.Budget(0.7), task=task, repair=False, distill=losses,
            recovery=Recovery(epochs=4, lr=0.003, optimizer="adamw", weight_decay=0.0),
        )  # fmt: skip
        assert outcome.receipt.passed and list(outcome.after)[-2:] == ["perplexity", "accuracy"]
        stages = [stage.measurements["perplexity"].value for stage in outcome.stages]
        assert stages[-1] < stages[0]
        found[name] = outcome.history["epochs"][-1]["loss"]
    assert found["taught"] != found["plain"]
