"""Networks of darknet: every layer with values worked out by hand, weights files, and published networks."""

import importlib.util
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import niwaki
from niwaki.errors import FileDamagedError, InputError, NotFiniteError
from niwaki.models.darknet_cfg import parse
from niwaki.models.darknet_files import load_weights_, save_darknet
from niwaki.models.darknet_net import Convolution, Darknet, decode

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "coco-yolo-fastest-darknet"
GRID = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
NET = "[net]\nwidth=4\nheight=4\nchannels={}\n"
DETECTOR = (
    NET.format(3)
    + """
[convolutional]
batch_normalize=1
filters=4   ; a comment
size=3
pad=1
activation=leaky

[route]
layers=-1
groups=2
group_id=1

# half of the channels
[convolutional]
batch_normalize=1
filters=2
size=1
activation=mish

[route]
layers=-1,0

[convolutional]
filters=7
size=1
activation=linear

[yolo]
mask=1
anchors=1,2, 2,1
classes=2
scale_x_y=1.2
"""
)


def built(text: str, channels: int = 1) -> Darknet:
    return Darknet(parse(NET.format(channels) + text, "test.cfg")).eval()


def of(text: str, x: Tensor = GRID) -> Tensor:
    return built(text, x.shape[1])(x)


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cfg"
    path.write_text(DETECTOR)
    return path


def weights_of(count: int, *, version: tuple[int, int, int] = (0, 2, 0)) -> bytes:
    """A weights file that counts 1, 2, 3, ... with variances and all else alike."""
    seen = struct.pack("<Q", 7) if version[0] * 10 + version[1] >= 2 else struct.pack("<I", 7)
    return struct.pack("<3i", *version) + seen + np.arange(1, count + 1, dtype="<f4").tobytes()


# -- layers ----------------------------------------------------------------------------------------------------


def test_a_pool_of_two_that_halves():
    assert of("[maxpool]\nsize=2\nstride=2\n").tolist() == [[[[6, 8], [14, 16]]]]


def test_a_pool_of_two_that_halves_an_odd_size_upwards():
    x = GRID[:, :, :3, :3]  # 1 2 3 / 5 6 7 / 9 10 11
    assert of("[maxpool]\nsize=2\nstride=2\n", x).tolist() == [[[[6, 7], [10, 11]]]]


def test_a_pool_of_two_that_keeps_the_size_pads_at_the_end():
    x = -GRID[:, :, :2, :2]  # -1 -2 / -5 -6: padding has no value, not zero
    assert of("[maxpool]\nsize=2\nstride=1\n", x).tolist() == [[[[-1, -2], [-5, -6]]]]


def test_a_pool_of_three_pads_both_ends():
    x = GRID[:, :, :2, :3]  # 1 2 3 / 5 6 7
    assert of("[maxpool]\nsize=3\nstride=1\n", x).tolist() == [[[[6, 7, 7], [6, 7, 7]]]]


@pytest.mark.parametrize("size", [5, 9, 13])
def test_pyramid_pools_keep_the_size(size):
    assert of(f"[maxpool]\nsize={size}\nstride=1\n").shape == GRID.shape


def test_upsampling_repeats_and_scales():
    x = GRID[:, :, :1, :2]
    assert of("[upsample]\nstride=2\nscale=3\n", x).tolist() == [[[[3, 3, 6, 6], [3, 3, 6, 6]]]]


def test_the_average_of_a_channel():
    assert of("[avgpool]\n").tolist() == [[[[8.5]]]]


def test_routes_take_layers_by_number_and_from_here_and_parts_of_them():
    x = torch.stack([GRID[0, 0], 10 * GRID[0, 0]]).unsqueeze(0)
    text = "[dropout]\nprobability=0.5\n[upsample]\nstride=1\nscale=2\n"
    assert of(text + "[route]\nlayers=-1, 0\n", x)[0, :, 0, 0].tolist() == [2, 20, 1, 10]
    assert of(text + "[route]\nlayers=0,-1\ngroups=2\ngroup_id=1\n", x)[0, :, 0, 0].tolist() == [10, 20]
    assert of(text + "[route]\nlayers=0\n", x).equal(x)


def test_shortcuts_add_several_layers_and_are_activated():
    text = "[dropout]\n[upsample]\nstride=1\nscale=-3\n[dropout]\n[shortcut]\nfrom=-2,0\nactivation=relu\n"
    assert of(text).equal(torch.zeros(1, 1, 4, 4))  # -3 - 3 + 1 = -5 times, below zero
    assert of(text.replace("-3", "3")).equal(7 * GRID)


def test_products_place_by_place_and_by_channel():
    text = "[dropout]\n[upsample]\nstride=1\nscale=2\n"
    assert of(text + "[sam]\nfrom=0\n").equal(2 * GRID**2)
    assert of("[dropout]\n[avgpool]\n[scale_channels]\nfrom=0\n").equal(8.5 * GRID)


@pytest.mark.parametrize(
    "name, value",
    [
        ("linear", -2.0),
        ("leaky", -0.2),
        ("relu", 0.0),
        ("mish", -2 * math.tanh(math.log1p(math.exp(-2)))),
        ("swish", -2 / (1 + math.exp(2))),
        ("logistic", 1 / (1 + math.exp(2))),
    ],
)
def test_activations_of_convolutions(name, value):
    net = built(f"[convolutional]\nfilters=1\nsize=1\nactivation={name}\n")
    torch.nn.init.constant_(net.layers[0].conv.weight, -2.0)
    torch.nn.init.zeros_(net.layers[0].conv.bias)
    assert net(torch.ones(1, 1, 1, 1)).item() == pytest.approx(value, rel=1e-6)


def test_convolutions_pad_by_half_their_size_or_as_told():
    for settings, size in (("pad=1", 4), ("", 2), ("padding=2", 6), ("pad=1\nstride=2", 2)):
        assert of(f"[convolutional]\nfilters=2\nsize=3\n{settings}\nactivation=linear\n").shape == (1, 2, size, size)
    grouped = built("[convolutional]\nfilters=4\ngroups=2\nsize=1\nactivation=relu\n", 2)
    assert grouped.layers[0].conv.weight.shape == (4, 1, 1, 1)


def test_several_heads_are_several_outputs(cfg):
    net = built(DETECTOR.partition("\n\n")[2] + "[route]\nlayers=4\n[yolo]\nmask=0\nanchors=1,2,2,1\nclasses=2\n", 3)
    first, second = net(torch.ones(1, 3, 4, 4))
    assert first.shape == (1, 7, 4, 4) and first.equal(second)


def test_boxes_are_decoded():
    yolo = "[yolo]\nmask=1\nanchors=1,1,2,1\nclasses=1\nscale_x_y=1.2\n"
    raw = torch.tensor([0.0, math.log(3), math.log(0.5), 0.0, 0.0, -math.log(3)]).view(1, 6, 1, 1)
    (box,) = decode(built("[dropout]\n" + yolo, 6), (raw,))[0]
    # sigmoid 0.5 and 0.75; x 0.5 * 1.2 - 0.1; of a grid of one; the anchor is 2 x 1 of 4 x 4 pixels
    assert box.tolist() == pytest.approx([0.5, 0.8, 0.5 * 2 / 4, 1 / 4, 0.5, 0.25])
    new = built("[dropout]\n" + yolo + "new_coords=1\n", 6)
    raw = torch.tensor([0.5, 0.75, 0.5, 1.0, 0.9, 0.3]).view(1, 6, 1, 1)
    assert decode(new, (raw,))[0, 0].tolist() == pytest.approx([0.5, 0.8, 2 / 4, 4 / 4, 0.9, 0.3])
    wide = torch.zeros(1, 6, 2, 2)
    assert decode(built("[dropout]\n" + yolo, 6), (wide,))[0, :, 0].tolist() == [0.25, 0.75, 0.25, 0.75]


# -- files -----------------------------------------------------------------------------------------------------

# conv 0: bias 4, scale 4, mean 4, variance 4, kernel 4 * 3 * 9; conv 2: 4 * 2 + 2 * 2; conv 4: bias 7, kernel 7 * 6
COUNT = 16 + 108 + 8 + 4 + 7 + 42


@pytest.mark.parametrize("version", [(0, 1, 0), (0, 2, 0), (0, 2, 5)])
def test_weights_are_read_in_order(cfg, tmp_path, version):
    path = tmp_path / "tiny.weights"
    path.write_bytes(weights_of(COUNT, version=version))
    loaded = niwaki.models.load(f"darknet:{cfg}", checkpoint=str(path))
    net = loaded.model
    assert net.layers[0].bn.bias.tolist() == [1, 2, 3, 4] and net.layers[0].bn.weight.tolist() == [5, 6, 7, 8]
    assert net.layers[0].bn.running_mean.tolist() == [9, 10, 11, 12]
    assert net.layers[0].bn.running_var.tolist() == [13, 14, 15, 16]
    assert net.layers[0].conv.weight.flatten().tolist() == list(range(17, 125))
    assert net.layers[2].bn.bias.tolist() == [125, 126] and net.layers[2].conv.weight.flatten()[0] == 133
    assert net.layers[4].conv.bias.tolist() == list(range(137, 144))
    assert net.layers[4].conv.weight.flatten()[-1] == COUNT
    assert loaded.weights == str(path) and loaded.example.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("change", [-4, -1, 4])
def test_weights_of_another_length_are_refused_and_leave_the_network_alone(cfg, tmp_path, change):
    path = tmp_path / "tiny.weights"
    whole = weights_of(COUNT)
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0" * change)
    net = niwaki.models.load(f"darknet:{cfg}").model
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(FileDamagedError, match=f"{4 * COUNT + change} bytes after the header, the network has"):
        load_weights_(net, path)
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_other_bad_weights_are_refused(cfg, tmp_path):
    path = tmp_path / "tiny.weights"
    with pytest.raises(InputError, match="no such file"):
        niwaki.models.load(f"darknet:{cfg}", checkpoint=str(path))
    path.write_bytes(b"\0" * 5)
    with pytest.raises(FileDamagedError, match="not even a header"):
        niwaki.models.load(f"darknet:{cfg}", checkpoint=str(path))
    path.write_bytes(weights_of(COUNT)[:-4] + struct.pack("<f", math.nan))
    with pytest.raises(NotFiniteError, match=r"layers\.4\.conv\.weight"):
        niwaki.models.load(f"darknet:{cfg}", checkpoint=str(path))
    with pytest.raises(InputError, match="a Linear"):
        load_weights_(torch.nn.Linear(1, 1), path)


def test_checkpoints_with_names_are_read_too(cfg, tmp_path):
    net = niwaki.models.load(f"darknet:{cfg}", seed=3).model
    torch.save(net.state_dict(), tmp_path / "net.pth")
    again = niwaki.models.load(f"darknet:{cfg}", checkpoint=str(tmp_path / "net.pth")).model
    assert again(torch.ones(1, 3, 4, 4))[0].equal(net(torch.ones(1, 3, 4, 4))[0])


def test_a_cut_network_is_written_as_darknet_files(cfg, tmp_path):
    loaded = niwaki.models.load(f"darknet:{cfg}")
    method = niwaki.methods.Random(rule="uniform")
    small = niwaki.compress(
        loaded.model, loaded.example, method=method, budget=niwaki.Budget(keep=0.5, of="units")
    ).model
    new, weights = save_darknet(small, tmp_path / "out" / "small")
    assert new.name == "small.cfg" and "filters=2" in new.read_text() and "comment" not in new.read_text()
    again = niwaki.models.load(f"darknet:{new}", checkpoint=str(weights)).model
    x = torch.randn(2, 3, 4, 4)
    assert again(x)[0].equal(small(x)[0])
    assert sorted(path.name for path in new.parent.iterdir()) == ["small.cfg", "small.weights"]
    with pytest.raises(InputError, match="a Linear"):
        save_darknet(torch.nn.Linear(1, 1), tmp_path / "out" / "other")
    small.layers[0].bn.bias.data[0] = math.nan
    with pytest.raises(NotFiniteError):
        save_darknet(small, tmp_path / "out" / "other")


def test_widths_that_a_cfg_cannot_say_are_refused(cfg, tmp_path):
    net = niwaki.models.load(f"darknet:{cfg}").model
    net.layers[2].conv = torch.nn.Conv2d(1, 2, 1, bias=False)  # a part of the part: the cfg only knows halves
    with pytest.raises(InputError, match=r"layers\.2\.conv\.weight is \(2, 1, 1, 1\), by its cfg \(2, 2, 1, 1\)"):
        save_darknet(net, tmp_path / "odd")
    assert not list(tmp_path.glob("odd*"))


@pytest.mark.parametrize(
    "text, found",
    [
        ("", "no section"),
        ("[convolutional]\nfilters=2\n", r"\[convolutional\] first"),
        ("[net]\nwidth=4\n", "without layers"),
        ("width=4\n", "width=4"),
        ("[net\nwidth=4\n", "net"),
        ("[net]\nwidth\n", "width"),
    ],
)
def test_what_is_no_cfg_is_damaged(tmp_path, text, found):
    path = tmp_path / "bad.cfg"
    path.write_text(text)
    with pytest.raises(FileDamagedError, match=found) as caught:
        niwaki.models.load(f"darknet:{path}")
    assert caught.value.exit_code == 2 and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text, found",
    [
        ("[crnn]\n", "unknown kind"),
        ("[convolutional]\nfilters=two\n", "filters=two"),
        ("[convolutional]\nfilters=2\nactivation=elu\n", "activation 'elu'"),
        ("[convolutional]\nfilters=3\ngroups=2\n", "groups=2 on 1 channels"),
        ("[convolutional]\nfilters=3\nxnor=1\n", "xnor=1"),
        ("[route]\nlayers=-1\n", "layers=-1 in layer 0"),
        ("[dropout]\n[route]\nlayers=4\n", "layers=4 in layer 1"),
        ("[dropout]\n[route]\nlayers=a\n", "layers=a"),
        ("[dropout]\n[route]\nlayers=0\ngroups=2\n", r"on \[1\] channels"),
        ("[convolutional]\nfilters=2\nactivation=relu\n[dropout]\n[dropout]\n[sam]\n", "from="),
        ("[dropout]\n[convolutional]\nfilters=2\nactivation=relu\n[shortcut]\nfrom=0\n", r"\[2, 1\] channels together"),
        ("[dropout]\n[dropout]\n[shortcut]\nfrom=0\nweights_type=per_feature\n", "weights of its own"),
        ("[upsample]\nstride=-2\n", "stride=-2"),
        ("[maxpool]\nmaxpool_depth=1\n", "a pool over channels"),
        ("[yolo]\nanchors=1,1\nclasses=3\n", "1 channels for 1 boxes of 5"),
        ("[yolo]\nanchors=1,1\nmask=1\n", "1 anchors"),
    ],
)
def test_layers_that_cannot_be_built_say_where(text, found):
    with pytest.raises(InputError, match=found) as caught:
        built(text)
    assert "test.cfg:" in caught.value.where and caught.value.do


def test_arguments_and_other_shapes(cfg):
    with pytest.raises(InputError, match=r"found: filters; do: change the cfg; classes=N is all"):
        niwaki.models.load(f"darknet:{cfg}?filters=3")
    with pytest.raises(InputError, match="no such file"):
        niwaki.models.load("darknet:nowhere.cfg")
    with pytest.raises(InputError, match="the cfg says 3"):
        niwaki.models.load(f"darknet:{cfg}", shape=(1, 8, 8))
    wide = niwaki.models.load(f"darknet:{cfg}", shape=(3, 8, 6))
    assert wide.example.shape == (1, 3, 8, 6) and wide.model(wide.example)[0].shape == (1, 7, 8, 6)


# -- other classes ---------------------------------------------------------------------------------------------


def test_a_number_of_classes_in_place_of_the_cfg_s(cfg, tmp_path):
    """One box a cell: 5 numbers and one a class, in the section and in the convolution before it."""
    loaded = niwaki.models.load(f"darknet:{cfg}?classes=3")
    assert loaded.detector is not None and loaded.detector.classes == 3 and loaded.drawn == ()
    assert loaded.model(loaded.example)[0].shape == (1, 8, 4, 4)
    written, weights = save_darknet(loaded.model, tmp_path / "three")  # a cfg of its own says three
    again = niwaki.models.load(f"darknet:{written}", checkpoint=str(weights))
    assert again.detector is not None and again.detector.classes == 3
    without_mask = cfg.with_name("plain.cfg")
    without_mask.write_text(DETECTOR.replace("mask=1\n", "").replace("filters=7", "filters=14"))  # both anchors
    assert niwaki.models.load(f"darknet:{without_mask}?classes=3").model.layers[4].conv.out_channels == 16


def test_weights_for_other_classes_bring_all_but_the_heads(cfg, tmp_path, caplog):
    path = tmp_path / "tiny.weights"
    path.write_bytes(weights_of(COUNT))
    drawn = ("layers.4.conv.weight", "layers.4.conv.bias")
    untrained = niwaki.models.load(f"darknet:{cfg}?classes=3", seed=5).model
    torch.save(niwaki.models.load(f"darknet:{cfg}", checkpoint=str(path)).model.state_dict(), tmp_path / "names.pth")
    for file in (path, tmp_path / "names.pth"):
        caplog.clear()
        loaded = niwaki.models.load(f"darknet:{cfg}?classes=3", checkpoint=str(file), seed=5)
        assert set(loaded.drawn) == set(drawn) and loaded.weights == str(file)
        net = loaded.model
        assert net.layers[0].bn.bias.tolist() == [1, 2, 3, 4] and net.layers[2].conv.weight.flatten()[0] == 133
        assert all(net.get_parameter(name).equal(untrained.get_parameter(name)) for name in drawn)
        (told,) = [record.getMessage() for record in caplog.records if "drawn anew" in record.getMessage()]
        assert "classes=3" in told and all(name in told for name in drawn) and str(file) in told


def test_weights_for_as_many_classes_are_taken_whole(cfg, tmp_path, caplog):
    path = tmp_path / "tiny.weights"
    path.write_bytes(weights_of(COUNT + 7))  # a bias and 6 numbers of the kernel more for the third class
    loaded = niwaki.models.load(f"darknet:{cfg}?classes=3", checkpoint=str(path))
    assert loaded.model.layers[4].conv.weight.flatten()[-1] == COUNT + 7
    assert loaded.drawn == () and not caplog.records


@pytest.mark.parametrize(
    "asked, more, found",
    [
        ("", 7, r"found: 768 bytes after the header, the network has 740; 3 classes would be as long; where: .*"
                r"do: give the cfg that these weights were trained with, and \?classes=N after its name"),
        ("?classes=3", 21, "824 bytes after the header, the network has 768; 5 classes would be as long"),
        ("?classes=3", 3, r"752 bytes after the header, the network has 768; where: .*do: get the file again, or give"),
        ("?classes=3", -14, r"684 bytes after the header, the network has 768; where"),  # less than one class
    ],
)  # fmt: skip
def test_weights_of_another_length_say_for_how_many_classes_they_would_be(cfg, tmp_path, asked, more, found):
    path = tmp_path / "tiny.weights"
    path.write_bytes(weights_of(COUNT + more))
    with pytest.raises(FileDamagedError, match=found):
        niwaki.models.load(f"darknet:{cfg}{asked}", checkpoint=str(path))


def test_other_networks_with_names_stay_refused(cfg, tmp_path):
    other = cfg.with_name("other.cfg")
    other.write_text(DETECTOR.replace("filters=4 ", "filters=6 "))
    torch.save(niwaki.models.load(f"darknet:{other}").model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        InputError, match=r"of another shape: layers\.0\.conv\.weight .*the checkpoint of this very model"
    ):
        niwaki.models.load(f"darknet:{cfg}?classes=3", checkpoint=str(tmp_path / "other.pth"))
    torch.save(niwaki.models.load(f"darknet:{cfg}?classes=9").model.state_dict(), tmp_path / "nine.pth")
    with pytest.raises(InputError, match=r"2 of another shape.*another number of classes: write \?classes=N after"):
        niwaki.models.load(f"darknet:{cfg}", checkpoint=str(tmp_path / "nine.pth"))


@pytest.mark.parametrize("value", ["0", "-1", "2.0", "true", "null", '"3"'])
def test_numbers_of_classes_that_are_none(cfg, value):
    with pytest.raises(InputError, match=r"found: classes=.*; do: give a whole number from 1 on"):
        niwaki.models.load(f"darknet:{cfg}?classes={value}")


def test_cfgs_whose_classes_are_elsewhere(tmp_path):
    for name, text, found in (
        ("plain", "[convolutional]\nfilters=7\n", r"no \[yolo\] section"),
        (
            "apart",
            "[convolutional]\nfilters=7\n[dropout]\n[yolo]\nclasses=2\nanchors=1,1\n",
            r"a \[dropout\] before it",
        ),
    ):
        (tmp_path / f"{name}.cfg").write_text(NET.format(3) + text)
        with pytest.raises(InputError, match=found):
            niwaki.models.load(f"darknet:{tmp_path / name}.cfg?classes=3")
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(InputError, match="missing"):
        niwaki.models.load(f"darknet:{tmp_path / 'plain'}.cfg", checkpoint=str(tmp_path / "foreign.pth"))


# -- published networks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cfgs() -> dict[str, Callable[..., str]]:
    spec = importlib.util.spec_from_file_location("darknet_cfgs", ROOT / "benchmarks" / "darknet_cfgs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CFGS


@pytest.mark.parametrize(
    "name, count",
    [("yolov4", 64363101), ("yolov4-tiny", 6056606), ("yolov3", 61949149), ("yolov3-tiny", 8852366)],
)
def test_published_architectures_have_the_published_parameters(cfgs, name, count):
    with torch.device("meta"):
        net = Darknet(parse(cfgs[name](), name))
    assert sum(parameter.numel() for parameter in net.parameters()) == count


def test_yolov4_of_twenty_classes_has_the_published_size_and_compute(cfgs):
    """64.040 M parameters and 59.67 GFLOPs (2 x MAC) at 416; 107 convolutions with batch norm, and the places that
    group channel pruning names: channels and resolution by number of layer."""
    sections = parse(cfgs["yolov4"](416, classes=20), "yolov4.cfg")
    with torch.device("meta"):
        net = Darknet(sections).eval()
    x = torch.zeros(1, 3, 416, 416, device="meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == 64_040_001
    convolutions = {i: layer for i, layer in enumerate(net.layers) if isinstance(layer, Convolution)}
    assert sum(layer.bn is not None for layer in convolutions.values()) == 107 and len(net.layers) == 162
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outs = net(x)
    assert counter.get_total_flops() == 59_668_670_464
    assert niwaki.trace(net, x).macs == 59_668_670_464 // 2
    assert [tuple(out.shape[1:]) for out in outs] == [(75, 52, 52), (75, 26, 26), (75, 13, 13)]
    widths = {10: 64, 23: 128, 54: 256, 85: 512, 117: 256, 127: 128, 137: 256, 148: 512, 159: 1024}
    assert {i: convolutions[i].conv.out_channels for i in widths} == widths


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the shared data folder is not here")
@pytest.mark.parametrize("name", ["yolo-fastest-1.1", "yolo-fastest-1.1-xl"])
def test_trained_detectors_are_read_cut_and_written(name, tmp_path):
    loaded = niwaki.models.load(f"darknet:{WEIGHTS / name}.cfg", checkpoint=f"{WEIGHTS / name}.weights")
    assert loaded.example.shape == (1, 3, 320, 320)
    example = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    graph = niwaki.trace(loaded.model, example)
    assert not graph.unknown and graph.free_params > 0.9 * graph.params
    scores = niwaki.score(graph, niwaki.collect(loaded.model, graph, frozenset()), how=niwaki.scores.Random())
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=0.5, of="units"), how=niwaki.budgets.Uniform())
    small = niwaki.cut(loaded.model, plan)
    receipt = niwaki.verify(loaded.model, small, plan, example)
    assert receipt.exact and receipt.passed and receipt.difference < 1e-8 * max(receipt.scale, 1.0)
    cfg, weights = save_darknet(small, tmp_path / "small")
    again = niwaki.models.load(f"darknet:{cfg}", checkpoint=str(weights)).model
    assert all(a.equal(b) for a, b in zip(again(example), small(example), strict=True))
    whole, _ = save_darknet(loaded.model, tmp_path / "whole")
    header = 20
    written = whole.with_suffix(".weights").read_bytes()[header:]
    assert written == Path(f"{WEIGHTS / name}.weights").read_bytes()[header:], "the same numbers in the same order"
