"""Low-rank projections: the worked numbers and the invariants of the method's page; training; files."""

import json
import math
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kv_zoo
from niwaki.data import Tokens
from niwaki.errors import FileDamagedError, InputError, NotFiniteError, UnknownNameError
from niwaki.kv import Projections, Rounding, errors_of, project, reconstruct
from niwaki.kv.calibration import statistics
from niwaki.kv.factors import Factors, asvd, factorised, rank_of, svd, whitened
from niwaki.kv.packed import Grid
from niwaki.kv.projections import growing
from niwaki.kv.reconstruction import PUBLISHED
from niwaki.kv.straight_through import reference, through
from niwaki.tasks import LanguageModelling
from niwaki.train import Checkpoints, Recovery

W = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
X = torch.tensor([[1.0, 0.0], [0.0, 10.0]])


def error(factors: Factors, x: Tensor = X, weight: Tensor = W) -> float:
    return (factors.restored(factors.compressed(x)) - x @ weight).square().mean().item()


def test_the_three_initialisations_by_hand() -> None:
    # plain SVD keeps the 3 and loses (0, 10) -> 10: 100 / 4
    assert error(factorised(W, 1, svd)) == pytest.approx(25.0)
    # S = diag(sqrt(0.5), sqrt(5)); S W = diag(2.121, 2.236): keeps the 1 and loses (1, 0) -> 3: 9 / 4
    assert error(factorised(W, 1, asvd(X.abs().mean(0)))) == pytest.approx(2.25, abs=1e-4)
    # C^1/2 W = diag(2.121, 7.071): the second direction stays; 2.121^2 / 2
    covariance = X.T @ X / 2
    assert error(factorised(W, 1, whitened(covariance))) == pytest.approx(2.25, abs=1e-4)
    root = torch.linalg.svdvals(covariance.sqrt() @ W)
    assert root.tolist() == pytest.approx([7.0711, 2.1213], abs=1e-4)


@pytest.mark.parametrize("factor", [16.0, 256.0])
def test_a_sum_instead_of_a_mean_moves_the_factors_and_not_their_product(factor: float) -> None:
    mean = torch.tensor([0.5, 5.0], dtype=torch.float64)
    one, other = factorised(W, 1, asvd(mean)), factorised(W, 1, asvd(mean * factor))
    torch.testing.assert_close(one.product(), other.product(), atol=1e-4, rtol=1e-4)
    # S becomes factor^1/2 S: down is divided, up multiplied by the root of that
    root = math.sqrt(math.sqrt(factor))
    torch.testing.assert_close(one.down.abs(), other.down.abs() * root, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.up.abs() * root, other.up.abs(), atol=1e-4, rtol=1e-4)


def test_ranks_are_floored_by_head() -> None:
    assert rank_of(0.2, 32, 128) == 800 and rank_of(0.2, 8, 128) == 200 and rank_of(0.5, 32, 128) == 2048
    assert rank_of(0.29, 1, 100) == 29 and rank_of(1, 2, 64) == 128 and rank_of(0.999, 2, 64) == 126
    with pytest.raises(InputError, match=r"at least 0\.0625"):
        rank_of(0.05, 4, 16)
    for keep in (0, -0.1, 1.01, math.nan):
        with pytest.raises(InputError, match=r"\(0, 1\]"):
            rank_of(keep, 4, 16)


def data(seed: int = 0, rows: int = 400, width: int = 12, out: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator) @ mixing, torch.randn(width, out, generator=generator)


def test_errors_fall_with_rank_and_the_whitened_one_is_the_floor() -> None:
    x, weight = data()
    covariance = (x.T @ x / len(x)).double()
    values = torch.linalg.svdvals(torch.linalg.cholesky(covariance).T @ weight.double())
    found = {
        name: [factorised(weight, rank, solver) for rank in range(1, 9)]
        for name, solver in {"svd": svd, "asvd": asvd(x.abs().mean(0)), "whitened": whitened(covariance)}.items()
    }
    frobenius = [(one.product() - weight).square().sum().item() for one in found["svd"]]
    of_data = {name: [error(one, x, weight) for one in listed] for name, listed in found.items()}
    assert frobenius == sorted(frobenius, reverse=True)
    assert of_data["whitened"] == sorted(of_data["whitened"], reverse=True)
    for rank in range(1, 8):
        floor = values[rank:].square().sum().item() / 8  # what no factors of that rank go below
        assert of_data["whitened"][rank - 1] == pytest.approx(floor, rel=1e-3)
        assert of_data["whitened"][rank - 1] <= min(of_data["svd"][rank - 1], of_data["asvd"][rank - 1]) * 1.001
    for name in found:
        assert of_data[name][7] < 1e-8, "full rank is exact"


def test_groups_are_factorised_by_themselves() -> None:
    x, weight = data()
    both = factorised(weight, 6, svd, groups=2)
    left, right = (factorised(half, 3, svd) for half in weight.chunk(2, dim=1))
    assert both.down.shape == (12, 6) and both.up.shape == (2, 3, 4) and both.nbytes() == 4 * (72 + 24)
    wanted = torch.cat([one.restored(one.compressed(x)) for one in (left, right)], dim=1)
    torch.testing.assert_close(both.restored(both.compressed(x)), wanted)


def test_a_matrix_of_lower_rank_than_asked_is_filled_with_zeros() -> None:
    narrow = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    one = factorised(narrow, 6, svd)
    assert one.rank == 6
    torch.testing.assert_close(one.product(), narrow, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotFiniteError):
        factorised(torch.full((2, 2), math.nan), 1, svd)


def packed(values: list[float], bits: int = 2) -> list[float]:
    rows = torch.tensor(values).view(1, 1, 1, -1)
    return through(rows, Grid(bits, "channels", 8)).flatten().tolist()


def test_the_quantisers_by_hand() -> None:
    for values in ([0.0, 1.0, 2.0, 3.0], [-1.0, 0.0, 1.0, 2.0], [2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0]):
        assert packed(values) == values
    for values, found in (
        ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]),
        ([-1.0, 0.0, 1.0, 2.0], [-1.0, 0.0, 1.0, 2.0]),
        ([2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 3.0, 3.0]),
    ):
        assert reference(torch.tensor(values), 2).tolist() == pytest.approx(found)
    assert reference(torch.ones(4), 2).tolist() == pytest.approx([3e-5] * 4, rel=0.7)  # not 1


def test_a_mean_away_from_zero_costs_the_reference_quantiser_only() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 2000, 32, generator=generator)
    for mean, reference_error in ((0, 0.0065), (2, 0.0096), (3, 0.093), (5, 1.95)):
        rows = noise + mean
        ours = (through(rows, Grid(4, "channels", 32)) - rows).square().mean().item()
        theirs = (reference(rows, 4) - rows).square().mean().item()
        assert ours == pytest.approx(0.0062, abs=0.0003)
        assert theirs == pytest.approx(reference_error, rel=0.15)


def test_gradients_pass_through_rounding() -> None:
    rows = torch.tensor([2.0, 2.4, 4.0, 5.0]).view(1, 1, 1, -1).requires_grad_()
    through(rows, Grid(2, "channels", 8)).sum().backward()
    assert rows.grad is not None and rows.grad.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]
    rows.grad = None
    reference(rows, 2).sum().backward()
    assert rows.grad.flatten().tolist() == [0.0, 1.0, 1.0, 0.0], "a group's own extremes get none"
    keys = torch.randn(1, 1, 11, 3).requires_grad_()
    rounded = through(keys, Grid(4, "tokens", 8))
    assert torch.equal(rounded[:, :, 8:], keys[:, :, 8:]) and not torch.equal(rounded[:, :, :8], keys[:, :, :8])


def batches(count: int = 3, length: int = 48) -> list[Tensor]:
    return [kv_zoo.prompt(length, seed=seed) for seed in range(count)]


def text(count: int = 24, length: int = 32) -> Any:
    blocks = torch.cat([kv_zoo.prompt(length, seed=100 + seed) for seed in range(count)])
    tokens = Tokens(blocks)
    return LanguageModelling(SimpleNamespace(train=tokens, val=tokens, test=tokens, vocabulary=64, mask=None), batch=4)


def total(errors: dict[int, tuple[float, float]]) -> float:
    return sum(map(sum, errors.values()))


def test_statistics_are_means_over_tokens_whatever_their_order() -> None:
    model = kv_zoo.llama()
    sites = growing(model)
    one = statistics(model, sites, batches())
    other = statistics(model, sites, batches()[::-1])
    seen: list[Tensor] = []
    handle = sites[1].module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches():
            model(batch)
    handle.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    layer = sites[1].layer
    torch.testing.assert_close(one[layer].mean, x.abs().mean(0))
    torch.testing.assert_close(one[layer].covariance, x.T @ x / len(x))
    assert one[layer].tokens == len(x) == 3 * 48
    torch.testing.assert_close(one[layer].covariance, other[layer].covariance)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_keys_and_values_are_projected_apart_and_by_data() -> None:
    model = kv_zoo.llama()
    plain = project(model, None, keep=0.5, init="svd")
    scaled, best = (project(model, batches(), keep=0.5, init=init) for init in ("asvd", "whitened"))
    found = [errors_of(model, one, batches()) for one in (plain, scaled, best)]
    assert total(found[2]) < min(total(found[0]), total(found[1]))
    more = errors_of(model, project(model, batches(), keep=0.5, values=0.75), batches())
    for layer, (keys, values) in found[2].items():
        assert more[layer][0] == pytest.approx(keys, rel=1e-4) and more[layer][1] < values
    whole = errors_of(model, project(model, batches(), keep=1.0), batches())
    assert total(whole) < 1e-8


def test_training_ends_between_the_optimum_and_where_it_began() -> None:
    model, words = kv_zoo.llama(), text()
    seen = [words.inputs(batch) for batch in words.train_batches(0)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = project(model, seen, keep=0.25, init="asvd")
    floor = total(errors_of(model, project(model, seen, keep=0.25), seen))
    trained, history = reconstruct(model, start, words, how=Recovery(epochs=12, lr=1e-2, optimizer="adamw"))
    after = total(errors_of(model, trained, seen))
    assert floor * 0.99 <= after < total(errors_of(model, start, seen))
    assert after < floor * 1.1, "training goes where the closed form is"
    assert trained.shape.steps == 12 * words.steps and history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_training_with_rounding_beats_rounding_afterwards() -> None:
    model, words = kv_zoo.llama(), text()
    seen, rounding = [words.inputs(batch) for batch in words.train_batches(0)], Rounding(bits=2, window=16)
    start = project(model, seen, keep=0.5)
    trained, _ = reconstruct(model, start, words, how=Recovery(epochs=6, lr=3e-3, optimizer="adamw"), rounding=rounding)
    late, early = (total(errors_of(model, one, seen, rounding)) for one in (start, trained))
    assert early < late
    assert (trained.shape.bits, trained.shape.window) == (2, 16)
    published = Rounding(bits=2, window=16, as_published=True)
    assert total(errors_of(model, start, seen, published)) > late, "a clamped zero point costs"
    with pytest.raises(InputError, match="trained for bits=2, window=16"):
        reconstruct(model, trained, words, rounding=Rounding(bits=4, window=16))


def test_a_training_that_was_stopped_goes_on_to_the_same_factors(tmp_path: Any) -> None:
    model, words = kv_zoo.llama(), text()
    start = project(model, [words.inputs(batch) for batch in words.train_batches(0)], keep=0.5, init="asvd")

    def how(folder: str) -> Recovery:
        return Recovery(epochs=2, lr=1e-3, optimizer="adamw", folder=folder, checkpoints=Checkpoints(every_steps=2))

    wanted, _ = reconstruct(model, start, words, how=how(str(tmp_path / "a")))

    class Stop(Exception):
        pass

    def stopping(done: int, _: int, __: str) -> None:
        if done >= 5:
            raise Stop

    with pytest.raises(Stop):
        reconstruct(model, start, words, how=how(str(tmp_path / "b")), progress=stopping)
    found, _ = reconstruct(model, start, words, how=how(str(tmp_path / "b")), resume=True)
    for layer, pair in wanted.layers.items():
        for one, other in zip(pair, found.layers[layer], strict=True):
            assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def test_published_settings() -> None:
    assert (PUBLISHED.optimizer, PUBLISHED.lr, PUBLISHED.schedule) == ("adamw", 5e-5, "linear")
    assert (PUBLISHED.weight_decay, PUBLISHED.clip, PUBLISHED.warmup, PUBLISHED.epochs) == (0.0, 1.0, 0.0, 1)


def test_files_come_back_and_foreign_ones_are_refused(tmp_path: Any) -> None:
    model, file = kv_zoo.llama(), tmp_path / "p.safetensors"
    made = project(model, batches(), keep=0.5, values=0.25, per_head=True)
    made.save(file)
    again = Projections.load(file)
    assert again.shape == made.shape and again.fingerprint == made.fingerprint
    assert all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up)
        for layer in made.layers
        for a, b in zip(made.layers[layer], again.layers[layer], strict=True)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors"]
    with pytest.raises(InputError, match="no such file"):
        Projections.load(tmp_path / "q.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(FileDamagedError, match=r"Projections\.save"):
        Projections.load(file)
    length = struct.unpack("<Q", content[:8])[0]
    head = json.loads(content[8 : 8 + length])
    head["__metadata__"]["format"] = "other"
    changed = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
    with pytest.raises(FileDamagedError, match="format 'other'"):
        Projections.load(file)


def test_bad_calibration_is_refused() -> None:
    model = kv_zoo.llama()
    with pytest.raises(InputError, match="no batches"):
        project(model, [], keep=0.5)
    with pytest.raises(InputError, match="no batches"):
        project(model, None, keep=0.5, init="asvd")
    with pytest.raises(InputError, match="tokens that the model does not have"):
        project(model, [torch.full((1, 4), 10**6)], keep=0.5)
    with pytest.raises(UnknownNameError):
        project(model, batches(), keep=0.5, init="random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least"):
        project(model, batches(), keep=0.01)
    with pytest.warns(UserWarning, match="ASVD is taken instead"):
        few = project(model, [kv_zoo.prompt(5)], keep=0.5)
    assert few.shape.init == "asvd"
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = math.nan
    with pytest.raises(NotFiniteError, match="NaN or infinite inputs"):
        project(model, [torch.full((1, 40), 3)], keep=0.5)
