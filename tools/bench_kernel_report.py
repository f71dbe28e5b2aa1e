"""The report of bench_kernel.py: table lines, ratios, checks, the growth of memory, a plot."""

from __future__ import annotations

import sys
from pathlib import Path

from bench_cases import Setting

# prefix in "ratios" -> (ours, theirs, suffix). "_vs_gather" without a prefix is the fused top-k
# against GEMM + gather + SDPO's formula.
RATIOS = {
    "": ("fused-topk", "gather-linear", "gather"),
    "unfused_": ("topk", "gather", "gather"),
    "unfused_in_place_": ("topk-in-place", "gather", "gather"),
    "unfused_full_": ("full", "gather", "gather"),
    "fused_record_": ("fused-record", "gather-linear", "gather"),
    "fused_union_": ("fused-union", "gather-linear", "gather"),
    "fused_full_": ("fused-full", "gather-linear", "gather"),
    "topk_": ("topk", "trl-topk", "trl"),
    "full_": ("full", "trl-full", "trl"),
    "fused_full_liger_": ("fused-full", "liger", "liger"),
    "record_kl_": ("record-kl", "forward-kl", "forward_kl"),
    "fused_topk_gemm_": ("fused-topk", "gemm", "gemm"),
}
ONE_RANK = ("_vs_trl", "_vs_liger")
QUOTIENTS = {
    "bytes": ("forward_bytes_per_token", "backward_bytes_per_token"),
    "peak_memory": ("peak_bytes",),
    "cpu_seconds": ("cpu_seconds",),
    "wall_seconds": ("wall_seconds",),
    "device_seconds": ("device_seconds",),
}
# Cases of one level that compute the same loss.
SAME_LOSS = (
    ("gather", "topk", "topk-in-place", "trl-topk"),
    ("trl-full", "full"),
    ("forward-kl", "record-kl"),
    ("gather-linear", "fused-topk"),
    ("liger", "fused-full"),
)
# Relative differences of (loss, gradient norm) that pass. float32 rounds the rivals' tails, more
# visibly the smaller the divergence; the bfloat16 projection of (a) rounds its logits by about as
# much as the teacher differs.
LIMITS = {"float32": (2e-3, 1e-2), "bfloat16": (0.2, 0.5)}
# Nats by which float32 sums may differ if a truncated loss is near zero.
ROUNDING = 1e-7


def line(row: dict) -> str:
    """A row as a line of the table."""
    head = f"{row['source']:<5}{row['case']:<15}{row['label']:<37}"
    if "error" in row or "skipped" in row:
        return head + (row.get("skipped") or "FAILED: " + row["error"])
    seconds = f"{row['cpu_seconds']:9.3f}{row['wall_seconds']:9.3f}" + (
        f"{row['device_seconds']:9.4f}" if "device_seconds" in row else ""
    )
    moved = f"{row['peak_bytes'] / 1e6:10.0f}{row['forward_bytes_per_token']:12.0f}"
    moved += f"{row['backward_bytes_per_token']:10.0f}"
    value = f"{row['loss']:13.5e}{row['grad_norm']:11.3e}" if "loss" in row else ""
    return head + seconds + moved + value


def heading(setting: Setting) -> str:
    """The head of a setting's table."""
    sizes = (
        f"T={setting.tokens} V={setting.vocab} h={setting.hidden} K={setting.top_k} TP={setting.tp}"
        f" {setting.dtype} {setting.device}"
    )
    seconds = f"{'CPU s':>9}{'wall s':>9}" + (f"{'GPU s':>9}" if setting.device == "cuda" else "")
    columns = f"{seconds}{'peak MB':>10}{'fwd B/token':>12}{'bwd':>10}{'loss':>13}{'|gradient|':>11}"
    return f"\n{sizes}\n{'':<5}{'case':<15}{'':<37}{columns}"


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """Ours over theirs within one setting, for every pair that was run."""
    done = {row["case"]: row for row in rows if "cpu_seconds" in row}
    found = {}
    for prefix, (ours, theirs, suffix) in RATIOS.items():
        if ours not in done or theirs not in done:
            continue
        a, b = done[ours], done[theirs]
        for what, columns in QUOTIENTS.items():
            x, y = (sum(row.get(column, 0.0) for column in columns) for row in (a, b))
            # no bytes move at TP=1
            if y > 0:
                found[f"{prefix}{what}_vs_{suffix}"] = x / y
    return found


def headline(settings: list[dict]) -> dict[str, float]:
    """The ratios of the first setting with more than one rank, or else of the first setting.

    Ratios to rivals that run on one rank alone come from the first setting that has them.
    """
    found: dict[str, float] = {}
    for one in sorted(settings, key=lambda s: s["setting"]["tp"] == 1):
        new = (
            one["ratios"]
            if not found
            else {name: value for name, value in one["ratios"].items() if name.endswith(ONE_RANK)}
        )
        found = new | found
    return found


def checks_of(rows: list[dict]) -> list[dict]:
    """Compare cases of one setting that compute the same loss with the first of them."""
    done = {row["case"]: row for row in rows if "loss" in row}
    found = []
    for names in SAME_LOSS:
        present = [name for name in names if name in done]
        for name in present[1:]:
            first, other = done[present[0]], done[name]
            apart = {of: abs(other[of] - first[of]) / abs(first[of]) for of in ("loss", "grad_norm")}
            limits = LIMITS[first["dtype"] if first["level"] == "linear" else "float32"]
            close = abs(other["loss"] - first["loss"]) <= limits[0] * abs(first["loss"]) + ROUNDING
            found.append(
                {
                    "cases": [present[0], name],
                    **apart,
                    "limits": limits,
                    "ok": close and apart["grad_norm"] <= limits[1],
                }
            )
    return found


def peak_growth(rows: list[dict]) -> list[dict]:
    """Peak memory of a case at its largest number of tokens over that at its smallest."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("peak_bytes"):
            key = tuple(row[name] for name in ("case", "vocab", "hidden", "top_k", "tp", "dtype"))
            series.setdefault(key, []).append(row)
    found = []
    for same in series.values():
        few, many = (pick(same, key=lambda r: r["tokens"]) for pick in (min, max))
        if few["tokens"] < many["tokens"]:
            names = ("case", "tp", "top_k", "dtype", "vocab")
            tokens = [few["tokens"], many["tokens"]]
            found.append(
                {name: few[name] for name in names}
                | {"tokens": tokens, "peak_growth": many["peak_bytes"] / few["peak_bytes"]}
            )
    return found


def comparison(checks: list[dict], ratios: dict[str, float]) -> list[str]:
    """Lines below a setting's table: which losses agree, and ours over theirs."""
    lines = []
    for check in checks:
        verdict = "agree" if check["ok"] else "DISAGREE"
        limits = "limits {:.0e}, {:.0e}".format(*check["limits"])
        apart = f"loss {check['loss']:.1e}, gradient norm {check['grad_norm']:.1e} apart ({limits})"
        lines.append(f"{' and '.join(check['cases'])} {verdict}: {apart}")
    for prefix, (ours, theirs, suffix) in RATIOS.items():
        keys = {what: f"{prefix}{what}_vs_{suffix}" for what in QUOTIENTS}
        quotients = [f"{what} {ratios[key]:.4f}" for what, key in keys.items() if key in ratios]
        if quotients:
            lines.append(f"{ours} / {theirs}: {', '.join(quotients)}")
    return lines


SYMBOLS = {"tokens": "T=", "vocab": "V=", "top_k": "K=", "tp": "TP=", "dtype": ""}


def plot(rows: list[dict], path: Path) -> None:
    """Bars per case: CPU seconds, peak memory, bytes per token (logarithmic)."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "cpu_seconds" in row][::-1]
    varying = [n for n in SYMBOLS if len({row[n] for row in rows}) > 1]
    names = [" ".join([row["case"], *(f"{SYMBOLS[n]}{row[n]}" for n in varying)]) for row in rows]
    colours = [
        "tab:blue" if row["source"] == "ours" else "tab:grey" if row["source"] == "e" else "tab:orange"
        for row in rows
    ]
    unit = "device_seconds" if any("device_seconds" in row for row in rows) else "cpu_seconds"
    moved = [row["forward_bytes_per_token"] + row["backward_bytes_per_token"] for row in rows]
    panels = {
        f"{unit.replace('_', ' ')}, forward and backward": [row.get(unit, 0.0) for row in rows],
        "peak memory above the inputs, MB": [row["peak_bytes"] / 1e6 for row in rows],
        "bytes received per token and rank": moved,
    }
    figure, axes = pyplot.subplots(
        1, 3, figsize=(16, 1.5 + 0.28 * len(rows)), sharey=True, layout="constrained"
    )
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.barh(range(len(rows)), values, color=colours)
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.4)
    axes[0].margins(y=0.01)
    axes[0].set_yticks(range(len(rows)), names)
    if any(moved):
        axes[2].set_xscale("log")
    figure.suptitle("blue: this project; orange: rivals; grey: lower bounds")
    figure.savefig(path, dpi=120)
