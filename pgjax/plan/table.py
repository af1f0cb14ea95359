"""A plan for people."""

from pgjax.plan.chips import GIB

COLUMNS = ("program", "times", "fits", "GiB a chip", "beside", "arguments", "temporary", "TFLOP a chip", "moved, GiB a chip", "floor, s")

RATES = (("flops", 1e12, "TFLOP/s"), ("bandwidth", 1e9, "GB/s of its memory"), ("link", 1e9, "GB/s to others"))


def table(plan: dict) -> str:
    """Markdown: the programs, then what follows from them."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    lines = [f"{plan['recipe']} on {plan['topology']}: {plan['chips']} chips, {mesh}; compiled by {plan['compiler']}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    gib = lambda size: "-" if size is None else f"{size / GIB:.2f}"  # noqa: E731
    for p in plan["programs"]:
        moved = ", ".join(f"{kind} {gib(size)}" for kind, size in sorted(p["collectives"].items()) if size >= GIB / 200) or "-"
        sizes = [gib(p[key]) for key in ("peak_bytes", "beside_bytes", "argument_bytes", "temporary_bytes")]
        row = [p["name"], str(p["times"]), "yes" if p["fits"] else "no", *sizes, f"{p['flops'] / plan['chips'] / 1e12:.2f}", moved]
        lines.append(f"| {' | '.join([*row, format(p['floor_seconds'], '.3g')])} |")
    limit, assumed = plan["programs"][0]["limit_bytes"], plan["assumed"]
    state, reference = plan["held_bytes"]["state"], plan["held_bytes"]["reference"]
    lines += ["", f"A chip has {gib(limit)} GiB. {'It fits' if plan['fits'] else 'It does not fit'}{_how(plan)}."]
    lines.append(
        f"At all times it holds the weights and averages that are trained, {gib(state)} GiB, and the reference, {gib(reference)} GiB."
    )
    if state + reference > limit:
        lines.append("These alone are too much: fsdp x tensor must be larger, or fewer weights trained (--model.lora-rank).")
    lines += [f"{p['name']} does not: {p['why']}" for p in plan["programs"] if not p["fits"]]
    if plan["fits"]:
        largest = " and ".join(f"--{key.replace('_', '-')} {value}" for key, value in plan["largest"].items() if value)
        lines.append(f"Rollout waves that are needed: {plan['waves']}. The largest batches that fit: {largest}.")
        rates = [f"{assumed[key] / unit:.0f} {name}" for key, unit, name in RATES]
        lines.append(
            f"A step takes {plan['floor_seconds']:.3g} s at least, if every answer has {assumed['answer_tokens']} tokens and a chip"
        )
        lines[-1] += f" reaches {', '.join(rates)}."
    return "\n".join(lines)


def _how(plan: dict) -> str:
    settings = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in plan["settings"].items())
    return f" with {settings}" if settings and plan["fits"] else ""
