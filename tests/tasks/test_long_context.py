"""Retrieval, needles and long text: pages written out by hand, models that look things up, caches of transformers."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from niwaki.data import Tokens
from niwaki.errors import InputError, NotFiniteError, UnknownNameError
from niwaki.tasks import Cached, Facts, LongText, Needle, Retrieval
from niwaki.train import Recovery

ASK, END, WORDS = 1, 2, 40
KEYS, VALUES = torch.arange(20, 30)[:, None], torch.arange(30, 40)[:, None]
FACTS = Facts(KEYS, VALUES, before=(3,), after=(END,), ask=(ASK,))
"""A line is `3 KEY VALUE 2`, a question `1 KEY`, then the value and `2`."""


def splits_of(*blocks):
    tokens = Tokens(torch.tensor(blocks))
    return SimpleNamespace(train=tokens, val=tokens, test=tokens)


TEXT = splits_of(*[[4, 5, 6, 7, 8, 9, 10, 11]] * 40)


class LooksUp(nn.Module):
    """Scores what stood behind the last token where it stood first, unless that is more than `reach` tokens back."""

    def __init__(self, reach=10**9):
        super().__init__()
        self.reach = reach
        self.none = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        scores = torch.zeros(*tokens.shape, WORDS)
        for row, listed in enumerate(tokens.tolist()):
            for now, token in enumerate(listed):
                first = listed.index(token)
                if now - first <= self.reach and now > first:
                    scores[row, now, listed[first + 1]] = 1.0
        return scores + self.none


def llama(**changed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, **{**sizes, **changed})).eval()


def test_a_page_is_written_as_told():
    gaps = [torch.tensor([[4]]), torch.tensor([[5, 6]]), torch.zeros(1, 0, dtype=torch.int64)]
    generator = torch.Generator().manual_seed(0)
    page = FACTS.page(gaps, questions=2, generator=generator)
    (context,), (rest,) = page.context.tolist(), page.rest.tolist()
    first, second = context[2:4], context[8:10]
    assert context == [4, 3, *first, END, 5, 6, 3, *second, END]
    assert {first[0], second[0]} < set(range(20, 30)) and {first[1], second[1]} < set(range(30, 40))
    asked = [rest[1], rest[5]]
    assert sorted(asked) == sorted([first[0], second[0]]), "every line is asked for once"
    values = {first[0]: first[1], second[0]: second[1]}
    assert rest == [ASK, asked[0], values[asked[0]], END, ASK, asked[1], values[asked[1]], END]
    assert page.telling.tolist() == [False, True, False, False, False, True, False, False]
    depths = {first[0]: 2 / 11, second[0]: 8 / 11}  # the lines start at the 2nd and 8th of 11 tokens
    assert page.depth[0].tolist() == pytest.approx([depths[asked[0]], depths[asked[1]]])


def test_facts_of_several_tokens_are_told_token_by_token():
    facts = Facts(torch.tensor([[20, 21]]), torch.tensor([[30, 31, 32]]), between=(9,), ask=(ASK,), tell=(8, 8))
    assert (facts.line, facts.question, facts.vocabulary) == (6, 5, 33)
    page = facts.page([torch.zeros(1, 0, dtype=torch.int64)] * 2, questions=1, generator=torch.Generator())
    assert page.context.tolist() == [[20, 21, 9, 30, 31, 32]]
    assert page.rest.tolist() == [[ASK, 20, 21, 8, 8, 30, 31, 32]]
    assert page.telling.nonzero().flatten().tolist() == [4, 5, 6]


def test_facts_of_a_text_keep_what_stands_around_numbers():
    facts = Facts.of_text(lambda text: list(text.encode()), count=900)
    assert bytes(facts.before) == b"line " and bytes(facts.between) == b": REGISTER_CONTENT is <"
    assert bytes(facts.after) == b">\n" and bytes(facts.ask) == b"What is <REGISTER_CONTENT> in line "
    assert bytes(facts.told) == b"? <" and bytes(facts.keys[7].tolist()) == b"107"
    with pytest.raises(InputError, match="not equally many tokens"):
        Facts.of_text(lambda text: list(text.encode()), first=95)

    def joins(text):  # "7:" is one token
        return list(text.replace("7:", "\x01").encode())

    with pytest.raises(InputError, match="joins numbers"):
        Facts.of_text(joins)


def test_retrieval_counts_answers_and_says_where_they_stood():
    task = Retrieval(FACTS, lines=8, questions=4, batch=3, sequences=10)
    assert task.evaluate(LooksUp()).value == 100.0 and task.evaluate(LooksUp(), limit=1).value == 100.0
    # 8 lines are 32 tokens; the nth question's key is at 32 + 4 n + 1, so that a reach of 40 loses early lines only
    near = task.metrics(LooksUp(reach=20))
    assert near["accuracy at depth 0.2"].value == 0.0 and near["accuracy at depth 1"].value > 0.0
    assert 0.0 < near["accuracy"].value < 100.0
    assert "8 lines in 32 tokens, 10 contexts of the test split" in near["accuracy"].definition
    asked = [int(m.definition.split()[2]) for name, m in near.items() if name != "accuracy"]
    assert sum(asked) == 40, "each question has one depth"


def test_retrieval_shares_and_spread_by_hand():
    class First(nn.Module):  # knows the answer of the first question of a page only
        def forward(self, tokens):
            scores = LooksUp()(tokens)
            scores[:, 32 + 4 :] = 0.0
            scores[:, 32 + 4 :, 0] = 1.0
            return scores

    found = Retrieval(FACTS, lines=8, questions=4, batch=3, sequences=10).metrics(First())["accuracy"]
    assert (found.value, found.unit, found.spread) == (25.0, "%", 0.0)  # one of four in every context


def test_retrieval_stands_in_text_and_splits_do_not_meet():
    task = Retrieval(FACTS, lines=2, length=20, questions=1, filler=TEXT, batch=4, sequences=8)
    (page,) = task.calibration(1, 0)
    assert page.context.shape == (4, 20) and page.rest.shape == (4, 4)
    for row in page.context.tolist():
        text = [token for token in row if 4 <= token < 20]
        assert len(text) == 12 and sum(token == END for token in row) == 2
        assert all(b in (a + 1, 4) for a, b in itertools.pairwise(text)), "the text goes on behind a line"
    again = task.calibration(1, 0)[0]
    other = task.calibration(1, 1)[0]
    test = next(task._pages("test", 0, 4))
    assert torch.equal(page.context, again.context)
    assert not torch.equal(page.context, other.context) and not torch.equal(page.context, test.context)
    assert task.evaluate(LooksUp()).value == 100.0
    assert task.steps == 2 and task.example().shape == (1, 24) and len(list(task.train_batches(0))) == 2


def test_training_learns_to_retrieve_the_only_fact():
    facts = Facts(KEYS[:1], VALUES[:2], ask=(ASK,))
    task = Retrieval(facts, lines=1, questions=1, batch=8, sequences=240)
    model = llama(num_hidden_layers=1)
    before = task.evaluate(model).value
    Recovery(epochs=1, lr=1e-2, optimizer="adamw", weight_decay=0.0)(model, task)
    assert before < 90.0 < task.evaluate(model).value


def test_needles_are_found_by_depth_and_length():
    task = Needle(FACTS, TEXT, lengths=(20, 40), depths=(0.0, 0.5, 1.0), trials=3, batch=2)
    found = task.metrics(LooksUp(reach=22))
    # a question's key stands 2 behind the context, the needle's first at round(depth * (length - 4)) + 1
    far = {(20, 0.0): 20, (20, 0.5): 12, (20, 1.0): 4, (40, 0.0): 40, (40, 0.5): 22, (40, 1.0): 4}
    for (length, depth), tokens in far.items():
        value = found[f"accuracy in {length} tokens at depth {depth:g}"].value
        assert value == (100.0 if tokens <= 22 else 0.0), (length, depth)
    assert found["accuracy"].value == pytest.approx(100 * 15 / 18)
    assert found["accuracy"].spread == pytest.approx(100 * math.sqrt(15 / 18 * 3 / 18 / 18))
    assert task.steps == 12 and len(list(task.train_batches(0))) == 12
    page = next(page for _, depth, page in task._pages("test", 0, 1) if depth == 0.5)
    assert page.context[0, 8] == 3 and page.context.shape == (1, 20)


def test_a_context_read_into_a_cache_gives_the_same_scores():
    model, caches = llama(), []
    tokens = torch.randint(WORDS, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens).logits[:, 7:]
        for step in (None, 1, 2):
            read = Cached(step=step, seen=caches.append)(model, tokens[:, :7], tokens[:, 7:])
            torch.testing.assert_close(read, whole, rtol=1e-4, atol=1e-5)
    assert len(caches) == 3 and caches[0].get_seq_length() == 12
    task = Retrieval(FACTS, lines=4, questions=2, sequences=8, reader=Cached(step=1))
    plain = Retrieval(FACTS, lines=4, questions=2, sequences=8)
    assert task.evaluate(model).value == plain.evaluate(model).value


def test_a_cache_that_forgets_shows():
    from transformers import DynamicCache

    class Empty(DynamicCache):  # holds the last token only
        def update(self, keys, values, layer, *args, **kwargs):
            keys, values = super().update(keys, values, layer, *args, **kwargs)
            self.layers[layer].keys, self.layers[layer].values = keys[:, :, -1:], values[:, :, -1:]
            return keys, values

    model = llama()
    text = splits_of(*torch.randint(WORDS, (8, 16), generator=torch.Generator().manual_seed(0)).tolist())
    own = LongText(text, length=16, stride=4, reader=Cached(step=1)).metrics(model)["perplexity"]
    lost = LongText(text, length=16, stride=4, reader=Cached(Empty, step=1)).metrics(model)["perplexity"]
    assert own.value != lost.value


LN = math.log


def test_long_text_scores_each_token_once_by_hand():
    model = nn.Embedding(3, 3)  # after 0: 1/8, 2/8, 5/8; after 1: 3/5, 1/5, 1/5; after 2: thirds
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, LN(2), LN(5)], [LN(3), 0.0, 0.0], [0.0, 0.0, 0.0]]))
    task = LongText(splits_of([0, 2, 1, 0], [1, 0, 0, 2]), length=4, stride=2, batch=2)
    # windows 0 2|1 0 and 1 0|1 0 and 1 0|0 2
    nats = [-LN(1 / 3) - LN(3 / 5), -LN(2 / 8) - LN(3 / 5), -LN(1 / 8) - LN(5 / 8)]
    found = task.metrics(model)
    assert found["perplexity"].value == pytest.approx(math.exp(sum(nats) / 6))
    means = torch.tensor(nats) / 2
    spread = means.std(correction=0).item() / math.sqrt(3)
    assert found["perplexity"].spread == pytest.approx(found["perplexity"].value * spread)
    assert found["accuracy"].value == pytest.approx(100 * 3 / 6)  # 1 -> 0 twice, 0 -> 2 once
    assert "6 tokens, each with 2 to 3 before it, in 3 of 3 windows" in found["perplexity"].definition
    first = task.metrics(model, limit=1)["perplexity"]
    assert first.value == pytest.approx(math.exp(nats[0] / 2))
    assert task.loss(model, next(task._windows("test", torch.tensor([1])))).item() == pytest.approx(nats[1] / 2)
    assert task.steps == 1 and task.example().shape == (1, 4) and len(task.calibration(9, 0)) == 2


def test_long_text_with_the_smallest_stride_is_exact():
    model, blocks = llama(), torch.randint(WORDS, (1, 12), generator=torch.Generator().manual_seed(0))
    task = LongText(splits_of(*blocks.tolist()), length=9, stride=1, batch=3)
    with torch.no_grad():
        windows = torch.stack([blocks[0, at : at + 9] for at in range(4)])
        lost = nn.functional.cross_entropy(model(windows).logits[:, -2].double(), windows[:, -1])
    assert task.metrics(model)["perplexity"].value == pytest.approx(lost.exp().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Retrieval(FACTS, lines=0), "at least 1"),
        (lambda: Retrieval(FACTS, lines=2, questions=3), "3 questions"),
        (lambda: Retrieval(FACTS, lines=11, questions=1), "10 keys"),
        (lambda: Retrieval(FACTS, lines=4, questions=2, length=15), "give a longer length"),
        (lambda: Retrieval(FACTS, lines=4, questions=2, length=17), "give filler="),
        (lambda: Retrieval(FACTS, lines=4, questions=2, length=999, filler=TEXT), "give a longer text"),
        (lambda: Retrieval(FACTS, lines=4, questions=2).calibration(0, 0), "at least 1"),
        (lambda: Retrieval(FACTS, lines=4, questions=2).evaluate(LooksUp(), limit=0), "limit above 0"),
        (lambda: Facts(KEYS[:, 0], VALUES), "facts to retrieve"),
        (lambda: Facts(KEYS[:0], VALUES), "facts to retrieve"),
        (lambda: Needle(FACTS, TEXT, depths=(1.5,)), "shares in"),
        (lambda: Needle(FACTS, TEXT, lengths=(20,), depths=(0.5, 0.5)), "depths.*twice"),
        (lambda: Needle(FACTS, TEXT, lengths=(20, 20)), "lengths.*twice"),
        (lambda: Needle(FACTS, TEXT, lengths=(3,)), "needle of 4 tokens"),
        (lambda: Needle(FACTS, TEXT, lengths=(999,)), "give a longer text"),
        (lambda: Needle(FACTS, TEXT, lengths=(20,)).evaluate(LooksUp(), limit=0), "limit above 0"),
        (lambda: LongText(TEXT, length=8, stride=8), "1 to length - 1"),
        (lambda: LongText(TEXT, length=999, stride=8), "give a longer text"),
        (lambda: Cached(step=0), "step of at least 1"),
        (lambda: Cached()(nn.Embedding(4, 4), KEYS[:1], KEYS[:1]), "takes no cache"),
    ],
)
def test_mistakes_are_refused(make, found):
    with pytest.raises(InputError, match=found):
        make()


def test_models_that_do_not_fit_are_refused():
    task = Retrieval(FACTS, lines=2, questions=1)
    with pytest.raises(InputError, match="facts of tokens up to 39"):
        task.evaluate(nn.Embedding(40, 39))
    with pytest.raises(InputError, match="as many tokens"):
        task.evaluate(nn.Embedding(30, 40))
    with pytest.raises(InputError, match="use a causal model"):
        task.evaluate(nn.Sequential(nn.Embedding(40, 40), nn.Flatten()))
    with pytest.raises(UnknownNameError):
        task.evaluate(LooksUp(), split="all")
    broken = LooksUp()
    nn.init.constant_(broken.none, math.nan)
    long = LongText(TEXT, length=8, stride=4)
    for asked in (task, Needle(FACTS, TEXT, lengths=(20,), trials=1), long):
        with pytest.raises(NotFiniteError):
            asked.evaluate(broken)
