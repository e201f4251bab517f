"""Weights cut on disk: the bits that a cut in memory gives, and nothing left behind where something is wrong."""

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import niwaki
from niwaki.errors import (
    CannotCutError,
    FileDamagedError,
    InputError,
    NotFiniteError,
    PlanMismatchError,
    RunExistsError,
)
from niwaki.graph.skeleton import copy_with, to_meta
from niwaki.stored import INDEX, SINGLE, Stored, write_index
from niwaki.surgery import on_disk


class Block(nn.Module):
    """Attention whose scale follows the head size, and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out = nn.Linear(12, 12)
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.heads = 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Tokens in, tokens out; the last weight is the first one where `tied`."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 10, bias=False)
        self.register_buffer("shift", torch.linspace(0, 1, 12))
        self.register_buffer("loose", torch.linspace(1, 2, 12), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens) * self.loose + self.shift))


EXAMPLE = torch.arange(4).unsqueeze(0)
Made = tuple[Net, Net, Path]


def made(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Made:
    """A network, the same without its parameters, and its state in three shards."""
    torch.manual_seed(1)
    net = Net(tied=tied).to(dtype).eval()
    state = {name: tensor for name, tensor in net.state_dict().items() if not (tied and name == "head.weight")}
    names = list(state)
    files = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    folder.mkdir()
    for file, held in files.items():
        save_file({name: state[name].contiguous() for name in held}, folder / file, metadata={"format": "pt"})
    write_index(folder / INDEX, files, {"total_size": 1, "total_parameters": 1, "kept": "as it was"})
    bare = copy_with(net, lambda t: to_meta(t) if isinstance(t, nn.Parameter) else t.clone())
    return net, bare, folder


def planned(net: nn.Module, *, grids: str = "rows", blocks: Any = "keep", weights: Stored | None = None) -> niwaki.Plan:
    graph = niwaki.trace(net, EXAMPLE)
    how = niwaki.scores.Magnitude()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs, stored=weights), how=how)
    budget, rule = niwaki.Budget(keep=0.5, of="params"), niwaki.budgets.Uniform()
    return niwaki.choose(graph, scores, budget, how=rule, grids=grids, blocks=blocks)  # type: ignore[arg-type]


def states(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.mark.parametrize("grids", ["rows", "columns"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_a_cut_in_memory(tmp_path: Path, grids: str, tied: bool, dtype: torch.dtype) -> None:
    net, bare, folder = made(tmp_path / "whole", tied=tied, dtype=dtype)
    plan = planned(net, grids=grids)
    same = planned(bare, grids=grids, weights=Stored(folder))
    assert same.kept == plan.kept and same.cuts == plan.cuts
    small = niwaki.cut(net, plan)
    scaled = niwaki.surgery.surgery_of(small).scaled
    assert bool(scaled) == (grids == "columns")  # the scale of attention is folded where heads got narrower
    heard: list[tuple[str, int, int]] = []
    empty = niwaki.cut_stored(bare, same, folder, tmp_path / "cut", progress=lambda *told: heard.append(told))
    assert heard == [(f"part-{i}.safetensors", i + 1, 3) for i in range(3)]
    filled = niwaki.fill_stored(empty, tmp_path / "cut")
    again = niwaki.load(tmp_path / "cut", lambda: Net(tied=tied).to(dtype).eval())
    for other in (filled, again):
        want, got = states(small), states(other)
        assert want.keys() == got.keys()
        for name, tensor in want.items():
            assert torch.equal(tensor, got[name]) and tensor.dtype == got[name].dtype, name
        assert (other.head.weight is other.embed.weight) == tied
        with torch.no_grad():
            assert torch.equal(small(EXAMPLE), other(EXAMPLE))


def test_blocks_that_are_left_out_are_not_written(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    plan = planned(bare, blocks="only", weights=Stored(folder))
    assert plan.cuts == planned(net, blocks="only").cuts and set(plan.dropped) == {"blocks.0", "blocks.1"}
    filled = niwaki.fill_stored(niwaki.cut_stored(bare, plan, folder, tmp_path / "cut"), tmp_path / "cut")
    assert not any(plan.drops(name) for names in Stored(tmp_path / "cut").files.values() for name in names)
    with torch.no_grad():
        assert torch.equal(filled(EXAMPLE), niwaki.cut(net, plan)(EXAMPLE))
    assert torch.equal(niwaki.load(tmp_path / "cut", lambda: Net().eval())(EXAMPLE), filled(EXAMPLE))


def test_the_folder_is_laid_out_as_the_checkpoint(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    plan = planned(net)
    small = niwaki.cut_stored(bare, plan, folder, tmp_path / "cut")
    before, after = Stored(folder), Stored(tmp_path / "cut")
    assert after.files == before.files and after.notes == before.notes
    assert after.metadata == {
        "total_size": after.bytes,
        "total_parameters": sum(p.numel() for p in small.parameters()),
        "kept": "as it was",
    }
    assert niwaki.Plan.from_json((tmp_path / "cut" / "plan.json").read_text()).kept == plan.kept
    assert after["blocks.0.q.weight"].shape == small.blocks[0].q.weight.shape  # type: ignore[union-attr, index]
    small.load_state_dict(dict(after), assign=True)  # and torch's own way reads it, too
    assert all(p.is_meta for p in bare.parameters())


def test_one_file_stays_one_file(tmp_path: Path) -> None:
    net, bare, _ = made(tmp_path / "whole")
    (tmp_path / "one").mkdir()
    save_file(net.state_dict(), tmp_path / "one" / SINGLE)
    niwaki.cut_stored(bare, planned(net), tmp_path / "one", tmp_path / "cut")
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {SINGLE, "plan.json", "surgery.json"}
    want = niwaki.cut(net, planned(net)).state_dict()
    assert all(torch.equal(want[name], tensor) for name, tensor in load_file(tmp_path / "cut" / SINGLE).items())


def test_compress_stored_does_it_all(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    method, budget = niwaki.methods.Magnitude(), niwaki.Budget(keep=0.5)
    done = niwaki.compress_stored(bare, EXAMPLE, folder, tmp_path / "cut", method=method, budget=budget)
    known = niwaki.compress(net, EXAMPLE, method=method, budget=budget)
    assert done.plan.kept == known.plan.kept and list(done.seconds) == ["trace", "score", "choose", "cut"]
    want = known.model.state_dict()
    assert all(torch.equal(want[name], tensor) for name, tensor in Stored(tmp_path / "cut").items())
    told = json.loads(json.dumps(done.to_json()))
    assert told["after"]["bytes"] == Stored(tmp_path / "cut").bytes < told["before"]["bytes"] and not told["judged"]
    with pytest.raises(RunExistsError):
        niwaki.compress_stored(bare, EXAMPLE, folder, tmp_path / "cut", method=method, budget=budget)


def drop(state: dict[str, Tensor]) -> None:
    del state["blocks.1.up.bias"]


def add(state: dict[str, Tensor]) -> None:
    state["blocks.2.up.bias"] = torch.zeros(2)


def reshape(state: dict[str, Tensor]) -> None:
    state["head.weight"] = torch.zeros(10, 13)


def retype(state: dict[str, Tensor]) -> None:
    state["head.weight"] = torch.zeros(10, 12, dtype=torch.int8)


def poison(state: dict[str, Tensor]) -> None:
    state["head.weight"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (drop, InputError, "1 missing: blocks.1.up.bias"),
        (add, InputError, "1 unexpected: blocks.2.up.bias"),
        (reshape, InputError, r"1 of another shape: head.weight \(10, 13\), in the model \(10, 12\)"),
        (retype, InputError, "1 of another kind: head.weight int8, in the model float32"),
        (poison, NotFiniteError, "head.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], error: type[Exception], said: str
) -> None:
    net, bare, _ = made(tmp_path / "whole")
    plan = planned(net)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    change(state)
    save_file(state, tmp_path / SINGLE)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=said):
        niwaki.cut_stored(bare, plan, tmp_path / SINGLE, tmp_path / "cut")
    assert sorted(tmp_path.iterdir()) == before


def test_scores_refuse_what_is_stored_of_another_model(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    graph = niwaki.trace(bare, EXAMPLE)
    save_file({"embed.weight": torch.zeros(10, 12)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match="no blocks"):
        niwaki.collect(bare, graph, frozenset(), stored=Stored(tmp_path))
    needs = niwaki.scores.Taylor().needs
    with pytest.raises(InputError, match="weights that stay on disk"):
        niwaki.collect(bare, graph, needs, stored=Stored(folder))
    state = net.state_dict()
    state["head.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / SINGLE)
    how = niwaki.scores.Magnitude()
    with pytest.raises(NotFiniteError, match=r"head\.weight"):
        niwaki.score(graph, niwaki.collect(bare, graph, how.needs, stored=Stored(tmp_path)), how=how)


def test_tied_tensors_stored_twice_must_be_equal(tmp_path: Path) -> None:
    net, bare, _ = made(tmp_path / "whole", tied=True)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = planned(net)
    save_file(state, tmp_path / SINGLE)
    niwaki.cut_stored(bare, plan, tmp_path / SINGLE, tmp_path / "cut")
    cut = Stored(tmp_path / "cut")
    assert torch.equal(cut["head.weight"], cut["embed.weight"])
    state["head.weight"][0, 0] += 1
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"embed\.weight and head\.weight differ"):
        niwaki.cut_stored(bare, plan, tmp_path / SINGLE, tmp_path / "cut", force=True)


def test_no_overwriting(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    plan = planned(net)
    niwaki.cut_stored(bare, plan, folder, tmp_path / "cut")
    with pytest.raises(RunExistsError):
        niwaki.cut_stored(bare, plan, folder, tmp_path / "cut")
    with pytest.raises(RunExistsError, match="the checkpoint itself"):
        niwaki.cut_stored(bare, plan, folder, folder, force=True)
    niwaki.cut_stored(bare, plan, folder, tmp_path / "cut", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, bare, folder = made(tmp_path / "whole")
    plan = planned(net)
    write = on_disk.write_safetensors

    def full(path: Path, *rest: Any) -> int:
        if path.name == "part-1.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *rest)

    monkeypatch.setattr(on_disk, "write_safetensors", full)
    with pytest.raises(InputError, match="No space left on device"):
        niwaki.cut_stored(bare, plan, folder, tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(on_disk.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 7}))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="7 bytes free"):
        niwaki.cut_stored(bare, plan, folder, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_shard_that_goes_bad_meanwhile_is_named(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    stored = Stored(folder)
    (folder / "part-2.safetensors").write_bytes(b"")
    with pytest.raises(FileDamagedError, match=r"part-2\.safetensors"):
        niwaki.cut_stored(bare, planned(net), stored, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


class HardCoded(nn.Module):
    """Only the exported door opens: the forward writes a width down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 12))


def test_the_exported_door_is_refused_aloud(tmp_path: Path) -> None:
    net = HardCoded()
    graph = niwaki.trace(net, torch.zeros(1, 4))
    how = niwaki.scores.Random()
    scores = niwaki.score(graph, niwaki.collect(net, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5))
    save_file(net.state_dict(), tmp_path / SINGLE)
    with pytest.raises(CannotCutError, match=r"only cuts by torch\.export"):
        niwaki.cut_stored(net, plan, tmp_path, tmp_path / "cut")


def test_another_model_is_refused(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    plan = planned(net)
    bare.blocks[0].extra = nn.Linear(2, 2)
    state = {**net.state_dict(), "blocks.0.extra.weight": torch.zeros(2, 2), "blocks.0.extra.bias": torch.zeros(2)}
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(PlanMismatchError):
        niwaki.cut_stored(bare, plan, tmp_path / SINGLE, tmp_path / "cut")
    assert folder.exists()


def test_a_buffer_that_no_file_holds_is_missed(tmp_path: Path) -> None:
    net, bare, folder = made(tmp_path / "whole")
    small = niwaki.cut_stored(bare, planned(net), folder, tmp_path / "cut")
    small.loose = small.loose.to("meta")  # type: ignore[assignment, operator]
    with pytest.raises(InputError, match="loose"):
        niwaki.fill_stored(small, tmp_path / "cut")


@pytest.fixture
def llama() -> Iterator[Any]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    yield transformers


@pytest.mark.parametrize("tied", [False, True])
def test_a_small_llama_in_shards(tmp_path: Path, llama: Any, tied: bool) -> None:
    """Built without its parameters, cut on disk, loaded: bit for bit the model that was cut in memory."""
    settings = {
        "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "intermediate_size": 48, "tie_word_embeddings": tied,
    }  # fmt: skip
    torch.manual_seed(2)
    made = llama.LlamaForCausalLM(llama.LlamaConfig(**settings, architectures=["LlamaForCausalLM"])).bfloat16()
    folder = tmp_path / "llama"
    made.save_pretrained(folder, max_shard_size="24KB")
    whole = niwaki.models.load(f"hf:{folder}").model
    assert len(Stored(folder).files) >= 3
    bare = niwaki.models.outline(f"hf:{folder}")
    assert all(p.is_meta for p in bare.model.parameters()) and not any(b.is_meta for b in bare.model.buffers())
    method, budget = niwaki.methods.Magnitude(), niwaki.Budget(keep=0.5)  # whole heads: the class has one head size
    done = niwaki.compress_stored(bare.model, bare.example, folder, tmp_path / "cut", method=method, budget=budget)
    assert done.files == tuple(Stored(folder).files)
    known = niwaki.compress(whole, bare.example, method=method, budget=budget)
    filled = niwaki.load(tmp_path / "cut", bare.factory)
    want = known.model.state_dict()
    assert all(torch.equal(want[name], tensor) for name, tensor in filled.state_dict().items())
    with torch.no_grad():
        assert torch.equal(known.model(**bare.example).logits, filled(**bare.example).logits)
