"""Results that nothing reads: heads that a forward runs for training, and leaves out of what it returns."""

from typing import Any

import numpy as np

from niwaki.graph.recorder import Record, Recorder
from niwaki.graph.values import Parameter
from niwaki.units import tensors_in

REASON = "a result that the output does not depend on, but training may"


def fix_unread(recorder: Recorder, output: Any, parameters: dict[str, Parameter]) -> None:
    """Hold the widths of results that nobody reads, where they are those of parameters that the output doesn't need.

    Widths inside such a head stay free; so does what other parts of the network give besides (last states, weights of
    attention), since the output depends on the parameters behind it.
    """
    records = recorder.records
    outputs = {id(recorder.value(tensor)) for tensor in tensors_in(output)}
    needed = _needed(records, outputs)
    live = {id(v.parameter) for record in needed for v in record.inputs if v.parameter is not None}
    dead = [p for p in parameters.values() if p.seeds and not p.buffer and id(p) not in live]
    if not dead:
        return
    seeds = np.unique(np.concatenate([labels for p in dead for labels in p.seeds.values()]))
    read = {id(v) for r in records for v in r.inputs if not any(v is made for made in r.outputs)}
    for record in records:
        for value in record.outputs:
            if id(value) in read or id(value) in outputs:
                continue
            for labels in value.fields:
                own = labels.ravel()[np.isin(labels.ravel(), seeds)]
                if own.size:
                    recorder.space.fix(own, REASON)


def _needed(records: list[Record], outputs: set[int]) -> list[Record]:
    """Calls that the output depends on; calls that write into tensors are taken to be."""
    wanted, needed = set(outputs), []
    for record in reversed(records):
        if record.func._schema.is_mutable or any(id(value) in wanted for value in record.outputs):
            needed.append(record)
            wanted.update(id(value) for value in record.inputs)
    return needed
