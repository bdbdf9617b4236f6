"""Format the figures of `mae-et bench node` as tables."""

from typing import Any

from mae_et.curriculum.throughput import throughput_table


def node_tables(figures: dict[str, Any]) -> str:
    """Return the figures as text: training, loading, other times, and hours."""
    machine = figures["machine"]
    gpus = f"{machine['gpus']} x " if machine["gpus"] else ""
    title = f"{gpus}{machine['device']}, {machine['cores']} cores, torch {machine['torch']}"
    head = f"{'B':>5} {'micro-batch':>12} {'training':>10} {'images/s':>10} {'ms a step':>10}"
    lines = [f"{title}, {figures['date']}", "", *_how(machine), "", head]
    lines += [_training(row) for row in figures["training"]]
    lines += ["", f"{'loading':<26} {'B':>5} {'images/s':>10}"]
    lines += [_loading(row) for row in figures["loading"]]
    lines += ["", _exchange(figures["exchange"]), _checkpoint(figures["checkpoint"])]
    if "throughput" in figures:
        lines += ["", throughput_table(figures["throughput"])]
    if "fastest" in figures:
        hours = ", ".join(f"{way}: {value:,.2f}" for way, value in figures["hours_by_way"].items())
        lines += [
            f"\nhours on {max(1, machine['gpus'])} by way of loading: {hours}",
            f"fastest: {' '.join(figures['fastest']['flags'])}",
        ]
    return "\n".join(lines)


def _how(machine: dict[str, Any]) -> list[str]:
    """Return how training and loading were measured."""
    gpus = machine["gpus"] > 1
    processes = f"{machine['loader_processes_per_gpu']} loader processes"
    return [
        "training: " + ("one GPU, while the others are idle" if gpus else "without loading"),
        f"loading: from the page cache, images/s of {processes}"
        + (", of each GPU while all load: the slowest" if gpus else ""),
    ]


def _training(row: dict[str, Any]) -> str:
    kind = "plain" if row.get("reference") else "compiled" if row["compiled"] else "eager"
    seconds = row.get("step") or row["seconds"]
    start = f"{row['bandwidth']:>5} {row['micro_batch']:>12,} {kind:>10}"
    if not seconds:
        return f"{start} not measured: no time or no memory"
    noise = " noisy: slower than more images, not used" if row.get("noisy") else ""
    return f"{start} {row['images_per_second']:>10,.0f} {1000 * seconds:>10.1f}{noise}"


def _loading(row: dict[str, Any]) -> str:
    start = f"{row['way']:<26} {row['bandwidth'] or 'any':>5}"
    if row["images_per_second"] is None:
        return f"{start} not measured: {row['reason']}"
    return f"{start} {row['images_per_second']:>10,.0f}"


def _exchange(found: dict[str, Any] | None) -> str:
    if found is None:
        return "exchange of gradients: not measured: one GPU or none"
    if "error" in found:
        return f"exchange of gradients: not measured: {found['error']}"
    return (
        f"exchange of gradients: {found['bytes'] / 1e6:,.0f} MB over {found['ranks']} GPUs in "
        f"{1000 * found['seconds']:.1f} ms ({found['bus_bytes_per_second'] / 1e9:.1f} GB/s on the "
        "bus)"
    )


def _checkpoint(found: dict[str, Any]) -> str:
    pause = found["pause_seconds"]
    waits = "all of it" if pause is None else f"{pause:.2f} s"
    return (
        f"checkpoint: {found['bytes'] / 1e6:,.0f} MB in {found['seconds']:.2f} s to "
        f"{found['folder']}; training waits for {waits}"
    )
