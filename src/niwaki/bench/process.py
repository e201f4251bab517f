"""What runs in the process of one runtime: `python -m niwaki.bench.process JOB.json`."""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from niwaki.bench.items import Item, fitted, open_item
from niwaki.bench.starting import MARK, failure
from niwaki.export import Onnx, make_artefact
from niwaki.export.runtimes import READERS
from niwaki.measure.turns import in_turns
from niwaki.units import run, tensors_in

Call = Callable[[], Any]


def work(job: dict[str, Any]) -> None:
    """Time all items of a job at all its batches; each row is in the answer as soon as it is known."""
    torch.set_num_threads(job["threads"])
    folder, runtime = Path(job["folder"]), job["runtime"]
    rows: list[dict[str, Any]] = []
    opened: dict[str, Item] = {}
    for number, given in enumerate(job["items"]):
        tell(f"{runtime}: opening {given['label']}", number, len(job["items"]))
        shape = tuple(given["shape"]) if given["shape"] else None
        opened[given["label"]] = open_item(given["place"], shape=shape, seed=job["seed"]).called(given["label"])
    for batch in job["batches"]:
        tensors = load_file(str(folder / f"inputs-{batch}.safetensors"))
        inputs = tuple(tensors[str(number)] for number in range(len(tensors)))
        calls: dict[str, Call] = {}
        shapes: dict[str, list[list[int]]] = {}
        for number, (label, item) in enumerate(opened.items()):
            tell(f"{runtime}, batch {batch}: preparing {label}", number, len(opened))
            try:
                call = prepared(item, runtime, inputs, folder, job["threads"])
                with torch.no_grad():
                    shapes[label] = [list(tensor.shape) for tensor in tensors_in(call())]
                calls[label] = call
            except Exception as error:  # one that does not run leaves the others
                rows.append({"item": label, "batch": batch, "failed": failure(error)})
        if calls and len({json.dumps(one) for one in shapes.values()}) == 1:
            heard = lambda done, batch=batch: tell(f"{runtime}, batch {batch}", done, job["runs"])  # noqa: E731
            with torch.no_grad():
                times = in_turns(calls, runs=job["runs"], warm_up=job["warm_up"], heard=heard)
            for label, taken in times.items():
                found = {"ms": taken.median(), "quarters": taken.quarters(), "cpu_ms": taken.median("cpu")}
                rows.append({"item": label, "batch": batch, "outputs": shapes[label], **found})
        elif calls:  # not worth timing: the caller refuses it
            empty = {"ms": 0.0, "quarters": [0.0, 0.0], "cpu_ms": 0.0}
            rows += [{"item": label, "batch": batch, "outputs": found, **empty} for label, found in shapes.items()]
        answer = Path(job["answer"])
        aside = answer.with_suffix(".part")
        aside.write_text(json.dumps({"rows": rows}), encoding="utf-8")
        aside.replace(answer)


def prepared(item: Item, runtime: str, inputs: tuple[torch.Tensor, ...], folder: Path, threads: int) -> Call:
    """A pass of an item in a runtime."""
    given = fitted(item, inputs)
    if runtime in ("eager", "compile"):
        network: Any = torch.compile(item.opened, dynamic=False) if runtime == "compile" else item.opened
        return lambda: run(network, given)
    file = Path(item.place) if item.kind in ("onnx", "openvino") else exported(item, given, folder)
    call = READERS[runtime](file, threads=threads)
    return lambda: call(inputs)


def exported(item: Item, given: Any, folder: Path) -> Path:
    """The network's ONNX file: the one of any batch where there is one already, else made, of this batch if need be."""
    names = folder / "onnx"
    names.mkdir(exist_ok=True)
    stem = "".join(letter if letter.isalnum() else "-" for letter in item.label)[-80:]
    anything, this = names / f"{stem}.onnx", names / f"{stem}-{given_batch(given)}.onnx"
    for there in (anything, this):
        if there.exists():
            return there
    made = make_artefact(item.opened, given, this, target=Onnx(), runs=0)
    return this.rename(anything) if made.batch == "dynamic" and len(made.files) == 1 else this


def given_batch(given: Any) -> int:
    return next(int(tensor.shape[0]) for tensor in tensors_in(given) if tensor.dim() > 0)


def tell(what: str, done: int, of: int) -> None:
    print(MARK + json.dumps([what, done, of]), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    warnings.simplefilter("ignore")  # the same things were opened before, and said then
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
