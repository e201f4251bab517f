"""Taps, the teacher's channels by a real plan, adapters, and a task with a teacher."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import niwaki
from niwaki.distill import ChannelWise, Distilled, Features, Logits, SpatialAttention, Weighted
from niwaki.distill.alignment import kept_at
from niwaki.distill.taps import scores_of, tapped
from niwaki.errors import InputError, NotFiniteError, PlanMismatchError, UnknownNameError
from niwaki.train import Mix, Recovery, Speed


class Net(nn.Module):
    """A residual sum, a concatenation and an activation in place: channels on many ways."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, padding=1))
        self.side = nn.Conv2d(4, 3, 1)
        self.both = nn.Identity()
        self.head = nn.Linear(7, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        x = self.both(torch.cat([x, self.side(x)], 1))
        return self.head(x.mean((2, 3)))


class Pixels:
    """A task: three classes of small pictures; counts nothing but what it is asked."""

    def __init__(self, size=4):
        generator = torch.Generator().manual_seed(3)
        self.batches = [
            (torch.randn(size, 1, 5, 5, generator=generator), torch.randint(3, (size,), generator=generator))
            for _ in range(3)
        ]

    steps = 3

    def train_batches(self, seed):
        return iter(self.batches)

    def calibration(self, n_batches, seed):
        return self.batches[:n_batches]

    def inputs(self, batch):
        return batch[0]

    def example(self):
        return self.batches[0][0][:1]

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model, *, split="test", limit=None):
        return niwaki.Measurement("accuracy", 1.0, "%", "nothing")

    def metrics(self, model, *, split="test", limit=None):
        return {"accuracy": self.evaluate(model)}


TASK = Pixels()


def network(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def cut_by(model, keep, groups):
    """The plan that keeps `keep` of the units of the groups of this name, and the cut model."""
    graph = niwaki.trace(model, TASK.example())
    how = niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    for name, values in scores.values.items():
        values[:] = torch.arange(len(values))
        for group, order in groups.items():
            if name == group:
                values[:] = torch.tensor(order)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=keep, of="units"), how=niwaki.budgets.Uniform())
    return plan, niwaki.cut(model, plan)


def silent(model, plan):
    """`model` (a copy) with the removed units' slices at zero: nothing is lost when they go."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            for cut in plan.by_tensor().get(name, ()):
                gone = [at for at in range(tensor.shape[cut["axis"]]) if at not in cut["keep"]]
                tensor.index_fill_(cut["axis"], torch.tensor(gone, dtype=torch.long), 0.0)
    return twin


def test_taps_hear_each_module_once_and_leave_no_hook():
    model = network()
    with tapped(model, {"", "stem", "block.0"}) as heard:
        output = model(TASK.example())
    assert heard.feature("", "student") is output
    assert torch.equal(heard.feature("stem", "student"), model.stem(TASK.example()))
    before_relu = model.block[0](model.stem(TASK.example()))
    assert torch.equal(heard.feature("block.0", "student"), before_relu) and (before_relu < 0).any()
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_stays_hooked_after_an_exception():
    model, teacher = network(), network(1)
    taught = Distilled(TASK, teacher, (Weighted(Features(), taps=("stem", "block")),))
    with pytest.raises(RuntimeError):
        taught.loss(model, (torch.zeros(2, 3, 5, 5), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(ZeroDivisionError), tapped(model, {"stem"}):
        raise ZeroDivisionError
    for network_ in (model, teacher, taught._frozen):
        assert not any(module._forward_hooks for module in network_.modules())


@pytest.mark.parametrize("path", ["stem", "block", "side", "both"])
def test_channels_are_aligned_by_a_real_plan(path):
    """Where what is removed was zero, student and teacher agree to the last bit at every place."""
    model = network()
    plan, _ = cut_by(model, 0.5, {})
    teacher = silent(model, plan)
    small = niwaki.cut(teacher, plan)
    kept = kept_at(teacher, plan, {path})[path]
    with tapped(small, {path}) as ours, tapped(teacher, {path}) as theirs, torch.no_grad():
        small(TASK.example())
        teacher(TASK.example())
    mine, whole = ours.feature(path, "student"), theirs.feature(path, "teacher")
    assert mine.shape[1] < whole.shape[1]
    assert torch.allclose(kept.of(whole), mine, atol=1e-6)
    taught = Distilled(TASK, teacher, (Weighted(Features(), taps=(path,)),), plan, small)
    assert taught.parts(small, TASK.batches[0])["features"].item() < 1e-12


def test_a_loss_without_loss_is_exactly_nothing():
    """One convolution, half of its channels: the student's are the teacher's own numbers."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    plan, small = cut_by(model, 0.5, {"0": [3.0, 0.0, 2.0, 1.0], "0#2": [3.0, 0.0, 2.0, 1.0]})
    assert kept_at(model, plan, {"1"})["1"].axes[1].tolist() == [0, 2]
    taught = Distilled(TASK, model, (Weighted(Features(), taps=("1",)), Weighted(ChannelWise(), taps=("0",))), plan)
    parts = taught.parts(small, TASK.batches[0])
    assert parts["features"].item() == 0.0 and parts["channel_wise"].item() == 0.0


def test_a_concatenation_keeps_the_channels_of_both_its_parts():
    model = network()
    plan, _ = cut_by(model, 0.5, {})
    stem = kept_at(model, plan, {"stem"})["stem"].axes[1].tolist()
    side = kept_at(model, plan, {"side"})["side"].axes[1].tolist()
    assert kept_at(model, plan, {"both"})["both"].axes[1].tolist() == [*stem, *(4 + at for at in side)]


def test_a_plan_from_a_file_aligns_as_well():
    model = network()
    plan, _ = cut_by(model, 0.5, {})
    read = niwaki.Plan.from_json(plan.to_json())
    assert read.graph is None
    for path in ("stem", "both"):
        ours, theirs = (kept_at(model, one, {path})[path].axes[1].tolist() for one in (plan, read))
        assert ours == theirs


def test_tokens_are_aligned():
    """A transformer's layer on [batch, tokens, width]: stream and hidden width lie on the last axis."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 2)).eval()
    graph = niwaki.trace(model, torch.zeros(1, 5, 3))
    how = niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=niwaki.budgets.Uniform())
    small = niwaki.cut(model, plan)
    kept = kept_at(model, plan, {"0", "1.linear1"})
    x = torch.randn(1, 5, 3)
    assert torch.allclose(kept["0"].of(model[0](x)), small[0](x), atol=1e-6)
    assert len(kept["1.linear1"].axes[2]) == small[1].linear1.out_features


class Split(nn.Module):
    def forward(self, x):
        return x.view(*x.shape[:2], 4, x.shape[2] // 4).transpose(1, 2)


class Attention(nn.Module):
    """Four heads of four channels, split by modules that can be tapped."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 16) for _ in range(3))
        self.split_q, self.split_k, self.split_v = Split(), Split(), Split()
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        q, k, v = self.split_q(self.q(x)), self.split_k(self.k(x)), self.split_v(self.v(x))
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


def test_grids_are_aligned_where_all_rows_keep_the_same_columns():
    torch.manual_seed(0)
    model = Attention().eval()
    graph = niwaki.trace(model, torch.zeros(1, 6, 5))
    how = niwaki.scores.Random(seed=1)
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    x, half = torch.randn(1, 6, 5), niwaki.Budget(keep=0.5, of="units")
    heads = niwaki.choose(graph, scores, half, how=niwaki.budgets.Uniform(), grids="rows")
    kept = kept_at(model, heads, {"v", "split_v"})
    assert len(kept["split_v"].axes[1]) == 2 and len(kept["v"].axes[2]) == 8
    assert kept["split_v"].of(model.split_v(model.v(x))).shape == (1, 2, 6, 4)
    columns = niwaki.choose(graph, scores, half, how=niwaki.budgets.Uniform(), grids="columns")
    small = niwaki.cut(model, columns)
    flat = kept_at(model, columns, {"v"})["v"]
    assert torch.allclose(flat.of(model.v(x)), small.v(x), atol=1e-6)
    with pytest.raises(InputError, match="whose rows lose different columns"):
        kept_at(model, columns, {"split_v"})


def test_parts_are_weighted_and_summed():
    student, teacher = network(), network(1)
    batch = TASK.batches[0]
    plain = Distilled(TASK, teacher, (Weighted(Logits(2.0)), Weighted(SpatialAttention(), taps=("stem", "block"))))
    scaled = Distilled(
        TASK,
        teacher,
        (Weighted(Logits(2.0), 3.0), Weighted(SpatialAttention(), 0.5, taps=("stem", "block"))),
        task_weight=0.25,
    )
    one, other = plain.parts(student, batch), scaled.parts(student, batch)
    assert list(one) == ["task", "logits", "spatial_attention"]
    assert other["logits"].item() == pytest.approx(3 * one["logits"].item())
    by_hand = 0.25 * one["task"] + 3 * one["logits"] + 0.5 * one["spatial_attention"]
    assert scaled.loss(student, batch).item() == pytest.approx(by_hand.item())
    stem = Distilled(TASK, teacher, (Weighted(SpatialAttention(), taps=("stem",)),)).parts(student, batch)
    block = Distilled(TASK, teacher, (Weighted(SpatialAttention(), taps=("block",)),)).parts(student, batch)
    both = stem["spatial_attention"] + block["spatial_attention"]
    assert one["spatial_attention"].item() == pytest.approx(both.item())


def test_gradients_reach_student_and_adapters_and_never_the_teacher():
    student, teacher = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(50, 3)), network()
    before = copy.deepcopy(teacher.state_dict())
    taught = Distilled(
        TASK, teacher, (Weighted(Features(adapter=True), taps=(("0", "stem"),)),), student=student, task_weight=0.0
    )
    assert [tuple(p.shape) for p in taught.extra.parameters()] == [(4, 2), (4,)]
    teacher.train()
    taught.loss(student, TASK.batches[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in taught.extra.parameters())
    assert student[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters()) and teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_an_adapter_by_hand():
    """Two channels to one: 2 a - b + 0.5 against the teacher's 1 at every position."""
    student = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(8, 3))
    teacher = nn.Sequential(nn.Conv2d(2, 1, 1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(teacher[0].weight)
    nn.init.ones_(teacher[0].bias)
    x = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]])
    task = Pixels()
    task.example = lambda: x
    taught = Distilled(task, teacher, (Weighted(Features(adapter=True), taps=("0",)),), student=student)
    (linear,) = taught.extra.children()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
        linear.bias.fill_(0.5)
    found = taught.parts(student, (x, torch.zeros(1, dtype=torch.long)))["features"].item()
    assert found == pytest.approx(((2.5 - 1) ** 2 + (-0.5 - 1) ** 2 + 2 * (0.5 - 1) ** 2) / 4)


def test_adapters_start_from_their_seed_and_leave_the_random_state():
    made, losses = [], (Weighted(Features(adapter=True), taps=("stem",)),)
    for chance in range(2):
        student, teacher = network(), network(1)
        torch.manual_seed(chance)
        state = torch.get_rng_state()
        taught = Distilled(TASK, teacher, losses, student=student, seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(torch.cat([p.flatten() for p in taught.extra.parameters()]))
    assert torch.equal(*made)


def test_the_teacher_is_asked_once_a_batch_and_sees_what_the_student_sees():
    student, teacher = network(), network(1)
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append((args[0], module.training)))
    losses = (Weighted(Logits(1.0)), Weighted(Logits(4.0)), Weighted(Features(), taps=("stem", "block")))
    taught = Distilled(TASK, teacher, losses)
    assert list(taught.parts(student.train(), TASK.batches[1])) == ["task", "logits", "logits 2", "features"]
    assert len(seen) == 1 and seen[0][0] is TASK.batches[1][0] and not seen[0][1]


def test_wrapped_students_are_heard():
    student, teacher = network(), network(1)
    losses = (Weighted(Logits()), Weighted(ChannelWise(), taps=("block",)))
    taught = Distilled(TASK, teacher, losses)
    plain = taught.loss(student, TASK.batches[0]).item()
    compiled = torch.compile(student, backend="eager")
    compiled(TASK.batches[0][0])  # compiled before any hook is there
    assert taught.loss(compiled, TASK.batches[0]).item() == pytest.approx(plain)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        joined = nn.parallel.DistributedDataParallel(student)
        loss = taught.loss(joined, TASK.batches[0])
        loss.backward()
        assert loss.item() == pytest.approx(plain) and student.block[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()
    parallel = nn.DataParallel(student)
    parallel.device_ids = []  # as on a machine without GPUs
    assert taught.loss(parallel, TASK.batches[0]).item() == pytest.approx(plain)


def test_training_goes_to_the_teacher():
    student, teacher = network(2), network(1)
    losses = (Weighted(Features(adapter=True), 1.0, taps=("stem",)), Weighted(Logits(), 10.0))
    taught = Distilled(TASK, teacher, losses, student=student, task_weight=0.0)
    before = taught.loss(student, TASK.batches[0]).item()
    Recovery(epochs=20, lr=0.02, warmup=0.0)(student, taught)
    assert taught.loss(student, TASK.batches[0]).item() < before / 2
    assert not any(module._forward_hooks for module in student.modules())


def test_the_loop_s_other_settings_go_with_a_teacher():
    """Mixed pictures, a compiled student, accumulated gradients and half precision at once."""
    task = niwaki.tasks.Classification(niwaki.data.open("digits"), batch=16)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    losses = (Weighted(Logits()), Weighted(SpatialAttention(), taps=("0",)))
    taught = Distilled(task, copy.deepcopy(model), losses, student=model)
    speed = Speed(precision="bf16", compile="eager", channels_last=True)
    history = Recovery(epochs=1, limit=6, accumulate=2, mix=Mix(mixup=1.0), speed=speed)(model, taught)
    assert history.epochs[0]["steps"] == 3 and not any(module._forward_hooks for module in model.modules())


def test_a_weight_so_small_that_it_counts_nothing_trains_bit_for_bit_alike():
    ours, theirs = network(2), network(2)
    Recovery(epochs=1)(ours, TASK)
    Recovery(epochs=1)(theirs, Distilled(TASK, network(1), (Weighted(Logits(), 1e-30),)))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_all_but_the_loss_is_the_task_s():
    taught = Distilled(TASK, network(1), (Weighted(Logits()),))
    assert taught.steps == 3 and taught.calibration(2, 0) == TASK.batches[:2]
    assert list(taught.train_batches(0)) == TASK.batches and taught.inputs(TASK.batches[0]) is TASK.batches[0][0]
    assert taught.classes is None
    assert taught.evaluate(network()).value == 1.0 and torch.equal(taught.example(), TASK.example())


class Twice(Pixels):
    def loss(self, model, batch):
        return super().loss(model, batch) + super().loss(model, batch)


def test_refusals():
    student, teacher, batch = network(), network(1), TASK.batches[0]
    plan, small = cut_by(teacher, 0.5, {})

    def on(tap, loss=Features(), **more):  # noqa: B008
        return Distilled(TASK, teacher, (Weighted(loss, taps=(tap,)),), **more)

    with pytest.raises(UnknownNameError, match=r"'block\.9'; found: known: block\.0, block\.1, block\.2"):
        on("block.9")
    with pytest.raises(UnknownNameError, match="unknown module to tap 'nose'"):
        on(("nose", "stem"), student=student)
    with pytest.raises(InputError, match="the student's forward never reaches it"):
        on(("spare", "stem"), student=student)
    with pytest.raises(InputError, match="the teacher's forward never reaches it"):
        on(("stem", "spare"), student=student)
    with pytest.raises(InputError, match=r"where: student's head, teacher's block; do: tap places of one kind"):
        on(("head", "block"), student=student)
    with pytest.raises(InputError, match=r"4 in the teacher; where: student's stem, teacher's stem; do: give the plan"):
        on("stem", student=small)
    on("stem", student=small, plan=plan)
    with pytest.raises(InputError, match=r"shape \(1, 3, 5, 5\), where axis 1 was 4 long in the plan"):
        kept_at(teacher, plan, {"stem"})["stem"].of(torch.zeros(1, 3, 5, 5))
    with pytest.raises(PlanMismatchError):
        on("stem", plan=cut_by(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(), nn.Linear(100, 3)), 0.5, {})[0])
    with pytest.raises(InputError, match="no student to tell its width"):
        on("stem", Features(adapter=True))
    with pytest.raises(InputError, match="share weights"):
        on("stem", student=teacher)
    with pytest.raises(InputError, match="calls the model 2 times"):
        Distilled(Twice(), teacher, (Weighted(Logits()),)).loss(student, batch)
    with pytest.raises(InputError, match="give some"):
        Distilled(TASK, teacher, ())
    with pytest.raises(InputError, match="task_weight"):
        Distilled(TASK, teacher, (Weighted(Logits()),), task_weight=-1.0)
    with pytest.raises(InputError, match="weight above 0"):
        Weighted(Logits(), 0.0)
    with pytest.raises(InputError, match="tuple of module paths"):
        Weighted(Logits(), taps="stem")
    broken = network(1)
    nn.init.constant_(broken.stem.weight, float("nan"))
    with pytest.raises(NotFiniteError, match="where: stem"):
        Distilled(TASK, broken, (Weighted(Features(), taps=("stem",)),), student=student)


def test_outputs_with_names_are_found():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return SimpleNamespace(logits=self.inner(x), hidden=x)

    model = Named()
    with tapped(model, {""}) as heard:
        output = model(TASK.example())
    assert heard.feature("", "student") is output.logits
    scores, other = torch.zeros(2, 3), torch.ones(2, 3)
    for found in (scores, {"logits": scores, "aux": other}, (scores, other), {"out": scores}):
        assert scores_of(found) is scores
    for found in ({"segmentation": scores, "depth": other}, None):
        with pytest.raises(InputError, match="tap the module that puts out the scores"):
            scores_of(found)


def test_compress_makes_the_uncut_model_the_teacher(monkeypatch):
    made = []
    monkeypatch.setattr(
        "niwaki.methods.steps.Distilled", lambda *given, **more: made.append(given) or Distilled(*given, **more)
    )
    model, losses = network(), (Weighted(Logits()), Weighted(Features(), taps=("both",)))
    common = {"method": niwaki.methods.Magnitude(), "budget": niwaki.Budget(0.5, "units"), "task": TASK}
    before = copy.deepcopy(model.state_dict())
    outcome = niwaki.compress(model, TASK.example(), recovery=Recovery(epochs=1), distill=losses, **common)
    assert [given[:3] for given in made] == [(TASK, model, losses)] and made[0][4] is outcome.model
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert outcome.settings()["distill"][1]["taps"] == [["both", "both"]]
    plain = niwaki.compress(model, TASK.example(), recovery=Recovery(epochs=1), **common)
    assert plain.history["epochs"][0]["loss"] < outcome.history["epochs"][0]["loss"] and len(made) == 1
    with pytest.raises(InputError, match="distil without a recovery"):
        niwaki.compress(model, TASK.example(), distill=losses, **common)


class Placed(Pixels):
    """Says where things lie: in the left half of the first picture, and nowhere else."""

    def covered(self, batch, cells):
        there = torch.zeros(len(batch[0]), *cells, dtype=torch.bool)
        there[0, :, : cells[1] // 2] = True
        return there


def test_attention_where_things_lie():
    """The distance of the same maps, of the covered cells alone, over all cells; around other tasks, too."""
    teacher, student, task = network(), network(1), Placed()
    batch = task.batches[0]
    with tapped(student, {"stem"}) as mine, tapped(teacher, {"stem"}) as theirs:
        student(batch[0]), teacher(batch[0])
    maps = [
        nn.functional.normalize(heard.feature("stem", "").square().mean(1).flatten(1)).view(4, 5, 5)
        for heard in (mine, theirs)
    ]
    apart = (maps[0] - maps[1]).square()
    there = Weighted(SpatialAttention(things=True), 2.0, taps=("stem",))
    everywhere = Weighted(SpatialAttention(), 2.0, taps=("stem",))
    inner = Distilled(task, teacher, (everywhere,), student=student)
    for around in (task, inner):
        parts = Distilled(around, teacher, (there,), student=student).parts(student, batch)
        assert parts["spatial_attention"].item() == pytest.approx(2 * apart[0, :, :2].sum().item() / 100)
    assert inner.parts(student, batch)["spatial_attention"].item() == pytest.approx(2 * apart.mean().item())


def test_attention_where_things_lie_needs_to_know_where():
    there = (Weighted(SpatialAttention(things=True), taps=("stem",)),)
    with pytest.raises(
        InputError, match=r"spatial_attention where things lie; found: a Pixels, whose batches do not say"
    ):
        Distilled(TASK, network(), there, student=network(1))
    tokens = (Weighted(SpatialAttention(things=True), taps=("head",)),)
    with pytest.raises(InputError, match=r"shape \(1, 3\).*where: student's head.*\[batch, channels, rows, columns\]"):
        Distilled(Placed(), network(), tokens, student=network(1))
