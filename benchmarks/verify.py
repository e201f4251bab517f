"""Cut equals mask: the largest difference, in float64, on well-known architectures at half of the MACs."""

import argparse
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rows import Rows, arguments, prose, table
from torch import Tensor, nn

import niwaki

TORCHVISION = (
    "resnet50",
    "densenet121",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "googlenet",
)
BAR = 1e-9


def fill_(model: nn.Module, example: Any, *, seed: int) -> nn.Module:
    """No parameter that is all zero or all one, and batch norms with disturbed real statistics; in place.

    Fresh networks have zero biases and unit statistics, behind which a wrong cut can hide; and a signal that dies on
    its way through a deep network hides everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, mean: float, spread: float) -> None:
        tensor.copy_(mean + spread * torch.randn(tensor.shape, generator=generator))

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if bool((parameter == parameter.reshape(-1)[0]).all()):
                scale = name.endswith("weight") and parameter.dim() == 1
                draw(parameter, 1.0 if scale else 0.0, 0.3 if scale else 0.1)
        momenta = [norm.momentum for norm in norms]
        if norms:
            for norm in norms:
                norm.momentum = None  # plain averages
            model.train()
            for _ in range(2):
                model(torch.randn(4, *example.shape[1:], generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean += (
                0.3 * norm.running_var.sqrt() * torch.randn(norm.running_mean.shape, generator=generator)
            )
            norm.running_var *= 0.6 + 0.8 * torch.rand(norm.running_var.shape, generator=generator)
    return model.eval()


def responds(model: nn.Module, example: Any) -> float:
    """Largest change of any output between two random inputs: a dead network would hide a wrong cut."""
    with torch.no_grad():
        a, b = (
            niwaki.units.tensors_in(niwaki.units.run(model, niwaki.units.map_tensors(example, change)))
            for change in (lambda t: t, lambda t: t.flip(-1))
        )
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def vision(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    settings = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **settings), torch.randn(1, 3, 224, 224)


def gpt2() -> tuple[nn.Module, Any]:
    """GPT2LMHeadModel: 4 layers of width 128, 8 heads, tied embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=4, n_head=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(512, (2, 24))}


def llama() -> tuple[nn.Module, Any]:
    """LlamaForCausalLM: 4 layers of width 128, 8 query heads on 4 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(512, (2, 24))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: (lambda name=name: vision(name)) for name in TORCHVISION},
    "gpt2-small-shape": gpt2,
    "llama-small-shape": llama,
}


def make(name: str, *, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model, example = MODELS[name]()
    return fill_(model, example, seed=seed), example


def look(name: str, *, seed: int, keep: float, exact_only: bool) -> dict[str, Any]:
    """One row: trace, choose, cut and judge."""
    model, example = make(name, seed=seed)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage] = now - clock
        clock = now

    how = niwaki.scores.Magnitude(p=2)
    graph = niwaki.trace(model, example)
    lap("trace")
    scores = niwaki.score(graph, niwaki.collect(model, graph, how.needs), how=how)
    plan = niwaki.choose(graph, scores, niwaki.Budget(keep=keep, of="macs"), exact_only=exact_only)
    lap("choose")
    small = niwaki.cut(model, plan)
    lap("cut")
    receipt = niwaki.verify(model, small, plan, example, seed=seed)
    lap("verify")
    counted = niwaki.measure.measure(small, example, meters=(niwaki.measure.Macs(), niwaki.measure.Params()))
    free = [group for group in graph.groups if group.fixed is None]
    return {
        "door": receipt.door,
        "responds": responds(small, example),
        "difference": receipt.difference,
        "scale": receipt.scale,
        "exact": receipt.exact,
        "passed": receipt.passed,
        "seconds": seconds,
        "groups": len(graph.groups),
        "free_exact": sum(group.exact for group in free),
        "free_inexact": sum(not group.exact for group in free),
        "reasons": sorted({str(group.inexact) for group in free if not group.exact}),
        "cut_exact": len(plan.kept) - len(plan.inexact),
        "cut_inexact": len(plan.inexact),
        "unknown": [f"{u.operation} in {u.module} ({u.where})" for u in graph.unknown],
        "device": graph.device,
        "macs_before": plan.promised["macs_before"],
        "macs_promised": plan.promised["macs"],
        "macs_counted": int(counted["macs"].value),
        "macs_uncounted": list(counted["macs"].uncounted),
        "params_before": plan.promised["params_before"],
        "params_promised": plan.promised["params"],
        "params_counted": int(counted["params"].value),
    }


def page(rows: Rows) -> None:
    """docs/benchmarks/verify.md from the rows."""
    text = prose("""
        # Cut equals mask

        Written by `python benchmarks/verify.py --table`; do not edit.

        Random weights, batch norms with disturbed statistics of real activations, budget 0.5 of the MACs, L2
        norms, one ranking over all groups. The difference is the largest absolute one of any output between the
        cut model and the masked original, both in float64 on an input neither has seen; *scale* is the largest
        absolute output, *responds* how much the outputs change from one input to another.
        *Counted* is by PyTorch's own counter on the cut model. The small gpt2 and llama shapes are true
        `transformers` classes from small settings.
    """)
    for exact_only, head, said in (
        (True, "Groups whose removal is exact", f"`exact_only=True`; the bar is {BAR:g}."),
        (
            False,
            "All groups",
            "Here groups are cut too whose removal changes more than zeroing does (a mean over channels, a softmax "
            "over them ...). "
            "For these a difference is expected and declared: it is how much of the outputs depends on the "
            "width itself.",
        ),
    ):
        lines = []
        for row in rows.rows:
            if row["exact_only"] != exact_only:
                continue
            if "error" in row:
                lines.append(
                    (row["model"], "**failed**", row["error"].replace("|", "/").splitlines()[0][:200], *[""] * 7)
                )
                continue
            lap = row["seconds"]

            def costs(kind: str, row: dict[str, Any] = row) -> str:
                promised, counted, before = (row[f"{kind}_{what}"] for what in ("promised", "counted", "before"))
                right = f"= {counted:,}" if promised == counted else f"**is not {counted:,}**"
                return f"{promised:,} {right} ({counted / before:.4f})"

            lines.append(
                (
                    row["model"],
                    row["door"],
                    f"{row['difference']:.1e}",
                    f"{row['scale']:.1e}",
                    f"{row['responds']:.1e}",
                    "yes" if row["passed"] and (not row["exact"] or row["difference"] < BAR) else "**no**",
                    f"{row['cut_exact']} / {row['cut_inexact']}",
                    f"{row['free_exact']} / {row['free_inexact']} of {row['groups']}",
                    f"{lap['trace']:.2f} + {lap['choose']:.2f} + {lap['cut']:.2f} s",
                    costs("macs"),
                    costs("params"),
                )
            )
        text += (
            f"## {head}\n\n{said}\n\n"
            + table(
                (
                    "model",
                    "door",
                    "difference",
                    "scale",
                    "responds",
                    "passed",
                    "cut groups exact / inexact",
                    "free groups exact / inexact",
                    "trace + choose + cut",
                    "MACs promised = counted (kept)",
                    "parameters promised = counted (kept)",
                ),
                lines,
            )
            + "\n\n"
        )
    reasons = {reason for row in rows.rows for reason in row.get("reasons", ())}
    if reasons:
        text += "\nReasons given for inexact groups: " + "; ".join(sorted(reasons)) + ".\n"
    rows.write(text)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--keep", type=float, default=0.5, help="share of the MACs that stays (default: %(default)s)"
        )

    options = arguments(__doc__ or "", cases=tuple(MODELS), threads=1, more=more)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    rows = Rows("verify", fresh=options.fresh, packages=("torchvision", "transformers"))
    for name in () if options.table else options.only or MODELS:
        for exact_only in (True, False):
            key = f"{name}{' exact' if exact_only else ''} {options.keep}"
            if not rows.wanted(key):
                continue
            settings = {"model": name, "keep": options.keep, "exact_only": exact_only}
            try:
                found = look(name, seed=options.seed, keep=options.keep, exact_only=exact_only)
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            rows.add(key, {**settings, **found}, seed=options.seed, threads=options.threads)
    page(rows)


if __name__ == "__main__":
    main()
